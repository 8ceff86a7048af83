"""A volume in memory with snapshots, a sink in memory, and a store that fails on command."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from backends.errors import UnavailableError
from backends.memory_objects import MemoryObjectStore
from backends.objects import ObjectStore

BLOCK = 4096


def runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Extents of sorted block numbers."""
    extents: list[tuple[int, int]] = []
    for block in blocks:
        if extents and sum(extents[-1]) == block * BLOCK:
            extents[-1] = (extents[-1][0], extents[-1][1] + BLOCK)
        else:
            extents.append((block * BLOCK, BLOCK))
    return extents


@dataclass
class ModelSource:
    volume: str
    snapshot: str
    snapshot_id: str
    created: float
    content: bytes
    older: list[ModelSource] = field(default_factory=list)  # newest first
    on_read: Callable[[int], None] | None = None
    bytes_read: int = 0

    @property
    def size(self) -> int:
        return len(self.content)

    def ancestors(self) -> list[str]:
        return [source.snapshot_id for source in self.older]

    def extents(self) -> list[tuple[int, int]]:
        return runs([
            block
            for block in range(-(-self.size // BLOCK))
            if self.content[block * BLOCK : (block + 1) * BLOCK].strip(b"\0")
        ])  # fmt: skip

    def changed_extents(self, since: str) -> list[tuple[int, int]]:
        base = next(source for source in self.older if source.snapshot_id == since).content
        blocks = range(-(-self.size // BLOCK))
        changed = []
        for block in blocks:
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            # What is beyond the older one's end is left to the repository to find.
            if place.start < len(base) and self.content[place] != base[place]:
                changed.append(block)
        return runs(changed)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.on_read:
            self.on_read(offset)
        self.bytes_read += len(buffer)
        assert offset + len(buffer) <= self.size
        buffer[:] = self.content[offset : offset + len(buffer)]


class ModelVolume:
    """A bytearray of which snapshots are taken."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.data = bytearray(size)
        self.taken: list[ModelSource] = []

    def snapshot(self, name: str) -> ModelSource:
        number = len(self.taken)
        source = ModelSource(
            self.name,
            name,
            f"id-{self.name}-{name}-{number}",
            1000.0 + number,
            bytes(self.data),
            self.taken[::-1],
        )
        self.taken.append(source)
        return source


class ModelSink:
    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.written = bytearray(size)
        self.lock = threading.Lock()

    def write(self, offset: int, data: bytes) -> None:
        with self.lock:
            place = slice(offset, offset + len(data))
            assert offset + len(data) <= len(self.data)
            assert data.strip(b"\0"), "zeros are not written"
            assert not self.written[place].strip(b"\0"), "no place is written twice"
            self.data[place] = data
            self.written[place] = b"\1" * len(data)

    def holds(self, offset: int, length: int) -> bool:
        return False

    def complete(self, offset: int, length: int) -> None:
        assert offset + length <= len(self.data)


class FaultyStore:
    """Counts PUTs; fails at one of them, before or after it took effect; runs hooks."""

    def __init__(self, inner: ObjectStore | None = None) -> None:
        self.inner: ObjectStore = inner or MemoryObjectStore()
        self.name = self.inner.name
        self.puts = 0
        self.fail_at: int | None = None
        self.takes_effect = False
        self.error: BaseException = UnavailableError("forced: the endpoint broke")
        self.before_put: Callable[[str], None] | None = None
        self.before_size: Callable[[str], None] | None = None
        self.stopped = False
        self.read_back_fails = False
        self._lock = threading.Lock()

    def _fails(self, key: str) -> bool:
        if self.before_put:
            self.before_put(key)
        with self._lock:
            self.puts += 1
            return self.puts == self.fail_at

    def put(self, key: str, data: bytes | bytearray) -> None:
        fails = self._fails(key)
        if not fails or self.takes_effect:
            self.inner.put(key, data)
        if fails:
            raise self.error

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        fails = self._fails(key)
        done = self.inner.put_if_absent(key, data) if not fails or self.takes_effect else False
        if fails:
            raise self.error
        return done

    def get(self, key: str, limit: int) -> bytes:
        if self.read_back_fails and key.startswith("outcomes/"):
            raise UnavailableError("forced: the endpoint is gone")
        return self.inner.get(key, limit)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        return self.inner.get_range(key, offset, length)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return self.inner.list(prefix)

    def size(self, key: str) -> int | None:
        if self.before_size:
            self.before_size(key)
        return self.inner.size(key)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def stop_retrying(self) -> None:
        self.stopped = True
