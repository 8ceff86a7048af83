"""Reading pages and chunks back: few requests, each object checked.

What lies close together in one object is fetched with one range request of a few MiB. What arrives
damaged is asked for again, for it may be damaged on its way only. A patched chunk is planned by
where its base is; the patches of a range lie together, too, mostly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from backends.errors import CorruptError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.holdings import describe_object
from snapshots.repository.insisting import insist
from snapshots.repository.layout import pages_key, segment_key
from snapshots.repository.pages import (
    Entry,
    Page,
    PageRef,
    Patch,
    decode_page,
    segments_of_page,
)
from snapshots.repository.segments import (
    PATCHED,
    PackedChunk,
    apply_patch,
    patch_block,
    unpack_chunk,
    unpack_patch,
)

MAX_READ = 4 << 20  # bytes of one range request, unless a single chunk is longer
MAX_GAP = 32 << 10  # bytes that are read for nothing rather than making another request


class Part(NamedTuple):
    """A chunk in a range: ``start`` is its offset in the range, ``chunk`` its number."""

    start: int
    entry: Entry
    chunk: int


class Fetched(NamedTuple):
    """The bytes of a range, and the stored patches of its chunks."""

    data: bytes
    patches: dict[int, bytes]

    def pieces(self, part: Part) -> tuple[bytes, bytes | None]:
        """What was stored for a chunk of the range, and its patch."""
        stored = self.data[part.start : part.start + part.entry.length]
        return stored, self.patches.get(part.chunk)


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

    A range has at most ``most`` bytes, patches included, unless a single chunk is longer.
    """
    ranges: list[Range] = []
    previous: tuple[str, int] | None = None
    patched = 0
    for chunk, entry in sorted(chunks, key=_place):
        end = entry.offset + entry.length
        patch = entry.stored - entry.length
        if ranges and previous == entry[:2]:
            last = ranges[-1]
            gap = entry.offset - last.offset - last.length
            longer = max(last.length, end - last.offset)
            if gap <= MAX_GAP and longer + patched + patch <= most:
                last.parts.append(Part(entry.offset - last.offset, entry, chunk))
                ranges[-1] = last._replace(length=longer)
                patched += patch
                continue
        key = segment_key(entry.push, entry.segment)
        ranges.append(Range(key, entry.offset, entry.length, [Part(0, entry, chunk)]))
        previous = entry[:2]
        patched = patch
    return ranges


def fetch_patches(store: ObjectStore, parts: Iterable[Part]) -> dict[int, bytes]:
    """The stored patches of some parts, by chunk; what is missing or cut short is left out."""
    found: dict[int, bytes] = {}
    patches = [(part.chunk, piece) for part in parts for piece in part.entry.pieces()[1:]]
    for planned in plan_ranges(patches) if patches else []:
        with suppress(NotFoundError, CorruptError):
            data = store.get_range(planned.key, planned.offset, planned.length)
            for start, piece, chunk in planned.parts:
                found[chunk] = data[start : start + piece.length]
    return found


def fetch_entry(store: ObjectStore, entry: Entry) -> tuple[bytes, bytes | None]:
    """What was stored for one chunk, and its patch. NotFoundError, CorruptError."""
    base, *patches = (
        store.get_range(segment_key(piece.push, piece.segment), piece.offset, piece.length)
        for piece in entry.pieces()
    )
    return base, patches[0] if patches else None


def missing_segment(store: ObjectStore, entry: Entry) -> str:
    """The key of the segment for whose sake a chunk cannot be had. UnavailableError."""
    keys = [segment_key(piece.push, piece.segment) for piece in entry.pieces()]
    return next((key for key in keys if store.size(key) is None), keys[0])


def unpack_entry(
    entry: Entry, stored: bytes, patch: bytes | None, sizes: tuple[int, int], where: str
) -> bytes:
    """The plain chunk of ``entry``, of what was stored for it and its patch, verified.

    ``sizes`` are the repository's chunk size and the length of this chunk, in bytes. Of a piece
    that is a patch itself (``Entry.pieces``), its plain blocks. CorruptError says which piece is
    damaged; ``where`` names the segment.
    """
    at = f"{where} at {entry.offset}"
    if entry.codec & PATCHED:
        assert entry.patch is not None
        return b"".join(content for _, content in _unpack_patch(entry.patch, stored, sizes, at))
    base = entry.base
    plain = unpack_chunk(PackedChunk(base.codec, stored, base.digest), sizes[1], at)
    if entry.patch is None:
        return plain
    at = f"{segment_key(*entry.patch[:2])} at {entry.patch.offset}"
    if patch is None:
        raise CorruptError(f"{at}: the patch is missing")
    return apply_patch(plain, _unpack_patch(entry.patch, patch, sizes, at), entry.digest, at)


def _unpack_patch(
    patch: Patch, stored: bytes, sizes: tuple[int, int], where: str
) -> list[tuple[int, bytes]]:
    packed = PackedChunk(patch.codec, stored, patch.digest)
    return unpack_patch(packed, patch.mask, patch_block(sizes[0]), sizes[1], where)


def _place(item: tuple[int, Entry]) -> tuple[str, int, int]:
    return item[1][:3]
