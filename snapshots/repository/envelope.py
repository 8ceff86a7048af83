"""The envelope of every record in the repository: what it is, and a digest over all of it.

::

    4 bytes   magic  b"NBDR"
    1 byte    kind (see Kind)
    1 byte    version of the kind's layout, 1
    1 byte    codec of the stored body: 1 raw, 2 lz4 block
    1 byte    cipher: 0 none; others are reserved
    8 bytes   length of the stored body in bytes, big endian
    8 bytes   length of the plain body in bytes, big endian
    32 bytes  SHA-256 of the 24 bytes before and the stored body
    n bytes   the stored body; plain, it is one msgpack map with string keys

Lengths are checked against what a record of that kind may have before anything is allocated, and
msgpack's own lengths are bounded; whatever does not fit is a CorruptError that names the object.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import lz4.block
import msgpack

from backends.errors import CorruptError, InvalidError
from snapshots.repository.layout import (
    OUTCOME_LIMIT,
    PAGE_LIMIT,
    PLAN_LIMIT,
    RECORD_LIMIT,
    SEGMENT_TARGET,
)

VERSION = 1
CODEC_RAW = 1
CODEC_LZ4 = 2
CIPHER_NONE = 0

_FIXED = struct.Struct(">4sBBBBQQ")
_MAGIC = b"NBDR"
_DIGEST_SIZE = 32
ENVELOPE_SIZE = _FIXED.size + _DIGEST_SIZE
_LZ4_MOST = 256  # one stored byte of an lz4 block cannot stand for more


class Kind(enum.IntEnum):
    """What a record is."""

    CONFIG = 1
    INTENT = 2
    OUTCOME = 3
    TOMBSTONE = 4
    POINTER = 5
    PAGE = 6
    PLAN = 7
    INDEX = 8
    ROOT = 9
    KEY = 16
    PROTECTION = 24
    DAMAGE = 25

    @property
    def limit(self) -> int:
        """Most bytes that a record of this kind may have, stored and plain."""
        limits = {
            Kind.OUTCOME: OUTCOME_LIMIT,
            Kind.ROOT: OUTCOME_LIMIT,
            Kind.PAGE: PAGE_LIMIT,
            Kind.PLAN: PLAN_LIMIT,
            Kind.INDEX: SEGMENT_TARGET,
        }
        return limits.get(self, RECORD_LIMIT)


def seal(kind: Kind, fields: Mapping[str, Any]) -> bytes:
    """Encode one record."""
    plain: bytes = msgpack.packb(fields)
    stored: bytes = lz4.block.compress(plain, store_size=False)
    codec = CODEC_LZ4
    if len(stored) >= len(plain):
        stored, codec = plain, CODEC_RAW
    fixed = _FIXED.pack(_MAGIC, kind, VERSION, codec, CIPHER_NONE, len(stored), len(plain))
    digest = hashlib.sha256(fixed)
    digest.update(stored)
    return b"".join((fixed, digest.digest(), stored))


def digest_of(record: bytes) -> bytes:
    """The 32 bytes by which a reference pins down a record's content."""
    return record[_FIXED.size : ENVELOPE_SIZE]


def unseal(kind: Kind, record: bytes, where: str) -> Fields:
    """Decode one record; ``where`` names its object in errors."""
    if len(record) < ENVELOPE_SIZE:
        raise CorruptError(f"{where}: cut short at offset {len(record)}")
    magic, found, version, codec, cipher, stored_length, plain_length = _FIXED.unpack_from(record)
    if magic != _MAGIC:
        raise CorruptError(f"{where}: not a record of a repository")
    stored = record[ENVELOPE_SIZE:]
    if stored_length != len(stored):
        raise CorruptError(f"{where}: {len(stored)} bytes of body, {stored_length} expected")
    digest = hashlib.sha256(record[: _FIXED.size])
    digest.update(stored)
    if digest.digest() != digest_of(record):
        raise CorruptError(f"{where}: the digest does not match the content")
    if found != kind:
        raise CorruptError(f"{where}: a record of kind {found} where {kind.name} was expected")
    if version != VERSION:
        raise InvalidError(f"{where}: version {version} needs a newer nbdserve")
    if cipher != CIPHER_NONE:
        raise InvalidError(f"{where}: encrypted ({cipher}); this nbdserve cannot read it")
    if plain_length > min(kind.limit, _LZ4_MOST * len(stored)):
        raise CorruptError(f"{where}: implausible length {plain_length}")
    return Fields(_unpack(_decompress(codec, stored, plain_length, where), where), where)


def _decompress(codec: int, stored: bytes, plain_length: int, where: str) -> bytes:
    plain = stored
    if codec == CODEC_LZ4:
        try:
            plain = lz4.block.decompress(stored, uncompressed_size=plain_length)
        except lz4.block.LZ4BlockError:
            raise CorruptError(f"{where}: the body does not decompress") from None
    elif codec != CODEC_RAW:
        raise InvalidError(f"{where}: codec {codec} needs a newer nbdserve")
    if len(plain) != plain_length:
        raise CorruptError(f"{where}: {len(plain)} bytes of plain body, {plain_length} expected")
    return plain


def _unpack(plain: bytes, where: str) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(
            plain,
            max_array_len=4096,
            max_map_len=64,
            max_str_len=4096,
            max_bin_len=len(plain),
            max_ext_len=0,
        )
    except (ValueError, RecursionError):
        raise CorruptError(f"{where}: the body is not msgpack") from None
    if not isinstance(fields, dict):
        raise CorruptError(f"{where}: the body is not a map")
    return fields


class Fields:
    """A decoded map whose fields are checked as they are taken; unknown ones are ignored."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self._fields = fields
        self.where = where

    def integer(self, name: str, low: int, high: int) -> int:
        """The integer ``name``, between ``low`` and ``high`` inclusive."""
        value = self._fields.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name)
        return value

    def number(self, name: str) -> float:
        value = self._fields.get(name)
        if not isinstance(value, int | float) or not abs(value) < 1e12:
            raise self._wrong(name)
        return float(value)

    def text(self, name: str) -> str:
        value = self._fields.get(name)
        if not isinstance(value, str) or not value.isprintable():
            raise self._wrong(name)
        return value

    def boolean(self, name: str) -> bool:
        value = self._fields.get(name)
        if not isinstance(value, bool):
            raise self._wrong(name)
        return value

    def binary(self, name: str) -> bytes:
        value = self._fields.get(name)
        if not isinstance(value, bytes):
            raise self._wrong(name)
        return value

    def push(self, name: str) -> str:
        value = self.binary(name)
        if len(value) != 16:
            raise self._wrong(name)
        return value.hex()

    def pushes(self, name: str) -> list[str]:
        """A binary field that holds push ids of 16 bytes one after another."""
        value = self.binary(name)
        if len(value) % 16:
            raise self._wrong(name)
        return [value[start : start + 16].hex() for start in range(0, len(value), 16)]

    def has(self, name: str) -> bool:
        """Tell whether ``name`` is there and not nil."""
        return self._fields.get(name) is not None

    def maps(self, name: str) -> list[Fields]:
        value = self._fields.get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(name)
        return [Fields(item, self.where) for item in value]

    def texts(self, name: str) -> list[str]:
        value = self._fields.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name)
        return value

    def _wrong(self, name: str) -> CorruptError:
        return CorruptError(f"{self.where}: the field {name!r} is missing or wrong")
