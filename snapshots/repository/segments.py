"""Segments and the chunks in them.

A segment is a header of 32 bytes, then the stored bytes of chunks, one directly after another::

    8 bytes   magic  b"NBDSEGMT"
    1 byte    version, 1
    3 bytes   zero
    4 bytes   number of the segment in its push, big endian
    16 bytes  push id

The header follows from the segment's key, and every stored chunk is pinned by the digest in its
entry, so no byte of a segment goes unchecked.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

import lz4.block

from backends.errors import CorruptError
from snapshots.repository.envelope import CODEC_LZ4, CODEC_RAW

_HEADER = struct.Struct(">8sB3xI16s")
SEGMENT_HEADER_SIZE = _HEADER.size


class PackedChunk(NamedTuple):
    """A chunk as it is stored. ``digest`` is the SHA-256 of the plain chunk."""

    codec: int
    data: bytes
    digest: bytes


def segment_header(push: str, number: int) -> bytes:
    return _HEADER.pack(b"NBDSEGMT", 1, number, bytes.fromhex(push))


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
