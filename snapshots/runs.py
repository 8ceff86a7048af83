"""Runs of blocks as clients ask for them: in bytes, one behind the other, without gaps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE

T = TypeVar("T")


def blocks_of(offset: int, length: int) -> tuple[int, int]:
    """The first block that a range in bytes touches, and the one behind the last."""
    return offset >> BLOCK_SHIFT, (offset + length + BLOCK_SIZE - 1) >> BLOCK_SHIFT


def runs_in_bytes(
    runs: Iterable[tuple[int, int, T]], offset: int, end: int, limit: int, rest: T
) -> list[tuple[int, T]]:
    """Up to ``limit`` runs (length in bytes, what holds there) from ``offset`` on, up to ``end``.

    ``runs`` are (first block, block behind the last, what holds there) in order; ``rest`` holds in
    between. Neighbours differ when those of ``runs`` that touch do, and none is ``rest``.
    """
    found: list[tuple[int, T]] = []
    position = offset
    for first, last, what in runs:
        begin = first << BLOCK_SHIFT
        if begin > position:
            found.append((begin - position, rest))
            position = begin
            if len(found) >= limit:
                return found
        finish = min(last << BLOCK_SHIFT, end)
        found.append((finish - position, what))
        position = finish
        if len(found) >= limit:
            return found
    if position < end:
        found.append((end - position, rest))
    return found
