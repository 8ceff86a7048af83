"""Layers and records in memory: a store that is gone with the process.

It keeps the contract's semantics but for durability, and is what model tests run on, thousands of
operations a second. ``capacity`` bounds what data, logs and records may take together, so that a
full disk can be had at will.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from backends.errors import InUseError, NoSpaceError, NotFoundError
from backends.layers import Buffer, LayerFiles, ScratchFile, Space

_PAGE_SHIFT = 12
_PAGE = 1 << _PAGE_SHIFT
_UNBOUNDED = 1 << 60


class MemoryDataFile:
    """Pages in a dictionary; a missing one reads as zeroes."""

    def __init__(self, store: MemoryLayerStore, pages: dict[int, bytearray]) -> None:
        self._store = store
        self._pages = pages

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        self.read(offset, buffer)
        return True

    def read(self, offset: int, buffer: memoryview) -> None:
        for page, start, position, count in _pieces(offset, len(buffer)):
            found = self._pages.get(page)
            part = bytes(count) if found is None else found[start : start + count]
            buffer[position : position + count] = part

    def arrival(self, offset: int, length: int) -> None:
        return None

    def lend(self, offset: int, length: int) -> tuple[int, int] | None:
        return None

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        for page, start, position, count in _pieces(offset, len(view)):
            if page not in self._pages:
                self._store.take(_PAGE)
                self._pages[page] = bytearray(_PAGE)
            self._pages[page][start : start + count] = view[position : position + count]

    def find_short(self, ends: Sequence[int]) -> str | None:
        return None

    def write_zeroes(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def punch(self, offset: int, length: int) -> None:
        end = offset + length
        touched = range(offset >> _PAGE_SHIFT, (end + _PAGE - 1) >> _PAGE_SHIFT)
        for page in touched if len(touched) < len(self._pages) else list(self._pages):
            if page in touched and page in self._pages:
                start = max(offset - (page << _PAGE_SHIFT), 0)
                stop = min(end - (page << _PAGE_SHIFT), _PAGE)
                if stop - start == _PAGE:
                    del self._pages[page]
                    self._store.take(-_PAGE)
                else:
                    self._pages[page][start:stop] = bytes(stop - start)

    def allocated_ranges(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        first, last = offset >> _PAGE_SHIFT, (offset + length) >> _PAGE_SHIFT
        found: list[tuple[int, int]] = []
        for page in sorted(page for page in list(self._pages) if first <= page < last):
            start = page << _PAGE_SHIFT
            if found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + _PAGE)
            elif len(found) == limit:
                break
            else:
                found.append((start, _PAGE))
        return found

    def occupied_ranges(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return self.allocated_ranges(offset, length, limit)

    def cache(self, offset: int, length: int) -> None:
        pass

    def prepare(self, offset: int, length: int) -> None:
        pass

    def write_back(self) -> None:
        pass

    def unwritten(self) -> int | None:
        return 0

    def sync(self) -> None:
        pass

    def allocated(self) -> int:
        return len(self._pages) * _PAGE

    def close(self) -> None:
        pass


class MemoryLogFile:
    """A log as a bytearray."""

    def __init__(self, store: MemoryLayerStore, content: bytearray, end: int) -> None:
        self._store = store
        self._content = content
        self._end = end

    def append(self, data: Buffer) -> None:
        self.reserve(len(data))
        self._content[self._end : self._end + len(data)] = data
        self._end += len(data)

    def reserve(self, length: int) -> None:
        missing = self._end + length - len(self._content)
        if missing > 0:
            self._store.take(missing)
            self._content += bytes(missing)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class MemoryClaim:
    """A claim on a layer of a store that no other process can reach."""

    def release(self) -> None:
        pass


class MemoryStagedRecord:
    """A record that is committed, or not, later."""

    def __init__(self, store: MemoryLayerStore, kind: str, name: str, content: bytes) -> None:
        self._store = store
        self._record = (kind, name, content)

    async def commit(self) -> None:
        await self._store.commit_record(*self._record)

    async def discard(self) -> None:
        pass


class MemoryLayerStore:
    """A LayerStore in memory (see the module's text)."""

    machine_run = b""  # nothing outlives the process
    was_orderly = True

    def __init__(self, capacity: int = _UNBOUNDED) -> None:
        self.capacity = capacity
        self.used = 0
        self._locked = False
        self._data: dict[str, dict[int, bytearray]] = {}
        self._logs: dict[str, dict[str, bytearray]] = {}
        self._held: dict[str, int] = {}
        self._records: dict[tuple[str, str], bytes] = {}
        self.lost: dict[str, dict[int, bytearray]] = {}

    def take(self, size: int) -> None:
        """Account for ``size`` more bytes; OSError ENOSPC when there is no room for them."""
        if size > 0 and self.used + size > self.capacity:
            raise OSError(errno.ENOSPC, "no space left in memory store")
        self.used += size

    async def lock(self) -> None:
        if self._locked:
            raise InUseError("this memory store is in use")
        self._locked = True

    async def unlock(self, *, orderly: bool = True) -> None:
        self._locked = False

    async def space(self) -> Space:
        return Space(self.capacity - self.used, self.capacity)

    async def release_reserve(self) -> bool:
        return False

    async def keep_reserve(self) -> None:
        pass

    async def list_held(self) -> dict[str, int]:
        return dict(self._held)

    async def hold(self, name: str, length: int) -> int:
        held = self._held.pop(name, 0)
        self.take(-held)
        held = min(length, held + max(0, self.capacity - self.used - held))
        self.take(held)
        if held:
            self._held[name] = held
        return held

    def spend(self, name: str, length: int) -> int:
        spent = min(length, self._held.get(name, 0))
        if spent:
            self._held[name] -= spent
            self.take(-spent)
        return spent

    def holds_any(self) -> bool:
        return any(self._held.values())

    def free_now(self) -> int:
        return self.capacity - self.used

    async def list_layers(self) -> list[str]:
        return sorted(self._data)

    async def list_files(self, layer: str) -> LayerFiles:
        if layer not in self._logs:
            raise NotFoundError(f"layer {layer} is missing")
        return LayerFiles(sorted(self._logs[layer]), [])

    async def list_set_aside(self) -> list[str]:
        return [f"memory:lost/{layer}" for layer in sorted(self.lost)]

    async def create_layer(self, layer: str) -> None:
        self._data[layer] = {}
        self._logs[layer] = {}

    async def delete_layer(self, layer: str) -> None:
        for content in self._logs.pop(layer, {}).values():
            self.take(-len(content))
        self.take(-_PAGE * len(self._data.pop(layer, {})))

    async def holds_data(self, layer: str) -> bool:
        return bool(self._data[layer])

    async def set_aside_layer(self, layer: str) -> str:
        self.lost[layer] = self._data.pop(layer)
        del self._logs[layer]
        return f"memory:lost/{layer}"

    async def allocated(self, layer: str) -> int:
        return _PAGE * len(self._data[layer]) + sum(map(len, self._logs[layer].values()))

    async def open_data(self, layer: str, *, writable: bool) -> MemoryDataFile:
        if layer not in self._data:
            raise NotFoundError(f"layer {layer} is missing")
        return MemoryDataFile(self, self._data[layer])

    async def drop_cache(self, layer: str) -> None:
        pass

    async def create_log(self, layer: str, log: str, content: bytes) -> None:
        if layer not in self._logs:
            raise NotFoundError(f"layer {layer} is missing")
        self._account(len(content), len(self._logs[layer].get(log, b"")))
        self._logs[layer][log] = bytearray(content)

    async def open_log(self, layer: str, log: str, end: int) -> MemoryLogFile:
        return MemoryLogFile(self, self._logs[layer][log], end)

    async def read_log(self, layer: str, log: str) -> bytes | None:
        content = self._logs.get(layer, {}).get(log)
        return None if content is None else bytes(content)

    async def has_log(self, layer: str, log: str) -> bool:
        return log in self._logs.get(layer, {})

    async def log_size(self, layer: str, log: str) -> int:
        return len(self._logs.get(layer, {}).get(log, b""))

    async def delete_log(self, layer: str, log: str) -> None:
        self.take(-len(self._logs.get(layer, {}).pop(log, b"")))

    def open_scratch(self, layer: str, name: str) -> ScratchFile:
        raise AssertionError("a store without runs of the machine has no use for it")

    async def pin_layer(self, layer: str) -> MemoryClaim:
        return MemoryClaim()

    async def claim_layer(self, layer: str) -> MemoryClaim | None:
        return MemoryClaim()

    async def list_records(self, kind: str) -> list[str]:
        return sorted(name for found, name in self._records if found == kind)

    async def read_record(self, kind: str, name: str) -> bytes:
        try:
            return self._records[kind, name]
        except KeyError:
            raise NotFoundError(f"{self.describe_record(kind, name)} is missing") from None

    async def commit_record(self, kind: str, name: str, content: bytes) -> None:
        self._account(len(content), len(self._records.get((kind, name), b"")))
        self._records[kind, name] = content

    async def stage_record(self, kind: str, name: str, content: bytes) -> MemoryStagedRecord:
        return MemoryStagedRecord(self, kind, name, content)

    async def delete_record(self, kind: str, name: str) -> None:
        self.take(-len(self._records.pop((kind, name), b"")))

    def describe_layer(self, layer: str) -> str:
        return f"memory:{layer}"

    def describe(self, layer: str, log: str) -> str:
        return f"memory:{layer}/{log}"

    def describe_record(self, kind: str, name: str) -> str:
        return f"memory:{kind}/{name}"

    def _account(self, new: int, old: int) -> None:
        if self.used + new > self.capacity:
            raise NoSpaceError("no space left in memory store")
        self.used += new - old


def _pieces(offset: int, length: int) -> list[tuple[int, int, int, int]]:
    """(page, start in it, position in the range, count) for each page of a range."""
    pieces = []
    position = 0
    while position < length:
        start = (offset + position) & (_PAGE - 1)
        count = min(_PAGE - start, length - position)
        pieces.append(((offset + position) >> _PAGE_SHIFT, start, position, count))
        position += count
    return pieces
