"""A repository in memory whose store can be rigged."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

from backends.errors import UnavailableError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store
from snapshots.repository.layout import PAGE_ENTRIES
from tests.snapshots.repository.model import ModelSource

BLOCK = 4096
PAGE = PAGE_ENTRIES * BLOCK
URL = "memory://repository"


class RiggedObjects:
    """An object store that is down, slow or wrong on demand; it notes every range that is read."""

    def __init__(self) -> None:
        self.inner = MemoryObjectStore()
        self.name = self.inner.name
        self.down = False
        self.read_only = False
        self.rig: Callable[[str, int, bytes], bytes] = lambda key, offset, data: data
        self.ranges: list[tuple[str, int, int]] = []
        self.allowed = threading.Event()
        self.allowed.set()

    def _check(self) -> None:
        if self.down:
            raise UnavailableError("forced: the endpoint is down")

    def put(self, key: str, data: bytes | bytearray) -> None:
        self._check()
        if self.read_only:
            raise UnavailableError("forced: access was denied")
        self.inner.put(key, data)

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        self._check()
        if self.read_only:
            raise UnavailableError("forced: access was denied")
        return self.inner.put_if_absent(key, data)

    def get(self, key: str, limit: int) -> bytes:
        self._check()
        return self.inner.get(key, limit)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        self._check()
        self.allowed.wait(20)
        self.ranges.append((key, offset, length))
        return self.rig(key, offset, self.inner.get_range(key, offset, length))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        self._check()
        return self.inner.list(prefix)

    def size(self, key: str) -> int | None:
        self._check()
        return self.inner.size(key)

    def delete(self, key: str) -> None:
        self._check()
        self.inner.delete(key)

    def stop_retrying(self) -> None:
        self.allowed.set()

    def segments_read(self) -> list[tuple[str, int, int]]:
        return [found for found in self.ranges if found[0].startswith("segments/")]


def make_repository(chunk_size: int = BLOCK) -> tuple[RiggedObjects, Repository]:
    objects = RiggedObjects()
    return objects, init_in_store(objects, chunk_size)


def push(repository: Repository, content: bytes, volume: str = "web", snapshot: str = "s") -> None:
    source = ModelSource(volume, snapshot, f"id-{volume}-{snapshot}", 1.0, content)
    repository.push(source)


def make_content(size: int, seed: int = 1, share: float = 0.4) -> bytes:
    """``size`` bytes of which about that share of blocks are not zero, in runs."""
    choice = random.Random(seed)
    content = bytearray(size)
    block = 0
    while block < size // BLOCK:
        run = choice.randint(1, 20)
        if choice.random() < share:
            end = min(size, (block + run) * BLOCK)
            content[block * BLOCK : end] = choice.randbytes(end - block * BLOCK)
        block += run
    return bytes(content)
