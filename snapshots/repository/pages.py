"""Pages: the map of a snapshot, cut into fixed regions, and the references to them.

A page describes PAGE_ENTRIES chunks that follow one another in the volume, one entry of fixed size
each; an entry that is all zero is a hole. Entries name the push of their segment by its place in
the page's own table, so that a page means the same whichever snapshot refers to it. The page's
references, in the root of a snapshot, are of fixed size too, ascending, without the pages
that are all holes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from backends.errors import CorruptError, InvalidError
from snapshots.repository.envelope import (
    CIPHER_NONE,
    CODEC_LZ4,
    CODEC_RAW,
    ENVELOPE_SIZE,
    Fields,
    Kind,
    digest_of,
    seal,
    unseal,
)
from snapshots.repository.layout import PAGE_ENTRIES, PAGE_LIMIT, SEGMENT_LIMIT
from snapshots.repository.segments import SEGMENT_HEADER_SIZE

# place in the table of pushes, segment, offset, stored length, codec, cipher, SHA-256 when plain
_ENTRY = struct.Struct(">HIIIBB32s")
_PLACE = struct.Struct(">HI4xI34x")  # of an entry: place, segment, stored length
_HOLE = bytes(_ENTRY.size)
# page, place in the table of pushes, object, offset, length, chunks, stored bytes, digest
_REFERENCE = struct.Struct(">IIIIIIQ32s")


class Entry(NamedTuple):
    """Where one chunk is. ``offset`` and ``length`` are bytes of its segment."""

    push: str
    segment: int
    offset: int
    length: int
    codec: int
    digest: bytes


#: One page: an entry, or None for a hole, for each of its PAGE_ENTRIES chunks.
Page = list[Entry | None]


class PageRef(NamedTuple):
    """Where page ``page`` is, and what it holds: chunks that are no holes, and their bytes."""

    page: int
    push: str
    number: int
    offset: int
    length: int
    chunks: int
    stored: int
    digest: bytes


def encode_page(index: int, page: Page) -> bytes:
    """The record of a page."""
    pushes: dict[str, int] = {}
    entries = bytearray()
    for entry in page:
        if entry is None:
            entries += _HOLE
        else:
            place = pushes.setdefault(entry.push, len(pushes))
            entries += _ENTRY.pack(
                place, entry.segment, entry.offset, entry.length, entry.codec, CIPHER_NONE,
                entry.digest,
            )  # fmt: skip
    table = b"".join(map(bytes.fromhex, pushes))
    return seal(Kind.PAGE, {"page": index, "pushes": table, "entries": bytes(entries)})


def decode_page(record: bytes, ref: PageRef, chunk_size: int, where: str) -> Page:
    """Decode and check the page that ``ref`` refers to; raises CorruptError."""
    pushes, entries = _unseal_page(record, ref, where)
    page: Page = []
    for number, raw in enumerate(_ENTRY.iter_unpack(entries)):
        place, segment, offset, length, codec, cipher, digest = raw
        if length == 0:
            start = number * _ENTRY.size
            if entries[start : start + _ENTRY.size] != _HOLE:
                raise CorruptError(f"{where}: entry {number} is no proper hole")
            page.append(None)
            continue
        if cipher != CIPHER_NONE:
            raise InvalidError(f"{where}: encrypted ({cipher}); this nbdserve cannot read it")
        if codec not in (CODEC_RAW, CODEC_LZ4):
            raise InvalidError(f"{where}: codec {codec} needs a newer nbdserve")
        if (
            place >= len(pushes)
            or length > chunk_size
            or offset < SEGMENT_HEADER_SIZE
            or offset + length > SEGMENT_LIMIT
        ):
            raise CorruptError(f"{where}: entry {number} is out of bounds")
        page.append(Entry(pushes[place], segment, offset, length, codec, digest))
    return page


def segments_of_page(record: bytes, ref: PageRef, where: str) -> dict[tuple[str, int], int]:
    """The segments, as (push, number), that a page needs, and how many bytes of each."""
    pushes, entries = _unseal_page(record, ref, where)
    found: dict[tuple[int, int], int] = {}
    for place, segment, length in _PLACE.iter_unpack(entries):
        if length:
            found[place, segment] = found.get((place, segment), 0) + length
    if any(place >= len(pushes) for place, _ in found):
        raise CorruptError(f"{where}: an entry is out of bounds")
    return {(pushes[place], segment): length for (place, segment), length in found.items()}


def _unseal_page(record: bytes, ref: PageRef, where: str) -> tuple[list[str], bytes]:
    """The table of pushes and the packed entries."""
    if digest_of(record) != ref.digest:
        raise CorruptError(f"{where}: it is not the page that the snapshot refers to")
    fields = unseal(Kind.PAGE, record, where)
    fields.integer("page", ref.page, ref.page)
    pushes = fields.pushes("pushes")
    entries = fields.binary("entries")
    if len(entries) != PAGE_ENTRIES * _ENTRY.size:
        raise CorruptError(f"{where}: {len(entries)} bytes of entries")
    return pushes, entries


class PageTable:
    """The page references of one snapshot, ascending; packed, 64 bytes each."""

    def __init__(self) -> None:
        self._pushes: dict[str, int] = {}
        self._packed = bytearray()

    def append(self, ref: PageRef) -> None:
        place = self._pushes.setdefault(ref.push, len(self._pushes))
        self._packed += _REFERENCE.pack(
            ref.page, place, ref.number, ref.offset, ref.length, ref.chunks, ref.stored, ref.digest
        )

    def __len__(self) -> int:
        return len(self._packed) // _REFERENCE.size

    def __iter__(self) -> Iterator[PageRef]:
        pushes = list(self._pushes)
        for index, place, number, offset, length, chunks, stored, digest in _REFERENCE.iter_unpack(
            self._packed
        ):
            yield PageRef(index, pushes[place], number, offset, length, chunks, stored, digest)

    def find(self, page: int) -> PageRef | None:
        """The reference to a page; None when it is all holes."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if _REFERENCE.unpack_from(self._packed, middle * _REFERENCE.size)[0] < page:
                low = middle + 1
            else:
                high = middle
        if low == len(self):
            return None
        found, place, *rest = _REFERENCE.unpack_from(self._packed, low * _REFERENCE.size)
        return PageRef(found, list(self._pushes)[place], *rest) if found == page else None

    def encode(self) -> dict[str, bytes]:
        """The fields ``pushes`` and ``pages`` of a root."""
        pushes = b"".join(map(bytes.fromhex, self._pushes))
        return {"pushes": pushes, "pages": bytes(self._packed)}

    @classmethod
    def decode(cls, fields: Fields, pages: int) -> PageTable:
        """Decode and check the fields of a root whose volume has ``pages`` pages."""
        table = cls()
        pushes = fields.pushes("pushes")
        packed = fields.binary("pages")
        if len(packed) % _REFERENCE.size or len(set(pushes)) != len(pushes):
            raise CorruptError(f"{fields.where}: its page references are damaged")
        previous = -1
        for index, place, _, _, length, chunks, stored, _ in _REFERENCE.iter_unpack(packed):
            if (
                not previous < index < pages
                or place >= len(pushes)
                or not ENVELOPE_SIZE < length <= PAGE_LIMIT
                or not 0 < chunks <= PAGE_ENTRIES
                or not chunks <= stored <= chunks * SEGMENT_LIMIT
            ):
                raise CorruptError(f"{fields.where}: the reference after page {previous} is wrong")
            previous = index
        table._pushes = {push: place for place, push in enumerate(pushes)}
        table._packed = bytearray(packed)
        return table


def pair_up(
    table: Iterable[PageRef], other: Iterable[PageRef]
) -> Iterator[tuple[PageRef, PageRef | None]]:
    """Yield every reference of ``table`` with the one of ``other`` for the same page."""
    others = iter(other)
    candidate = next(others, None)
    for ref in table:
        while candidate is not None and candidate.page < ref.page:
            candidate = next(others, None)
        same = candidate is not None and candidate.page == ref.page
        yield ref, candidate if same else None
