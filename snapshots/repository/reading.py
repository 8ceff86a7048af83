"""Reading pages and chunks back: few requests, each object checked.

What lies close together in one object is fetched with one range request of a few MiB. What arrives
damaged is asked for again, for it may be damaged on its way only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from backends.objects import ObjectStore
from snapshots.repository.holdings import describe_object
from snapshots.repository.insisting import insist
from snapshots.repository.layout import pages_key, segment_key
from snapshots.repository.pages import Entry, Page, PageRef, decode_page, segments_of_page

MAX_READ = 4 << 20  # bytes of one range request, unless a single chunk is longer
MAX_GAP = 32 << 10  # bytes that are read for nothing rather than making another request


class Part(NamedTuple):
    """A chunk in a range: ``start`` is its offset in the range, ``chunk`` its number."""

    start: int
    entry: Entry
    chunk: int


class Range(NamedTuple):
    """One range request and what is in it."""

    key: str
    offset: int
    length: int
    parts: list[Part]


def read_page(store: ObjectStore, chunk_size: int, ref: PageRef) -> Page:
    """Fetch and check one page; CorruptError or NotFoundError name the object."""
    return read_pages(store, chunk_size, [ref])[0][1]


def read_pages(
    store: ObjectStore, chunk_size: int, refs: list[PageRef]
) -> list[tuple[PageRef, Page]]:
    """Fetch pages that :func:`group_pages` put together, with one request."""

    def attempt() -> list[tuple[PageRef, Page]]:
        return [
            (ref, decode_page(record, ref, chunk_size, where))
            for ref, record, where in _fetch_pages(store, refs)
        ]

    return insist(attempt)


def read_segments_of(store: ObjectStore, refs: list[PageRef]) -> dict[tuple[str, int], int]:
    """The segments, as (push, number), that pages that belong together need; bytes of each."""

    def attempt() -> dict[tuple[str, int], int]:
        found: dict[tuple[str, int], int] = {}
        for ref, record, where in _fetch_pages(store, refs):
            for segment, length in segments_of_page(record, ref, where).items():
                found[segment] = found.get(segment, 0) + length
        return found

    return insist(attempt)


def _fetch_pages(store: ObjectStore, refs: list[PageRef]) -> Iterator[tuple[PageRef, bytes, str]]:
    first = refs[0]
    key = pages_key(first.push, first.number)
    length = refs[-1].offset + refs[-1].length - first.offset
    data = store.get_range(key, first.offset, length)
    for ref in refs:
        start = ref.offset - first.offset
        record = data[start : start + ref.length]
        yield ref, record, f"{describe_object(store, key)} at {ref.offset}"


def group_pages(refs: Iterable[PageRef], most: int) -> Iterator[list[PageRef]]:
    """Cut ``refs`` into groups, each of pages that follow one another in one object."""
    group: list[PageRef] = []
    for ref in refs:
        if group and (
            len(group) == most
            or (ref.push, ref.number) != (group[0].push, group[0].number)
            or ref.offset != group[-1].offset + group[-1].length
        ):
            yield group
            group = []
        group.append(ref)
    if group:
        yield group


def plan_ranges(chunks: Iterable[tuple[int, Entry]], most: int = MAX_READ) -> list[Range]:
    """Plan how to fetch the chunks (number, entry), in the order of the segments.

    A range has at most ``most`` bytes, unless a single chunk is longer.
    """
    ranges: list[Range] = []
    previous: tuple[str, int] | None = None
    for chunk, entry in sorted(chunks, key=_place):
        end = entry.offset + entry.length
        if ranges and previous == entry[:2]:
            last = ranges[-1]
            gap = entry.offset - last.offset - last.length
            longer = max(last.length, end - last.offset)
            if gap <= MAX_GAP and longer <= most:
                last.parts.append(Part(entry.offset - last.offset, entry, chunk))
                ranges[-1] = last._replace(length=longer)
                continue
        key = segment_key(entry.push, entry.segment)
        ranges.append(Range(key, entry.offset, entry.length, [Part(0, entry, chunk)]))
        previous = entry[:2]
    return ranges


def _place(item: tuple[int, Entry]) -> tuple[str, int, int]:
    return item[1][:3]
