"""Pages: the map of a snapshot, cut into fixed regions, and the references to them.

A page describes PAGE_ENTRIES chunks that follow one another in the volume, one entry of fixed size
each; an entry that is all zero is a hole. Entries name the push of their segment by its place in
the page's own table, so that a page means the same whichever snapshot refers to it. The chunks
that are patched (segments.py) have the codec's highest bit set and a patch in a second list, by
number. The page's
references, in the root of a snapshot, are of fixed size too, ascending, without the pages
that are all holes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
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
from snapshots.repository.segments import PATCHED, SEGMENT_HEADER_SIZE, patch_block

# place in the table of pushes, segment, offset, stored length, codec, cipher, SHA-256 when plain
_ENTRY = struct.Struct(">HIIIBB32s")
_PLACE = struct.Struct(">HI4xI34x")  # of an entry: place, segment, stored length
_HOLE = bytes(_ENTRY.size)
# number of the entry; place, segment, offset, stored length, codec, cipher; mask of the blocks,
# SHA-256 of mask and blocks, SHA-256 of the plain chunk below
_PATCH = struct.Struct(">HHIIIBBQ32s32s")
_PATCH_PLACE = struct.Struct(">2xHI4xI74x")
# page, place in the table of pushes, object, offset, length, chunks, stored bytes, digest
_REFERENCE = struct.Struct(">IIIIIIQ32s")


class Patch(NamedTuple):
    """Where the patch of a chunk is, as in :class:`Entry`; ``mask`` has the blocks in it.

    ``digest`` is that of mask and blocks, ``below`` that of the plain chunk as it was stored.
    """

    push: str
    segment: int
    offset: int
    length: int
    codec: int
    digest: bytes
    mask: int
    below: bytes


class Entry(NamedTuple):
    """Where one chunk is. ``offset`` and ``length`` are bytes of its segment.

    ``digest`` is that of the plain chunk, with the ``patch`` if there is one. What has
    :data:`PATCHED` in its codec is not a chunk, but the piece that is its patch.
    """

    push: str
    segment: int
    offset: int
    length: int
    codec: int
    digest: bytes
    patch: Patch | None = None

    @property
    def base(self) -> Entry:
        """The chunk as it was stored, without the patch."""
        if self.patch is None:
            return self
        return self._replace(digest=self.patch.below, patch=None)

    @property
    def stored(self) -> int:
        """Bytes in segments."""
        return self.length if self.patch is None else sum(piece.length for piece in self.pieces())

    def pieces(self) -> tuple[Entry, ...]:
        """What it needs of segments: its base, and the patch."""
        if self.patch is None or self.codec & PATCHED:
            return (self,)
        return self.base, patch_piece(self.patch)

    def moved(self, places: Mapping[Entry, Entry]) -> Entry:
        """The same, with the pieces that are in ``places`` there."""
        base = places.get(self.base, self.base)
        if self.patch is None:
            return base
        piece = patch_piece(self.patch)
        push, segment, offset = places.get(piece, piece)[:3]
        patch = self.patch._replace(push=push, segment=segment, offset=offset)
        return base._replace(digest=self.digest, patch=patch)


def patch_piece(patch: Patch) -> Entry:
    """Where a patch is, as a piece."""
    return Entry(*patch[:4], patch.codec | PATCHED, patch.digest, patch)


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
    entries, patches = bytearray(), bytearray()
    for number, entry in enumerate(page):
        if entry is None:
            entries += _HOLE
            continue
        codec = entry.codec
        if entry.patch is not None:
            codec |= PATCHED
            push, segment, offset, length, how, digest, mask, below = entry.patch
            patches += _PATCH.pack(
                number, pushes.setdefault(push, len(pushes)), segment, offset, length, how,
                CIPHER_NONE, mask, digest, below,
            )  # fmt: skip
        place = pushes.setdefault(entry.push, len(pushes))
        entries += _ENTRY.pack(
            place, entry.segment, entry.offset, entry.length, codec, CIPHER_NONE, entry.digest
        )
    table = b"".join(map(bytes.fromhex, pushes))
    fields = {"page": index, "pushes": table, "entries": bytes(entries)}
    if patches:
        fields["patches"] = bytes(patches)
    return seal(Kind.PAGE, fields)


def decode_page(record: bytes, ref: PageRef, chunk_size: int, where: str) -> Page:
    """Decode and check the page that ``ref`` refers to; raises CorruptError."""
    pushes, entries, packed = _unseal_page(record, ref, where)
    patches = _decode_patches(pushes, packed, chunk_size, where) if packed else {}
    page: Page = []
    for number, raw in enumerate(_ENTRY.iter_unpack(entries)):
        place, segment, offset, length, codec, cipher, digest = raw
        if length == 0:
            start = number * _ENTRY.size
            if entries[start : start + _ENTRY.size] != _HOLE:
                raise CorruptError(f"{where}: entry {number} is no proper hole")
            page.append(None)
            continue
        patch = None
        if codec & PATCHED:
            codec -= PATCHED
            patch = patches.pop(number, None)
            if patch is None:
                raise CorruptError(f"{where}: entry {number} has no patch")
        _check_piece(f"{where}: entry {number}", codec, cipher, offset, length, chunk_size)
        if place >= len(pushes):
            raise CorruptError(f"{where}: entry {number} is out of bounds")
        page.append(Entry(pushes[place], segment, offset, length, codec, digest, patch))
    if patches:
        raise CorruptError(f"{where}: {len(patches)} patches belong to no chunk")
    return page


def _decode_patches(
    pushes: list[str], packed: bytes, chunk_size: int, where: str
) -> dict[int, Patch]:
    blocks = -(-chunk_size // patch_block(chunk_size))
    patches: dict[int, Patch] = {}
    for (
        number,
        place,
        segment,
        offset,
        length,
        codec,
        cipher,
        mask,
        digest,
        below,
    ) in _PATCH.iter_unpack(packed):
        what = f"{where}: the patch of entry {number}"
        _check_piece(what, codec, cipher, offset, length, chunk_size)
        if place >= len(pushes) or not 0 < mask < 1 << blocks or number in patches:
            raise CorruptError(f"{what} is out of bounds")
        patches[number] = Patch(pushes[place], segment, offset, length, codec, digest, mask, below)
    return patches


def _check_piece(
    what: str, codec: int, cipher: int, offset: int, length: int, chunk_size: int
) -> None:
    if cipher != CIPHER_NONE:
        raise InvalidError(f"{what}: encrypted ({cipher}); this nbdserve cannot read it")
    if codec not in (CODEC_RAW, CODEC_LZ4):
        raise InvalidError(f"{what}: codec {codec} needs a newer nbdserve")
    if (
        not 0 < length <= chunk_size
        or offset < SEGMENT_HEADER_SIZE
        or offset + length > SEGMENT_LIMIT
    ):
        raise CorruptError(f"{what} is out of bounds")


def segments_of_page(record: bytes, ref: PageRef, where: str) -> dict[tuple[str, int], int]:
    """The segments, as (push, number), that a page needs, and how many bytes of each."""
    pushes, entries, patches = _unseal_page(record, ref, where)
    found: dict[tuple[int, int], int] = {}
    for place, segment, length in chain(
        _PLACE.iter_unpack(entries), _PATCH_PLACE.iter_unpack(patches)
    ):
        if length:
            found[place, segment] = found.get((place, segment), 0) + length
    if any(place >= len(pushes) for place, _ in found):
        raise CorruptError(f"{where}: an entry is out of bounds")
    return {(pushes[place], segment): length for (place, segment), length in found.items()}


def _unseal_page(record: bytes, ref: PageRef, where: str) -> tuple[list[str], bytes, bytes]:
    """The table of pushes, the packed entries and the packed patches."""
    if digest_of(record) != ref.digest:
        raise CorruptError(f"{where}: it is not the page that the snapshot refers to")
    fields = unseal(Kind.PAGE, record, where)
    fields.integer("page", ref.page, ref.page)
    pushes = fields.pushes("pushes")
    entries = fields.binary("entries")
    if len(entries) != PAGE_ENTRIES * _ENTRY.size:
        raise CorruptError(f"{where}: {len(entries)} bytes of entries")
    patches = fields.binary("patches") if fields.has("patches") else b""
    if len(patches) % _PATCH.size:
        raise CorruptError(f"{where}: {len(patches)} bytes of patches")
    return pushes, entries, patches


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
