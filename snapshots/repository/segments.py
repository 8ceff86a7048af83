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
"""

from __future__ import annotations

import hashlib
import struct
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


def digest_chunk(plain: bytes) -> bytes:
    return hashlib.sha256(plain).digest()


def pack_chunk(plain: bytes, digest: bytes) -> PackedChunk:
    """Compress a chunk; one that gets no smaller is stored raw."""
    compressed: bytes = lz4.block.compress(plain, store_size=False)
    if len(compressed) < len(plain):
        return PackedChunk(CODEC_LZ4, compressed, digest)
    return PackedChunk(CODEC_RAW, plain, digest)


def unpack_chunk(chunk: PackedChunk, plain_length: int, where: str) -> bytes:
    """Return the plain chunk, verified; CorruptError names ``where``."""
    plain = chunk.data
    if chunk.codec == CODEC_LZ4:
        try:
            plain = lz4.block.decompress(chunk.data, uncompressed_size=plain_length)
        except lz4.block.LZ4BlockError:
            raise CorruptError(f"{where}: the chunk does not decompress") from None
    if len(plain) != plain_length or digest_chunk(plain) != chunk.digest:
        raise CorruptError(f"{where}: the chunk does not match its SHA-256")
    return plain
