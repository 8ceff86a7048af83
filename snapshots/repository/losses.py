"""What of a snapshot could not be had, when a reader is to go on without it.

Any number of threads may add. A chunk that cannot be verified is lost by itself; of a page that
cannot be read all the chunks that it describes are lost, for nobody knows which of them are holes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Hole:
    """A part of the volume, in bytes, that could not be had; ``problem`` is the first's, one line.

    It reads as zeros in what was made.
    """

    offset: int
    length: int
    problem: str


class Losses:
    """Those of one snapshot."""

    def __init__(self) -> None:
        self._chunks: dict[int, tuple[int, str]] = {}  # first: (end, problem)
        self._lock = threading.Lock()

    def add(self, first: int, end: int, problem: str) -> None:
        """Chunks ``first`` to before ``end`` cannot be had."""
        with self._lock:
            self._chunks[first] = (end, problem)

    def holes(self, chunk_size: int, size: int) -> list[Hole]:
        """All of them in order, those that touch as one, for a volume of ``size`` bytes."""
        holes: list[Hole] = []
        with self._lock:
            lost = sorted((first, *rest) for first, rest in self._chunks.items())
        for first, end, problem in lost:
            offset, stop = first * chunk_size, min(end * chunk_size, size)
            if holes and holes[-1].offset + holes[-1].length == offset:
                last = holes[-1]
                holes[-1] = Hole(last.offset, last.length + stop - offset, last.problem)
            elif offset < stop:
                holes.append(Hole(offset, stop - offset, problem))
        return holes
