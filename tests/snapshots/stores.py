"""A memory store that notes what is done to it, fails on demand, and forgets what was not synced.

``FaultyStore`` calls ``hook(kind, layer, detail)`` before every operation that changes or syncs
anything; what the hook raises is what the operation raises. ``Crash`` is for the end of a process:
no handler of the code under test catches it as an error of the store, and every operation after
it raises it again. ``after_crash`` is the store that the next process finds:

* ``kill``: the process died, the machine lived: everything that was written is there;
* ``cut``: a power cut, all that was not synced is lost;
* ``mixed``: a power cut, each page and each 512-byte sector that was not synced is there or not.
While the store is ``cold``, no read is done on the event loop; in its thread ``on_read`` is called.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from backends.layers import Buffer
from backends.memory_layers import MemoryDataFile, MemoryLayerStore, MemoryLogFile

T = TypeVar("T")

BLOCK = 4096
SECTOR = 512
Event = tuple[str, str, Any]


class Crash(BaseException):
    """The process ends here."""


def run(operation: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(operation)


async def until(condition: Callable[[], object]) -> None:
    """Let others run until ``condition()``."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


class FaultyStore(MemoryLayerStore):
    def __init__(self, capacity: int = 1 << 60) -> None:
        super().__init__(capacity)
        self.events: list[Event] = []
        self.hook: Callable[[str, str, Any], None] = lambda kind, layer, detail: None
        self.dead = False
        self.cold = False
        self.on_read: Callable[[str], None] = lambda layer: None
        self.peak = 0
        # What the data files say waits for the disk, in bytes; None: they do not know.
        self.backlog: int | None = 0
        self.durable_data: dict[str, dict[int, bytes]] = {}
        self.durable_logs: dict[tuple[str, str], bytes] = {}
        self.guard = threading.RLock()

    def note(self, kind: str, layer: str, detail: Any = None) -> None:
        with self.guard:
            if self.dead:
                raise Crash
            try:
                self.hook(kind, layer, detail)
            except Crash:
                self.dead = True
                raise
            self.events.append((kind, layer, detail))

    def take(self, size: int) -> None:
        super().take(size)
        self.peak = max(self.peak, self.used)

    def kinds(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event[0] in kinds]

    def after_crash(self, how: str, seed: int = 0) -> FaultyStore:
        """The store as the next process finds it."""
        with self.guard:
            self.dead = True
            choice = random.Random(seed)
            found = FaultyStore(self.capacity)
            found._records = dict(self._records)
            for layer, pages in self._data.items():
                old = self.durable_data.get(layer, {})
                kept: dict[int, bytearray] = {}
                for page in sorted(set(pages) | set(old)):
                    written = how == "kill" or (how == "mixed" and choice.random() < 0.5)
                    content = pages.get(page) if written else old.get(page)
                    if content is not None:
                        kept[page] = bytearray(content)
                found._data[layer] = kept
                found.durable_data[layer] = {page: bytes(data) for page, data in kept.items()}
                found._logs[layer] = {}
                for log, new in self._logs[layer].items():
                    before = self.durable_logs.get((layer, log), b"").ljust(len(new), b"\0")
                    content = bytearray(new)
                    for at in range(0, len(new), SECTOR):
                        if new[at : at + SECTOR] == before[at : at + SECTOR]:
                            continue
                        if how == "cut" or (how == "mixed" and choice.random() < 0.5):
                            content[at : at + SECTOR] = before[at : at + SECTOR]
                    found._logs[layer][log] = content
                    found.durable_logs[layer, log] = bytes(content)
            if how == "kill":
                # Written is not durable: what the page cache holds can still be lost.
                found.durable_data = {
                    layer: dict(self.durable_data.get(layer, {})) for layer in found._data
                }
                found.durable_logs = {
                    key: content
                    for key, content in self.durable_logs.items()
                    if key[0] in found._data
                }
            found.used = sum(BLOCK * len(pages) for pages in found._data.values())
            found.used += sum(len(log) for logs in found._logs.values() for log in logs.values())
            found.used += sum(map(len, found._records.values()))
            found._held = dict(self._held)
            found.used += sum(found._held.values())
            return found

    async def create_layer(self, layer: str) -> None:
        self.note("create_layer", layer)
        await super().create_layer(layer)
        self.durable_data[layer] = {}

    async def delete_layer(self, layer: str) -> None:
        self.note("delete_layer", layer)
        await super().delete_layer(layer)

    async def open_data(self, layer: str, *, writable: bool) -> MemoryDataFile:
        await super().open_data(layer, writable=writable)
        return FaultyDataFile(self, layer)

    async def create_log(self, layer: str, log: str, content: bytes) -> None:
        self.note("create_log", layer, log)
        await super().create_log(layer, log, content)
        self.durable_logs[layer, log] = content
        self.peak = max(self.peak, self.used)

    async def open_log(self, layer: str, log: str, end: int) -> MemoryLogFile:
        return FaultyLogFile(self, layer, log, end)

    async def delete_log(self, layer: str, log: str) -> None:
        self.note("delete_log", layer, log)
        await super().delete_log(layer, log)
        self.durable_logs.pop((layer, log), None)

    async def commit_record(self, kind: str, name: str, content: bytes) -> None:
        self.note("commit", kind, name)
        await super().commit_record(kind, name, content)
        self.peak = max(self.peak, self.used)

    async def delete_record(self, kind: str, name: str) -> None:
        self.note("delete_record", kind, name)
        await super().delete_record(kind, name)


class FaultyDataFile(MemoryDataFile):
    def __init__(self, store: FaultyStore, layer: str) -> None:
        super().__init__(store, store._data[layer])
        self.faulty = store
        self.layer = layer

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        return not self.faulty.cold and super().try_read(offset, buffer)

    def read(self, offset: int, buffer: memoryview) -> None:
        if self.faulty.dead:
            raise Crash
        if self.faulty.cold:
            self.faulty.on_read(self.layer)
        super().read(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        self.faulty.note("write", self.layer, (offset, len(data)))
        with self.faulty.guard:
            super().write(offset, data)

    def write_back(self) -> None:
        self.faulty.note("write_back", self.layer)

    def unwritten(self) -> int | None:
        return self.faulty.backlog

    def punch(self, offset: int, length: int) -> None:
        self.faulty.note("punch", self.layer, (offset, length))
        with self.faulty.guard:
            super().punch(offset, length)

    def sync(self) -> None:
        self.faulty.note("sync", self.layer)
        with self.faulty.guard:
            self.faulty.durable_data[self.layer] = {
                page: bytes(content) for page, content in self._pages.items()
            }


class FaultyLogFile(MemoryLogFile):
    def __init__(self, store: FaultyStore, layer: str, log: str, end: int) -> None:
        super().__init__(store, store._logs[layer][log], end)
        self.faulty = store
        self.layer = layer
        self.log = log

    def append(self, data: Buffer) -> None:
        self.faulty.note("append", self.layer, self.log)
        super().append(data)

    def reserve(self, length: int) -> None:
        if self.faulty.dead:
            raise Crash
        super().reserve(length)

    def sync(self) -> None:
        self.faulty.note("log_sync", self.layer, self.log)
        with self.faulty.guard:
            self.faulty.durable_logs[self.layer, self.log] = bytes(self._content)
