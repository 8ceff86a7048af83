"""A bucket as it was at some time: what its old versions of objects say, to read and not to write.

A bucket with versioning, which Object Lock includes, keeps what was deleted and overwritten. At the
time T an object was the newest version that is not younger than T by the server's clock, which
nobody else can set; or nothing, when that is a deletion. Where S3 tells the times of a version and
of a deletion to the second only and they are the same, the version counts.

All versions are listed once, at the first use; some 200 bytes of memory for each object. What is
read is one consistent state, whatever is done to the bucket meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NoReturn

from backends.errors import InvalidError, NotFoundError
from backends.locking import Retention
from backends.objects import check_key, check_prefix
from backends.s3_objects import S3ObjectStore


class S3ObjectsAt:
    """The objects of ``store`` at the time ``at``, seconds since the epoch."""

    def __init__(self, store: S3ObjectStore, at: float) -> None:
        self.name = f"{store.name} as of {datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}"
        self._store = store
        self._at = at
        self._known: dict[str, tuple[str, int]] | None = None  # version and size, by key
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes | bytearray) -> NoReturn:
        raise InvalidError(f"cannot write {key} in {self.name}: the past is only read")

    def put_if_absent(self, key: str, data: bytes | bytearray) -> NoReturn:
        self.put(key, data)

    def get(self, key: str, limit: int) -> bytes:
        return self._store.get(key, limit, self._find(key)[0])

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        return self._store.get_range(key, offset, length, self._find(key)[0])

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        check_prefix(prefix)
        objects = self._objects()
        return iter([(key, objects[key][1]) for key in sorted(objects) if key.startswith(prefix)])

    def size(self, key: str) -> int | None:
        found = self._objects().get(check_key(key))
        return None if found is None else found[1]

    def delete(self, key: str) -> None:
        raise InvalidError(f"cannot delete {key} in {self.name}: the past is only read")

    def stop_retrying(self) -> None:
        self._store.stop_retrying()

    def require_lock(self) -> None:
        self._store.require_lock()

    def hold(self, retention: Retention) -> None:
        """Nothing is put here."""

    def extend(self, key: str, until: float) -> None:
        raise InvalidError(f"cannot retain {key} in {self.name}: the past is only read")

    def _find(self, key: str) -> tuple[str, int]:
        found = self._objects().get(check_key(key))
        if found is None:
            raise NotFoundError(f"there is no object {key} in {self.name}")
        return found

    def _objects(self) -> dict[str, tuple[str, int]]:
        with self._lock:
            if self._known is None:
                self._known = self._list()
            return self._known

    def _list(self) -> dict[str, tuple[str, int]]:
        newest: dict[str, tuple[float, bool]] = {}
        objects: dict[str, tuple[str, int]] = {}
        for found in self._store.list_versions():
            rank = (found.modified, found.size is not None)
            # Of the same rank the first is the newest: so S3 lists them.
            if found.modified > self._at or newest.get(found.key, (-1.0, False)) >= rank:
                continue
            newest[found.key] = rank
            if found.size is None:
                objects.pop(found.key, None)
            else:
                objects[found.key] = (found.version, found.size)
        return objects
