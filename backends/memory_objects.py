"""An object store in memory, for tests and for trying things out."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from backends.errors import CorruptError, NotFoundError
from backends.objects import check_key, check_prefix


class MemoryObjectStore:
    """Keeps every object in a dictionary; lost with the process."""

    def __init__(self) -> None:
        self.name = "the object store in memory"
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes | bytearray) -> None:
        with self._lock:
            self._objects[check_key(key)] = bytes(data)

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = bytes(data)
            return True

    def get(self, key: str, limit: int) -> bytes:
        data = self._find(key)
        if len(data) > limit:
            raise CorruptError(
                f"object {key} of {self.name} has {len(data)} bytes, at most {limit} are expected"
            )
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        data = self._find(key)
        if offset + length > len(data):
            raise CorruptError(
                f"object {key} of {self.name} ends at {len(data)}, before {offset + length}"
            )
        return data[offset : offset + length]

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        check_prefix(prefix)
        with self._lock:
            found = [
                (key, len(data)) for key, data in self._objects.items() if key.startswith(prefix)
            ]
        return iter(sorted(found))

    def size(self, key: str) -> int | None:
        with self._lock:
            data = self._objects.get(check_key(key))
        return None if data is None else len(data)

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)

    def stop_retrying(self) -> None:
        """Nothing is ever tried again here."""

    def _find(self, key: str) -> bytes:
        with self._lock:
            try:
                return self._objects[check_key(key)]
            except KeyError:
                raise NotFoundError(f"there is no object {key} in {self.name}") from None
