"""Sealing: what an object looks like in the bucket of an encrypted repository.

Every object but ``config`` and those under ``keys/`` is its length (8 bytes) and its content, cut
into frames; a frame is sealed with AES-256-GCM::

    12 bytes   nonce, random
    n bytes    ciphertext; 16,356 bytes of a full frame
    16 bytes   tag, over the ciphertext and the frame's number (8 bytes, big endian)

A full frame is stored in 16 KiB, so that any part of a segment can be read alone, at the price of
the frames around it. The last frame of a segment or an object of pages ends with the content, so
that a listing tells its length. All others are filled up with zeros, to one frame of 1, 2, 4 or
8 KiB or else to full frames: the length of a record tells nothing of the names in it.

The key of an object is derived from the repository's master key and the object's own name, so
it opens under no other name, and nonces count for each object alone: with 4,096 frames in
each of 2**32 segments, each written four times, two frames share key and nonce with a probability
of 2**-37. Writing an object again, with whatever content, is therefore safe.

The names of a volume and a snapshot, in the key of a pointer, are sealed with AES-SIV (RFC 5297):
the same name gives the same text, so that pointers are found by name, and a listing gets its names
from the keys alone.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
from collections.abc import Iterable, Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from backends.errors import CorruptError
from snapshots.repository.layout import PAGES, SEGMENTS

FRAME = 16 << 10  # bytes of a full frame as it is stored
NONCE = 12
TAG = 16
OVERHEAD = NONCE + TAG
PAYLOAD = FRAME - OVERHEAD
MASTER_KEY_SIZE = 32

_SHORT_FRAMES = (1 << 10, 2 << 10, 4 << 10, 8 << 10)
_LENGTH = struct.Struct(">Q")
_NUMBER = struct.Struct(">Q")
_NAME_STEP = 32  # names are filled up to a multiple of this many bytes
_SIV_TAG = 16


def derive_key(secret: bytes, salt: bytes, purpose: bytes, length: int) -> bytes:
    """HKDF-SHA256 (RFC 5869): a key of ``length`` bytes for one purpose."""
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=purpose).derive(secret)


def is_read_in_parts(key: str) -> bool:
    """Tell whether the object is a segment or holds pages, and so is not filled up."""
    return key.startswith((SEGMENTS, PAGES))


def sealed_length(key: str, length: int) -> int:
    """Bytes that an object with ``length`` bytes of content takes when it is sealed."""
    full, rest = divmod(_LENGTH.size + length, PAYLOAD)
    if is_read_in_parts(key):
        return full * FRAME + (rest + OVERHEAD if rest else 0)
    for short in _SHORT_FRAMES:
        if not full and rest + OVERHEAD <= short:
            return short
    return (full + bool(rest)) * FRAME


def most_content(stored_length: int) -> int:
    """The most bytes of content that a sealed object of ``stored_length`` bytes may have.

    One that is not filled up has as many.
    """
    full, rest = divmod(stored_length, FRAME)
    return max(0, full * PAYLOAD + max(0, rest - OVERHEAD) - _LENGTH.size)


def frames_of(offset: int, length: int) -> tuple[int, int]:
    """The (first, end) frames that hold ``length`` bytes of content from ``offset``."""
    start = _LENGTH.size + offset
    return start // PAYLOAD, -(-(start + length) // PAYLOAD)


class Sealer:
    """Seals and unseals objects and names with one master key. May be used from any thread."""

    def __init__(self, master_key: bytes, repository_id: str) -> None:
        self._master_key = master_key
        self._salt = bytes.fromhex(repository_id)
        self._name_key = self.derive(b"nbdserve names", 64)

    def derive(self, purpose: bytes, length: int) -> bytes:
        """A key of this repository for one purpose."""
        return derive_key(self._master_key, self._salt, purpose, length)

    def seal(self, key: str, content: bytes | bytearray) -> bytearray:
        """What is stored for the object ``key``; never the same twice."""
        cipher = self._cipher(key)
        total = sealed_length(key, len(content))
        sealed = bytearray(total)
        nonces = os.urandom(NONCE * -(-total // FRAME))
        view = memoryview(content)
        for number, at in enumerate(range(0, total, FRAME)):
            room = min(FRAME, total - at) - OVERHEAD
            start = number * PAYLOAD - _LENGTH.size
            plain: bytes | memoryview
            if number == 0:
                plain = _LENGTH.pack(len(content)) + bytes(view[: room - _LENGTH.size])
            else:
                plain = view[start : start + room]
            if len(plain) < room:
                plain = bytes(plain).ljust(room, b"\0")
            nonce = nonces[number * NONCE : (number + 1) * NONCE]
            sealed[at : at + NONCE] = nonce
            sealed[at + NONCE : at + room + OVERHEAD] = cipher.encrypt(
                nonce, plain, _NUMBER.pack(number)
            )
        return sealed

    def unseal(self, key: str, sealed: bytes, where: str) -> bytes:
        """The content of the whole object; CorruptError names ``where``."""
        if len(sealed) < OVERHEAD + _LENGTH.size:
            raise CorruptError(f"{where}: {len(sealed)} bytes are no sealed object")
        frames = self._open_frames(key, 0, sealed, where)
        head = next(frames)
        (length,) = _LENGTH.unpack_from(head)
        if sealed_length(key, length) != len(sealed):
            raise CorruptError(f"{where}: it is not as long as when it was sealed")
        return _join(head[_LENGTH.size :], frames, length)

    def unseal_part(self, key: str, offset: int, length: int, frames: bytes, where: str) -> bytes:
        """``length`` bytes of content from ``offset``, out of the frames that hold them."""
        first, _ = frames_of(offset, length)
        opened = self._open_frames(key, first, frames, where)
        return _join(next(opened)[_LENGTH.size + offset - first * PAYLOAD :], opened, length)

    def seal_name(self, name: str, *context: str) -> str:
        """The text that stands for a name in keys; ``context`` says of what it is the name."""
        plain = name.encode()
        filled = plain.ljust(_NAME_STEP * -(-len(plain) // _NAME_STEP), b"\0")
        sealed = AESSIV(self._name_key).encrypt(filled, [part.encode() for part in context])
        return _text_of(sealed)

    def unseal_name(self, text: str, *context: str) -> str | None:
        """The name that ``text`` stands for, None when it stands for none."""
        try:
            sealed = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
            if len(sealed) < _SIV_TAG or _text_of(sealed) != text:
                return None
            filled = AESSIV(self._name_key).decrypt(sealed, [part.encode() for part in context])
            return filled.rstrip(b"\0").decode()
        except (binascii.Error, InvalidTag, ValueError):
            return None

    def _open_frames(self, key: str, first: int, frames: bytes, where: str) -> Iterator[bytes]:
        """Yield the plain bytes of ``frames``; ``first`` is the number of the first."""
        cipher = self._cipher(key)
        view = memoryview(frames)
        for number, at in enumerate(range(0, len(frames), FRAME), first):
            nonce, rest = view[at : at + NONCE], view[at + NONCE : at + FRAME]
            try:
                yield cipher.decrypt(nonce, rest, _NUMBER.pack(number))
            except (InvalidTag, ValueError):  # the latter where a nonce is cut short
                raise CorruptError(
                    f"{where}: what is at offset {number * FRAME} was not sealed for this place: "
                    "it is damaged, or was exchanged"
                ) from None

    def _cipher(self, key: str) -> AESGCM:
        return AESGCM(self.derive(b"nbdserve object " + key.encode(), 32))


def _join(head: bytes, rest: Iterable[bytes], length: int) -> bytes:
    """The first ``length`` bytes of ``head`` and ``rest``, of which one is in memory at a time."""
    joined = io.BytesIO()
    joined.write(head)
    joined.writelines(rest)
    joined.truncate(length)
    return joined.getvalue()


def _text_of(sealed: bytes) -> str:
    return base64.b32encode(sealed).decode().rstrip("=").lower()
