"""The object store of an encrypted repository: it seals what is put and unseals what is got.

Those who use it see keys and contents as in a repository without encryption. So whatever is put
is encrypted, and nothing is returned that was not sealed under that very key, by somebody who has
the master key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.errors import CorruptError, NotFoundError
from backends.locking import Retention, locking
from backends.objects import ObjectStore
from snapshots.repository.layout import OUTCOME_LIMIT, POINTERS
from snapshots.repository.sealed_objects import (
    FRAME,
    Sealer,
    frames_of,
    is_read_in_parts,
    most_content,
    sealed_length,
)

_MOST_LENGTHS = 20_000  # remembered; a few MiB


class SealedObjectStore:
    """Objects in ``inner``, sealed; see the module's text.

    Sizes, in ``size`` and ``list``, are those of the content for segments and objects of pages; all
    others are filled up before they are sealed, and may have less content than that.

    To read a part that is near the end of an object takes the object's length. It is remembered
    from listings, and asked for otherwise, once for each object.
    """

    def __init__(self, inner: ObjectStore, sealer: Sealer) -> None:
        self.name = inner.name
        self._inner = inner
        self._sealer = sealer
        self._lengths: dict[str, int] = {}  # as they are stored

    def put(self, key: str, data: bytes | bytearray) -> None:
        self._inner.put(self._stored_key(key), self._sealer.seal(key, data))

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        return self._inner.put_if_absent(self._stored_key(key), self._sealer.seal(key, data))

    def get(self, key: str, limit: int) -> bytes:
        where = self._describe(key)
        sealed = self._inner.get(self._stored_key(key), sealed_length(key, limit))
        content = self._sealer.unseal(key, sealed, where)
        if len(content) > limit:
            raise CorruptError(f"{where} has {len(content)} bytes, at most {limit} are expected")
        return content

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        if not is_read_in_parts(key):
            part = self.get(key, OUTCOME_LIMIT)[offset : offset + length]
            if len(part) != length:
                raise CorruptError(f"{self._describe(key)} ends before {offset + length}")
            return part
        stored = self._stored_length(key)
        if most_content(stored) < offset + length:
            raise CorruptError(f"{self._describe(key)} ends before {offset + length}")
        first, end = frames_of(offset, length)
        start, stop = first * FRAME, min(end * FRAME, stored)
        frames = self._inner.get_range(key, start, stop - start)
        return self._sealer.unseal_part(key, offset, length, frames, self._describe(key))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        if not POINTERS.startswith(prefix) and not prefix.startswith(POINTERS):
            for key, size in self._inner.list(prefix):
                if is_read_in_parts(key):
                    self._remember(key, size)
                yield key, most_content(size)
            return
        found = []
        for stored, size in self._inner.list(self._stored_prefix(prefix)):
            plain = self._plain_key(stored)
            if plain is not None and plain.startswith(prefix):
                found.append((plain, most_content(size)))
        yield from sorted(found)

    def size(self, key: str) -> int | None:
        size = self._inner.size(self._stored_key(key))
        return None if size is None else most_content(size)

    def delete(self, key: str) -> None:
        self._inner.delete(self._stored_key(key))

    def stop_retrying(self) -> None:
        self._inner.stop_retrying()

    def require_lock(self) -> None:
        locking(self._inner).require_lock()

    def hold(self, retention: Retention) -> None:
        locking(self._inner).hold(retention)

    def extend(self, key: str, until: float) -> None:
        locking(self._inner).extend(self._stored_key(key), until)

    def _stored_length(self, key: str) -> int:
        length = self._lengths.get(key)
        if length is None:
            length = self._inner.size(key)
            if length is None:
                raise NotFoundError(f"there is no object {key} in {self.name}")
            self._remember(key, length)
        return length

    def _remember(self, key: str, length: int) -> None:
        if len(self._lengths) >= _MOST_LENGTHS:
            self._lengths.clear()
        self._lengths[key] = length

    def _describe(self, key: str) -> str:
        return f"object {key} of {self.name}"

    def _stored_key(self, key: str) -> str:
        if not key.startswith(POINTERS):
            return key
        return POINTERS + "/".join(self._seal_names(key.removeprefix(POINTERS).split("/")))

    def _stored_prefix(self, prefix: str) -> str:
        """The longest prefix of stored keys that all keys with this ``prefix`` have."""
        if not prefix.startswith(POINTERS):
            return prefix
        *whole, rest = prefix.removeprefix(POINTERS).split("/")
        if len(whole) < 2:
            rest = ""  # the beginning of a name says nothing about the sealed name
        return POINTERS + "/".join([*self._seal_names(whole), rest])

    def _seal_names(self, parts: Sequence[str]) -> Sequence[str]:
        """``parts`` of a pointer's key, as many as there are, with the names in them sealed."""
        volume = [self._sealer.seal_name(part, "volume") for part in parts[:1]]
        snapshot = [self._sealer.seal_name(part, "snapshot", parts[0]) for part in parts[1:2]]
        return [*volume, *snapshot, *parts[2:]]

    def _plain_key(self, stored: str) -> str | None:
        """The key that is stored as ``stored``; None when nothing of this repository is."""
        if not stored.startswith(POINTERS):
            return stored
        parts = stored.removeprefix(POINTERS).split("/")
        if len(parts) != 3:
            return None
        volume = self._sealer.unseal_name(parts[0], "volume")
        if volume is None:
            return None
        snapshot = self._sealer.unseal_name(parts[1], "snapshot", volume)
        return None if snapshot is None else f"{POINTERS}{volume}/{snapshot}/{parts[2]}"
