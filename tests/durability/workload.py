"""Random clients and a random operator on one data directory, and the model that goes with them.

Each volume has two clients, which write, zero, trim and flush, each one request after the other and
never both in the same place; meanwhile the operator takes snapshots, of groups too, deletes and
rolls back, clones, imports, resizes, renames, removes. In the middle of what runs in a thread a
client may write as well: the event loop would go on just then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import chain
from random import Random
from typing import Any

from backends.errors import StorageError
from backends.layers import LayerStore
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.sink import open_sink
from snapshots.transfer import Import

from .loop import SimulatedLoop
from .model import SECTOR, ZERO, Form, Model, ViolationError, VolumeModel, cut_up

BLOCK = 4096
IN_BLOCK = BLOCK // SECTOR
MOST_BLOCKS = 14
MOST_VOLUMES = 3
CLIENTS = 2
# Seconds between two requests of a client. A system call takes none.
PAUSES = (0, 0, 0, 0.001, 0.003, 0.01)
# While a snapshot is taken: then requests of all kinds are under way, begin and end around its gate
# and before its commit.
GATE_PAUSES = (0, 0, 0.0003)
REQUESTS = ("write", "write", "write", "fua", "fua", "flush", "flush", "trim", "zeroes", "read")
SNAPSHOTS = ("s0", "s1", "s2", "s3")


async def read_all(handle: Handle) -> bytes:
    """Everything that a volume or snapshot holds."""
    buffer = bytearray(handle.size)
    if not handle.try_read(0, memoryview(buffer)):
        await handle.read(0, memoryview(buffer))
    return bytes(buffer)


class Client:
    """One client of a volume; ``lock`` is held while it asks for something, or by the operator."""

    def __init__(self, workload: Workload, volume: VolumeModel) -> None:
        self.workload = workload
        self.volume = volume
        self.handle: Handle | None = None
        self.lock = asyncio.Lock()
        self.gone = False
        self._between = False
        workload.start(self._run())

    @property
    def at_gate(self) -> bool:
        """Whether a snapshot of its volume is being taken."""
        return self.volume in self.workload.at_gate

    async def _run(self) -> None:
        random = self.workload.random
        while not self.gone and not self.workload.stopping:
            async with self.lock:
                if not self.gone:
                    await self._ask(random)
            pauses = GATE_PAUSES if self.at_gate else PAUSES
            await asyncio.sleep(6 if random.random() < 0.01 else random.choice(pauses))

    async def open(self) -> Handle:
        if self.handle is None:
            lease = await self.workload.catalogue.open_volume(self.volume.name, lambda: None)
            assert isinstance(lease, Handle)
            self.handle = lease
        return self.handle

    async def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            await self.workload.catalogue.close_export(handle)

    def place(self, random: Random) -> tuple[int, int]:
        """(first sector, sectors) of a request, whole blocks more often than not."""
        sectors = self.volume.sectors
        if random.random() < 0.65:
            first = random.randrange(sectors // IN_BLOCK)
            usual = (1, 1, 1, 2, 3, 5, MOST_BLOCKS)
            blocks = random.choice((1, 2, 5, 5, MOST_BLOCKS) if self.at_gate else usual)
            return first * IN_BLOCK, min(blocks * IN_BLOCK, sectors - first * IN_BLOCK)
        first = random.randrange(sectors)
        return first, min(random.choice((1, 2, 5, 9, 20)), sectors - first)

    async def _ask(self, random: Random) -> None:
        handle = await self.open()
        model, volume = self.workload.model, self.volume
        what = "close" if random.random() < 0.1 else random.choice(REQUESTS)
        if what == "flush":
            mark = model.tick()
            await handle.flush()
            volume.settle(mark)
            return
        if what == "read":
            found = cut_up(await read_all(handle))
            # A write in between may or may not be seen.
            if found != volume.now and found != volume.now[: len(found)]:
                wrong = volume.form().violation(found)
                if wrong is not None:
                    raise ViolationError(f"{volume.name} while it is used: {wrong}")
            return
        if what == "close":
            if random.random() < 0.3:
                await self.close()
            return
        first, count = self.place(random)
        if volume.is_busy(first, first + count):
            return
        busy = first, first + count
        volume.busy.append(busy)
        try:
            if what in ("write", "fua"):
                sectors = model.new_sectors(first, count)
                write = model.begin(volume, first, sectors)
                data = memoryview(b"".join(sectors))
                if not handle.try_write(first * SECTOR, data):
                    await handle.write(first * SECTOR, data)
            else:
                write = model.begin(volume, first, [ZERO] * count)
                if what == "trim":
                    await handle.trim(first * SECTOR, count * SECTOR)
                else:
                    no_hole = random.random() < 0.5
                    await handle.write_zeroes(first * SECTOR, count * SECTOR, no_hole=no_hole)
            handle.note()
            model.end(volume, write)
        finally:
            volume.busy.remove(busy)
        if what == "fua" or random.random() < 0.1:
            await handle.flush()
            volume.settle_one(write)

    def write_between(self, random: Random) -> None:
        """Write on the event loop while something runs in a thread."""
        handle, volume = self.handle, self.volume
        if handle is None or self.gone or self._between or handle.view.closed:
            return
        first, count = self.place(random)
        if volume.is_busy(first, first + count):
            return
        model = self.workload.model
        sectors = model.new_sectors(first, count)
        # Where it is refused, nothing was written, and the model forgets it again.
        kept = list(volume.later), list(volume.trace)
        self._between = True
        try:
            write = model.begin(volume, first, sectors)
            if handle.try_write(first * SECTOR, memoryview(b"".join(sectors))):
                handle.note()
                model.end(volume, write)
            else:
                volume.later, volume.trace = kept
        finally:
            self._between = False


class Workload:
    """One process's life on a data directory; ``model`` follows it."""

    def __init__(
        self,
        store: LayerStore,
        catalogue: Catalogue,
        model: Model,
        random: Random,
        loop: SimulatedLoop,
    ) -> None:
        self.store = store
        self.catalogue = catalogue
        self.model = model
        self.random = random
        self.loop = loop
        self.stopping = False
        self.at_gate: list[VolumeModel] = []
        self.clients: dict[VolumeModel, list[Client]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._deleting: set[tuple[VolumeModel, str]] = set()
        self._names = 0
        self._between = False

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def on_call(self, call: str) -> None:
        """A system call begins, maybe in a thread; where that makes a file, it holds a lock."""
        if call.startswith("create"):
            return
        likely = 0.3 if self.at_gate else 0.1
        if self.loop.inside and not self._between and self.random.random() < likely:
            clients = [each for each in chain(*self.clients.values()) if each.handle is not None]
            if clients:
                self._between = True
                try:
                    self.random.choice(clients).write_between(self.random)
                finally:
                    self._between = False

    async def run(self, operations: int) -> None:
        """Do so many of the operator's operations, then close."""
        for volume in self.model.volumes:
            self._start_clients(volume)
        if not self.model.volumes:
            await self._create()
        for _ in range(operations):
            await self._operate()
            await asyncio.sleep(self.random.choice((0, 0.002, 0.02, 0.02)))
        self.stopping = True
        while running := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(running)
        for task in self._tasks:
            task.result()
        for client in chain(*self.clients.values()):
            await client.close()
        await self.catalogue.close()

    def _start_clients(self, volume: VolumeModel) -> None:
        self.clients[volume] = [Client(self, volume) for _ in range(CLIENTS)]

    # The operator

    async def _operate(self) -> None:
        random = self.random
        await random.choice(
            (
                self._snapshot,
                self._snapshot,
                self._group,
                self._group,
                self._delete_snapshot,
                self._delete_snapshot,
                self._delete_snapshot,
                self._rollback,
                self._clone,
                self._resize,
                self._rename,
                self._create,
                self._import,
                self._delete_volume,
                self._read_snapshots,
            )
        )()

    def _snapshots(self, *, idle: bool = True) -> list[tuple[VolumeModel, str]]:
        return [
            (volume, name)
            for volume in self.model.volumes
            for name in volume.snapshots
            if not (idle and (volume, name) in self._deleting)
        ]

    @contextlib.asynccontextmanager
    async def _alone(self, volume: VolumeModel) -> AsyncIterator[None]:
        """Without its clients."""
        async with self._held(volume):
            for client in self.clients[volume]:
                await client.close()
            yield

    @contextlib.asynccontextmanager
    async def _held(self, volume: VolumeModel) -> AsyncIterator[None]:
        """While its clients ask for nothing."""
        async with contextlib.AsyncExitStack() as stack:
            for client in self.clients[volume]:
                await stack.enter_async_context(client.lock)
            yield

    async def _snapshot(self, most: int = 1) -> None:
        count = self.random.randint(1, min(most, len(self.model.volumes)))
        volumes = self.random.sample(self.model.volumes, count)
        names = [name for name in SNAPSHOTS if all(name not in v.snapshots for v in volumes)]
        if not names:
            return
        name = self.random.choice(names)
        self.model.begin_snapshots(volumes, name)
        self.at_gate = volumes
        await self.catalogue.create_snapshots([(volume.name, name) for volume in volumes])
        self.at_gate = []
        self.model.end_snapshots(volumes, name)
        group = [volume.snapshots[name] for volume in volumes]
        contents = [await self._read_snapshot(volume, name) for volume in volumes]
        frozen = self.model.freeze().volumes
        # Here it is seen to be one instant; from here on, it must stay what it is.
        for volume, snapshot, content in zip(volumes, group, contents, strict=True):
            expected = frozen[self.model.volumes.index(volume)].snapshots[name]
            assert expected.instant is not None
            try:
                expected.instant.moments(cut_up(content))
            except ViolationError as error:
                raise ViolationError(f"{volume.name}@{name} as taken: {error}") from None
            snapshot.content = content

    async def _group(self) -> None:
        await self._snapshot(most=MOST_VOLUMES)

    async def _read_snapshot(self, volume: VolumeModel, name: str) -> bytes:
        lease = await self.catalogue.open_snapshot(volume.name, name, lambda: None)
        assert isinstance(lease, Handle)
        try:
            return await read_all(lease)
        finally:
            await self.catalogue.close_export(lease)

    async def _read_snapshots(self) -> None:
        for volume, name in self._snapshots():
            if await self._read_snapshot(volume, name) != volume.snapshots[name].content:
                raise ViolationError(f"{volume.name}@{name} has changed")

    async def _delete_snapshot(self) -> None:
        candidates = self._snapshots()
        if not candidates:
            return
        volume, name = self.random.choice(candidates)
        self._deleting.add((volume, name))
        volume.snapshots[name].optional = True

        async def delete() -> None:
            try:
                await self.catalogue.delete_snapshot(volume.name, name)
            except StorageError:
                # Its volume was removed meanwhile.
                if volume in self.model.volumes:
                    raise
            volume.snapshots.pop(name, None)
            self._deleting.discard((volume, name))

        if self.random.random() < 0.4:
            self.start(delete())
        else:
            await delete()

    def _busy(self, volume: VolumeModel) -> bool:
        return any(found is volume for found, _ in self._deleting)

    async def _rollback(self) -> None:
        candidates = self._snapshots()
        if not candidates:
            return
        volume, name = self.random.choice(candidates)
        async with self._alone(volume):
            content = volume.snapshots[name].content
            assert content is not None
            sectors = cut_up(content)
            volume.also = Form(sectors, {})
            await self.catalogue.rollback(volume.name, name)
            volume.also = None
            volume.base = list(sectors)
            volume.now = list(sectors)
            volume.later = []
            volume.trace = []

    async def _clone(self) -> None:
        candidates = self._snapshots()
        if not candidates or len(self.model.volumes) >= MOST_VOLUMES:
            return
        source, name = self.random.choice(candidates)
        content = source.snapshots[name].content
        assert content is not None
        more = self.random.choice((0, 0, 2))
        base = cut_up(content) + [ZERO] * (more * IN_BLOCK)
        await self._add(
            base,
            lambda new: self.catalogue.clone_volume(new, source.name, name, len(base) * SECTOR),
        )

    async def _create(self) -> None:
        if len(self.model.volumes) < MOST_VOLUMES:
            blocks = self.random.randint(2, MOST_BLOCKS)
            await self._add(
                [ZERO] * (blocks * IN_BLOCK),
                lambda new: self.catalogue.create_volume(new, blocks * BLOCK),
            )

    async def _import(self) -> None:
        if len(self.model.volumes) >= MOST_VOLUMES:
            return
        random = self.random
        blocks = random.randint(2, MOST_BLOCKS)
        base = [ZERO] * (blocks * IN_BLOCK)
        written = random.sample(range(0, len(base), IN_BLOCK), random.randint(1, blocks))
        for first in written:
            base[first : first + IN_BLOCK] = self.model.new_sectors(first, IN_BLOCK)

        async def fill(name: str) -> Import:
            imported = await self.catalogue.begin_import(name, blocks * BLOCK)
            sink = await open_sink(self.store, imported.sink)
            for first in written:
                sink.write(first * SECTOR, b"".join(base[first : first + IN_BLOCK]))
            await sink.finish()
            sink.close()
            return imported

        async def restore(name: str) -> None:
            await self.catalogue.commit_import(await fill(name))

        if random.random() < 0.2:
            await self.catalogue.discard_import(await fill("given-up"))
        else:
            await self._add(base, restore)

    async def _add(
        self, base: list[bytes], make: Callable[[str], Coroutine[Any, Any, object]]
    ) -> None:
        self._names += 1
        name = f"v{self.model.written}-{self._names}"
        volume = VolumeModel(name, base)
        volume.optional = True
        self.model.volumes.append(volume)
        await make(name)
        volume.optional = False
        self._start_clients(volume)

    async def _delete_volume(self) -> None:
        volume = self.random.choice(self.model.volumes)
        if len(self.model.volumes) > 1 and not self._busy(volume):
            async with self._alone(volume):
                for client in self.clients[volume]:
                    client.gone = True
                volume.optional = True
                wipe = self.random.random() < 0.5
                await self.catalogue.delete_volume(volume.name, with_snapshots=True, wipe=wipe)
                self.model.volumes.remove(volume)
                del self.clients[volume]

    async def _resize(self) -> None:
        volume = self.random.choice(self.model.volumes)
        if volume.sectors > 2 * MOST_BLOCKS * IN_BLOCK:
            return
        async with self._alone(volume):
            more = [ZERO] * (self.random.randint(1, 3) * IN_BLOCK)
            form = volume.form()
            volume.also = Form(form.base + more, form.later)
            await self.catalogue.resize_volume(volume.name, (volume.sectors + len(more)) * SECTOR)
            volume.also = None
            volume.base += more
            volume.now += more

    async def _rename(self) -> None:
        volume = self.random.choice(self.model.volumes)
        if self._busy(volume):
            return
        async with self._held(volume):
            self._names += 1
            new = f"r{self.model.written}-{self._names}"
            volume.names = (volume.name, new)
            await self.catalogue.rename_volume(volume.name, new)
            volume.name = new
            volume.names = (new,)
