"""The work on data of a repack: copy chunks to new segments, and write pages anew.

Chunks are fetched as a restore does it, verified, and appended as they are stored. One that is
damaged stays where it is, and so does the segment it is in: nothing gets worse.
"""

from __future__ import annotations

from collections.abc import Iterable

import lz4.block

from backends.errors import CorruptError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.envelope import CODEC_LZ4, digest_of
from snapshots.repository.layout import PAGES_TARGET, SEGMENT_TARGET, pages_key, segment_key
from snapshots.repository.pages import Entry, PageRef, encode_page
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import Range, plan_ranges, read_page
from snapshots.repository.segments import (
    PATCHED,
    SEGMENT_HEADER_SIZE,
    digest_chunk,
    digest_patch,
    segment_header,
)
from snapshots.repository.steps import Move

THREADS = 4


def move(store: ObjectStore, chunk_size: int, step: Move) -> dict[tuple[str, int, int], PageRef]:
    """Do it; returns the new references by the place (push, number, offset) of the old ones.

    Memory: one segment, THREADS ranges of a few MiB, one object of pages, and some 200 bytes for
    each chunk that is copied.
    """
    with Crew(THREADS, "repack") as crew, leaving_promptly(store):
        moved = _move_chunks(store, chunk_size, step, crew)
        return _move_pages(store, chunk_size, step, moved, crew)


def _move_chunks(store: ObjectStore, chunk_size: int, step: Move, crew: Crew) -> dict[Entry, Entry]:
    def fetch(planned: Range) -> list[tuple[Entry, bytes]]:
        try:
            data = store.get_range(planned.key, planned.offset, planned.length)
        except (NotFoundError, CorruptError):
            return []
        pieces = ((part.entry, data[part.start :][: part.entry.length]) for part in planned.parts)
        return [(entry, stored) for entry, stored in pieces if _is_sound(entry, stored, chunk_size)]

    moved: dict[Entry, Entry] = {}
    number, segment = 0, bytearray()
    for chunks in crew.ordered(fetch, plan_ranges(enumerate(step.entries)), 2 * THREADS):
        for entry, stored in chunks:
            if segment and len(segment) + len(stored) > SEGMENT_TARGET:
                store.put(segment_key(step.push, number), segment)
                number, segment = number + 1, bytearray()
            if not segment:
                segment += segment_header(step.push, number, indexed=False)
            moved[entry] = entry._replace(push=step.push, segment=number, offset=len(segment))
            segment += stored
    if len(segment) > SEGMENT_HEADER_SIZE:
        store.put(segment_key(step.push, number), segment)
    return moved


def _move_pages(
    store: ObjectStore, chunk_size: int, step: Move, moved: dict[Entry, Entry], crew: Crew
) -> dict[tuple[str, int, int], PageRef]:
    def rewrite(ref: PageRef) -> tuple[PageRef, bytes]:
        page = read_page(store, chunk_size, ref)
        return ref, encode_page(ref.page, [entry and entry.moved(moved) for entry in page])

    refs: dict[tuple[str, int, int], PageRef] = {}
    number, pages = 0, bytearray()
    for ref, record in crew.ordered(rewrite, _by_place(step.refs), 2 * THREADS):
        if pages and len(pages) + len(record) > PAGES_TARGET:
            store.put(pages_key(step.push, number), pages)
            number, pages = number + 1, bytearray()
        refs[ref.push, ref.number, ref.offset] = ref._replace(
            push=step.push,
            number=number,
            offset=len(pages),
            length=len(record),
            digest=digest_of(record),
        )
        pages += record
    if pages:
        store.put(pages_key(step.push, number), pages)
    return refs


def _by_place(refs: list[PageRef]) -> Iterable[PageRef]:
    return sorted(refs, key=lambda ref: ref[:4])


def _is_sound(piece: Entry, stored: bytes, chunk_size: int) -> bool:
    plain = stored
    if piece.codec & ~PATCHED == CODEC_LZ4:
        try:
            plain = lz4.block.decompress(stored, uncompressed_size=chunk_size)
        except lz4.block.LZ4BlockError:
            return False
    if piece.codec & PATCHED:
        assert piece.patch is not None
        return digest_patch(piece.patch.mask, plain) == piece.digest
    return digest_chunk(plain) == piece.digest
