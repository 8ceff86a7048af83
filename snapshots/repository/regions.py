"""Arithmetic on extents and on runs of chunks.

An extent is (offset, length) in bytes; a run is (first chunk, chunk after the last). Lists of runs
are sorted, without overlaps or neighbours that touch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from snapshots.repository.layout import PAGE_ENTRIES
from snapshots.repository.segments import patch_block

Run = tuple[int, int]


def chunk_runs(extents: Iterable[tuple[int, int]], chunk_size: int, size: int) -> list[Run]:
    """The chunks that the extents touch, of a volume of ``size`` bytes."""
    runs: list[Run] = []
    for offset, length in sorted(extents):
        end_byte = min(offset + length, size)
        if offset >= end_byte:
            continue
        first, end = offset // chunk_size, -(-end_byte // chunk_size)
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], end))
        else:
            runs.append((first, end))
    return runs


def join(runs: Iterable[Run]) -> list[Run]:
    """Ascending runs that may touch or overlap, as proper ones."""
    joined: list[Run] = []
    for first, end in runs:
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((first, end))
    return joined


def intersect(one: Iterable[Run], other: Iterable[Run]) -> Iterator[Run]:
    """The chunks that are in both."""
    lefts, rights = iter(one), iter(other)
    left, right = next(lefts, None), next(rights, None)
    while left is not None and right is not None:
        first, end = max(left[0], right[0]), min(left[1], right[1])
        if first < end:
            yield first, end
        if left[1] < right[1]:
            left = next(lefts, None)
        else:
            right = next(rights, None)


def by_page(runs: Iterable[Run]) -> Iterator[tuple[int, list[Run]]]:
    """Yield (page, its runs) of every page that the runs touch, in order."""
    page, inside = -1, list[Run]()
    for first, end in runs:
        start = first
        while start < end:
            number = start // PAGE_ENTRIES
            stop = min(end, (number + 1) * PAGE_ENTRIES)
            if number != page:
                if inside:
                    yield page, inside
                page, inside = number, []
            inside.append((start, stop))
            start = stop
    if inside:
        yield page, inside


def count_chunks(runs: Iterable[Run]) -> int:
    return sum(end - first for first, end in runs)


def chunk_length(chunk: int, chunk_size: int, size: int) -> int:
    """Bytes of the chunk: the last of a volume may be shorter. 0 or less: beyond the end."""
    return min(chunk_size, size - chunk * chunk_size)


class ChangedBlocks:
    """Which blocks of chunks some extents touch. ``size`` is that of a block, in bytes."""

    def __init__(self, extents: Iterable[tuple[int, int]], chunk_size: int) -> None:
        self.size = patch_block(chunk_size)
        self.in_chunk = chunk_size // self.size
        blocks = chunk_runs(extents, self.size, 1 << 63)
        self._firsts = [first for first, _ in blocks]
        self._ends = [end for _, end in blocks]

    def mask(self, chunk: int) -> int:
        """A bit for each block of a chunk, the lowest for the first."""
        begin, stop = chunk * self.in_chunk, (chunk + 1) * self.in_chunk
        mask = 0
        for run in range(bisect_right(self._ends, begin), len(self._firsts)):
            if self._firsts[run] >= stop:
                break
            first = max(self._firsts[run], begin) - begin
            end = min(self._ends[run], stop) - begin
            mask |= (1 << end) - (1 << first)
        return mask
