"""Arithmetic on extents and on runs of chunks.

An extent is (offset, length) in bytes; a run is (first chunk, chunk after the last). Lists of runs
are sorted, without overlaps or neighbours that touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from snapshots.repository.layout import PAGE_ENTRIES

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
