"""Segments and the chunks in them.

A segment is a header of 32 bytes, then the stored bytes of chunks, one directly after another, then
an index of these chunks: a record, its length in 4 bytes, and ``NBDINDEX``. The index is for a push
that goes on where another was killed; whoever reads a snapshot needs none. The header::

    8 bytes   magic  b"NBDSEGMT"
    1 byte    version, 1
    1 byte    255 when an index is at the end, else 0
    2 bytes   zero
    4 bytes   number of the segment in its push, big endian
    16 bytes  push id

The header follows from the segment's key, and every stored chunk is pinned by the digest in its
entry, so no byte of it that a snapshot needs goes unchecked.

Where little of a chunk changed, a **patch** is stored in its place: the blocks that are not as in
the chunk that was stored before, its base, one after another. A mask has a bit for each block
of the chunk, the lowest for the first, and the digest covers mask and blocks. In an index a patch
has the codec's highest bit set.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

import lz4.block

from backends.errors import CorruptError
from snapshots.repository.envelope import (
    CODEC_LZ4,
    CODEC_RAW,
    ENVELOPE_SIZE,
    Kind,
    seal,
    unseal,
)

_HEADER = struct.Struct(">8sBB2xI16s")
SEGMENT_HEADER_SIZE = _HEADER.size

# number of the chunk in the volume, stored length, codec, SHA-256 when plain
_INDEXED = struct.Struct(">QIB32s")
INDEXED_CHUNK_SIZE = _INDEXED.size
PATCHED = 128  # bit of a codec
_MOST_BLOCKS = 64  # of a chunk: bits of a mask
_SMALLEST_BLOCK = 4 << 10
_FOOTER = struct.Struct(">I8s")
INDEX_FOOTER_SIZE = _FOOTER.size
_INDEX_MAGIC = b"NBDINDEX"


class PackedChunk(NamedTuple):
    """A chunk as it is stored. ``digest`` is the SHA-256 of the plain chunk."""

    codec: int
    data: bytes
    digest: bytes


class IndexedChunk(NamedTuple):
    """A chunk in an index. ``number`` is its place in the volume, ``offset`` in the segment."""

    number: int
    offset: int
    length: int
    codec: int
    digest: bytes


def index_entry(number: int, chunk: PackedChunk) -> bytes:
    """What the index of a segment says of a chunk; ``number`` is its place in the volume."""
    return _INDEXED.pack(number, len(chunk.data), chunk.codec, chunk.digest)


def segment_index(entries: bytes | bytearray) -> bytes:
    """The end of a segment, with the index entries of its chunks in the order they have there."""
    record = seal(Kind.INDEX, {"chunks": bytes(entries)})
    return record + _FOOTER.pack(len(record), _INDEX_MAGIC)


def index_length(tail: bytes, size: int, where: str) -> int:
    """Bytes of the index of a segment of ``size`` bytes that ends with ``tail``."""
    if len(tail) < INDEX_FOOTER_SIZE:
        raise CorruptError(f"{where}: cut short at offset {size}")
    length, magic = _FOOTER.unpack(tail[-INDEX_FOOTER_SIZE:])
    if magic != _INDEX_MAGIC or not (
        ENVELOPE_SIZE < length <= size - SEGMENT_HEADER_SIZE - INDEX_FOOTER_SIZE
    ):
        raise CorruptError(f"{where}: it has no index")
    found: int = length
    return found


def decode_index(record: bytes, where: str) -> list[IndexedChunk]:
    """The chunks of a segment, by offset."""
    entries = unseal(Kind.INDEX, record, where).binary("chunks")
    if len(entries) % _INDEXED.size:
        raise CorruptError(f"{where}: its index is damaged")
    chunks, offset = [], SEGMENT_HEADER_SIZE
    for number, length, codec, digest in _INDEXED.iter_unpack(entries):
        chunks.append(IndexedChunk(number, offset, length, codec, digest))
        offset += length
    return chunks


def segment_header(push: str, number: int, *, indexed: bool = True) -> bytes:
    return _HEADER.pack(b"NBDSEGMT", 1, 255 if indexed else 0, number, bytes.fromhex(push))


def digest_chunk(plain: bytes | bytearray) -> bytes:
    return hashlib.sha256(plain).digest()


def pack_chunk(plain: bytes, digest: bytes) -> PackedChunk:
    """Compress a chunk; one that gets no smaller is stored raw."""
    compressed: bytes = lz4.block.compress(plain, store_size=False)
    if len(compressed) < len(plain):
        return PackedChunk(CODEC_LZ4, compressed, digest)
    return PackedChunk(CODEC_RAW, plain, digest)


def unpack_chunk(chunk: PackedChunk, plain_length: int, where: str) -> bytes:
    """Return the plain chunk, verified; CorruptError names ``where``."""
    plain = _decompress(chunk.codec, chunk.data, plain_length)
    if plain is None:
        raise CorruptError(f"{where}: the chunk does not decompress")
    if len(plain) != plain_length or digest_chunk(plain) != chunk.digest:
        raise CorruptError(f"{where}: the chunk does not match its SHA-256")
    return plain


def _decompress(codec: int, data: bytes, plain_length: int) -> bytes | None:
    if codec != CODEC_LZ4:
        return data
    try:
        plain: bytes = lz4.block.decompress(data, uncompressed_size=plain_length)
    except lz4.block.LZ4BlockError:
        return None
    return plain


def patch_block(chunk_size: int) -> int:
    """Bytes of the blocks of which a patch has some."""
    return max(_SMALLEST_BLOCK, chunk_size // _MOST_BLOCKS)


def pack_patch(plain: bytes, mask: int, block: int) -> PackedChunk:
    """The blocks in ``mask`` of a chunk."""
    blocks = b"".join([plain[start:end] for start, end in _runs(mask, block, len(plain))])
    packed = pack_chunk(blocks, digest_patch(mask, blocks))
    return packed._replace(codec=packed.codec | PATCHED)


def digest_patch(mask: int, blocks: bytes) -> bytes:
    """The SHA-256 that pins down a patch."""
    digest = hashlib.sha256(mask.to_bytes(8, "big"))
    digest.update(blocks)
    return digest.digest()


def unpack_patch(
    patch: PackedChunk, mask: int, block: int, plain_length: int, where: str
) -> list[tuple[int, bytes]]:
    """The runs of blocks (offset in the chunk, content) of a patch, verified. CorruptError.

    Its codec has no :data:`PATCHED`. ``plain_length`` is that of the chunk.
    """
    runs = list(_runs(mask, block, plain_length))
    length = sum(end - start for start, end in runs)
    blocks = _decompress(patch.codec, patch.data, length)
    if blocks is None or len(blocks) != length or digest_patch(mask, blocks) != patch.digest:
        raise CorruptError(f"{where}: the patch does not match its SHA-256")
    found, position = [], 0
    for start, end in runs:
        found.append((start, blocks[position : position + end - start]))
        position += end - start
    return found


def apply_patch(base: bytes, runs: list[tuple[int, bytes]], digest: bytes, where: str) -> bytes:
    """The plain chunk that a patch makes of its base, verified. CorruptError."""
    plain = bytearray(base)
    for start, content in runs:
        plain[start : start + len(content)] = content
    if digest_chunk(plain) != digest:
        raise CorruptError(f"{where}: the patch does not belong to the chunk below it")
    return bytes(plain)


def _runs(mask: int, block: int, length: int) -> Iterator[tuple[int, int]]:
    """The (start, end) in a chunk of ``length`` bytes of the runs of blocks in ``mask``."""
    position = 0
    while mask:
        skipped = (mask & -mask).bit_length() - 1
        mask >>= skipped
        ones = (~mask & (mask + 1)).bit_length() - 1
        mask >>= ones
        start = position + skipped
        position = start + ones
        yield min(start * block, length), min(position * block, length)
