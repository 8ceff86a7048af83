"""Records: msgpack with a version and a check, as manifests and the like are stored.

::

    8 bytes   magic  b"nbdserve"
    2 bytes   version of the record's kind, big endian
    4 bytes   length of the payload in bytes
    4 bytes   CRC-32 of everything else: magic, version, length, payload
    n bytes   payload: one msgpack map

A record is read whole or refused: CorruptError names the file and the offset of what is wrong.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack

from backends.errors import CorruptError

_HEADER = struct.Struct(">8sHII")
_MAGIC = b"nbdserve"


def pack_record(version: int, payload: dict[str, Any]) -> bytes:
    """Encode one record."""
    body: bytes = msgpack.packb(payload)
    check = zlib.crc32(body, zlib.crc32(struct.pack(">8sHI", _MAGIC, version, len(body))))
    return _HEADER.pack(_MAGIC, version, len(body), check) + body


def unpack_record(content: bytes, version: int, where: str) -> dict[str, Any]:
    """Decode one record of at most ``version``; ``where`` names its file in errors."""
    if len(content) < _HEADER.size:
        raise CorruptError(f"{where}: cut short at offset {len(content)}")
    magic, found, length, check = _HEADER.unpack_from(content)
    body = content[_HEADER.size :]
    if magic != _MAGIC:
        raise CorruptError(f"{where}: not a record of nbdserve at offset 0")
    if length != len(body):
        raise CorruptError(f"{where}: {len(body)} bytes of payload at offset 18, {length} expected")
    if zlib.crc32(body, zlib.crc32(struct.pack(">8sHI", magic, found, length))) != check:
        raise CorruptError(f"{where}: checksum mismatch at offset 18")
    if found < 1:
        raise CorruptError(f"{where}: version {found} never was one, at offset 8")
    if found > version:
        raise CorruptError(f"{where}: version {found} is newer than this nbdserve understands")
    try:
        payload = msgpack.unpackb(body)
    except ValueError as error:
        raise CorruptError(f"{where}: payload at offset 18 is not msgpack") from error
    if not isinstance(payload, dict):
        raise CorruptError(f"{where}: payload at offset 18 is not a map")
    return payload
