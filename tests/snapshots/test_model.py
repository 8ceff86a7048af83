"""Volumes against the obvious model: a bytearray for each volume, a copy for each snapshot.

Hypothesis drives random sequences of every operation. A kill abandons the catalogue in the middle
of whatever runs; afterwards every byte must be what was flushed last or something written since,
and every snapshot must be whole.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Coroutine
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from backends.errors import InUseError
from backends.layers import DataFile
from backends.memory_layers import MemoryDataFile, MemoryLayerStore
from snapshots import owner_map
from snapshots import volume as volume_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle

T = TypeVar("T")

BLOCK = 4096
MAX_BLOCKS = 24
TIMES = int(os.environ.get("NBDSERVE_MODEL", "1"))  # by `make torture` as many examples
OPERATIONS = 7_000 * TIMES
counted: list[int] = []
own_layers: list[int] = []


class ReluctantDataFile(MemoryDataFile):
    """Refuses every other read on the event loop, as a cold page cache does."""

    refuse = random.Random(1)

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        if self.refuse.random() < 0.5:
            buffer[:] = b"\xee" * len(buffer)  # undefined content, made visible
            return False
        return super().try_read(offset, buffer)


class ReluctantStore(MemoryLayerStore):
    async def open_data(self, layer: str, *, writable: bool) -> DataFile:
        found = await super().open_data(layer, writable=writable)
        return ReluctantDataFile(self, found._pages)


class Modelled:
    """What a volume must hold, what it held when last flushed, and what was written since."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.flushed = bytes(content)
        self.since: list[tuple[int, bytes]] = []
        self.snapshots: dict[str, bytes] = {}
        self.handle: Handle | None = None

    def put(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.since.append((offset, data))

    def durable(self) -> None:
        self.flushed = bytes(self.content)
        self.since = []


volumes = st.sampled_from(["a", "b", "c"])
snapshots = st.sampled_from(["s0", "s1", "s2", "s3"])
fractions = st.floats(0, 1, exclude_max=True)
lengths = st.one_of(
    st.integers(1, 3 * BLOCK),
    st.sampled_from([512, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK, MAX_BLOCKS * BLOCK]),
)
aligned = st.booleans()


class VolumeModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store: Any = self.new_store()
        self.runner = asyncio.Runner()
        self.catalogue = self.run(self.open_catalogue())
        self.model: dict[str, Modelled] = {}
        self.names = 0

    # What a model over other parts does its own way

    def new_store(self) -> Any:
        return ReluctantStore()

    async def open_catalogue(self) -> Catalogue:
        return await Catalogue.open(self.store)

    async def open_handle(self, name: str, snapshot: str | None = None) -> Any:
        if snapshot is None:
            return await self.catalogue.open_volume(name, lambda: None)
        return await self.catalogue.open_snapshot(name, snapshot, lambda: None)

    async def end_handle(self, handle: Any) -> None:
        await self.catalogue.close_export(handle)

    async def extents(self, handle: Any) -> list[tuple[int, bool]]:
        return list(handle.extents(0, handle.size, 1 << 20))

    def abandon(self) -> None:
        """What a kill leaves behind of this catalogue is the store."""
        self.catalogue._views.threads.close()
        self.runner.close()
        self.store._locked = False

    def run(self, operation: Coroutine[Any, Any, T]) -> T:
        counted.append(1)
        return self.runner.run(operation)

    def teardown(self) -> None:
        for modelled in self.model.values():
            self.close_handle(modelled)
        self.run(self.catalogue.close())
        self.runner.close()

    # Handles

    def handle(self, name: str) -> Handle:
        modelled = self.model[name]
        if modelled.handle is None:
            modelled.handle = self.run(self.open_handle(name))
        return modelled.handle

    def close_handle(self, modelled: Modelled) -> None:
        if modelled.handle is not None:
            self.run(self.end_handle(modelled.handle))
            modelled.handle = None
            modelled.durable()

    def place(self, name: str, where: float, length: int, whole: bool) -> tuple[int, int]:
        size = self.handle(name).size
        offset = int(where * size)
        if whole:
            offset -= offset % BLOCK
            length = max(BLOCK, length - length % BLOCK)
        return offset, min(length, size - offset)

    async def write_one(self, handle: Handle, offset: int, data: bytes) -> None:
        if not handle.try_write(offset, memoryview(data)):
            await handle.write(offset, data)

    async def read_all(self, handle: Handle) -> bytes:
        buffer = bytearray(handle.size)
        if not handle.try_read(0, memoryview(buffer)):
            await handle.read(0, memoryview(buffer))
        return bytes(buffer)

    # Operations

    @initialize(blocks=st.integers(1, MAX_BLOCKS))
    def first_volume(self, blocks: int) -> None:
        self.create("a", blocks)

    @rule(name=volumes, blocks=st.integers(1, MAX_BLOCKS))
    def create(self, name: str, blocks: int) -> None:
        if name not in self.model:
            self.run(self.catalogue.create_volume(name, blocks * BLOCK))
            self.model[name] = Modelled(bytes(blocks * BLOCK))

    @rule(name=volumes, where=fractions, length=lengths, whole=aligned, fill=st.integers(1, 255))
    def write(self, name: str, where: float, length: int, whole: bool, fill: int) -> None:
        if name in self.model:
            offset, length = self.place(name, where, length, whole)
            data = bytes((fill + index // 97) % 256 for index in range(length))
            self.run(self.write_one(self.handle(name), offset, data))
            self.model[name].put(offset, data)

    @rule(name=volumes, where=fractions, length=lengths, whole=aligned, how=st.integers(0, 2))
    def zero(self, name: str, where: float, length: int, whole: bool, how: int) -> None:
        if name in self.model:
            offset, length = self.place(name, where, length, whole)
            handle = self.handle(name)
            if how == 0:
                self.run(handle.trim(offset, length))
            else:
                self.run(handle.write_zeroes(offset, length, no_hole=how == 1))
            self.model[name].put(offset, bytes(length))

    @rule(name=volumes, pieces=st.lists(st.tuples(fractions, lengths), min_size=2, max_size=6))
    def write_together(self, name: str, pieces: list[tuple[float, int]]) -> None:
        """Writes that overlap blocks but not bytes, all begun at once."""
        if name not in self.model:
            return
        handle = self.handle(name)
        taken = bytearray(handle.size)
        writes = []
        for where, wanted in pieces:
            offset, length = self.place(name, where, wanted, False)
            if not any(taken[offset : offset + length]):
                taken[offset : offset + length] = b"\1" * length
                writes.append((offset, bytes([len(writes) + 1]) * length))

        async def together() -> None:
            await asyncio.gather(*(handle.write(offset, data) for offset, data in writes))

        self.run(together())
        for offset, data in writes:
            self.model[name].put(offset, data)

    @rule(name=volumes)
    def flush(self, name: str) -> None:
        if name in self.model:
            self.run(self.handle(name).flush())
            self.model[name].durable()

    @rule(names=st.sets(volumes, min_size=1), snapshot=snapshots)
    def snapshot(self, names: set[str], snapshot: str) -> None:
        targets = [
            name
            for name in sorted(names)
            if name in self.model and snapshot not in self.model[name].snapshots
        ]
        if targets:
            self.run(self.catalogue.create_snapshots([(name, snapshot) for name in targets]))
            for name in targets:
                self.model[name].snapshots[snapshot] = bytes(self.model[name].content)
                self.model[name].durable()

    @rule(name=volumes, snapshot=snapshots)
    def delete_snapshot(self, name: str, snapshot: str) -> None:
        if name in self.model and snapshot in self.model[name].snapshots:
            self.run(self.catalogue.delete_snapshot(name, snapshot))
            del self.model[name].snapshots[snapshot]

    @rule(name=volumes, snapshot=snapshots, force=st.booleans())
    def rollback(self, name: str, snapshot: str, force: bool) -> None:
        modelled = self.model.get(name)
        if modelled is None or snapshot not in modelled.snapshots:
            return
        if modelled.handle is not None:
            with pytest.raises(InUseError):
                self.run(self.catalogue.rollback(name, snapshot))
            self.close_handle(modelled)
        self.run(self.catalogue.rollback(name, snapshot, force))
        modelled.content[:] = modelled.snapshots[snapshot]
        modelled.durable()

    @rule(name=volumes, source=volumes, snapshot=snapshots, more=st.integers(0, 3))
    def clone(self, name: str, source: str, snapshot: str, more: int) -> None:
        if name in self.model or source not in self.model:
            return
        content = self.model[source].snapshots.get(snapshot)
        if content is not None:
            size = len(content) + more * BLOCK
            self.run(self.catalogue.clone_volume(name, source, snapshot, size))
            self.model[name] = Modelled(content + bytes(more * BLOCK))

    @rule(name=volumes, more=st.integers(1, 5))
    def resize(self, name: str, more: int) -> None:
        modelled = self.model.get(name)
        if modelled is not None and len(modelled.content) < 2 * MAX_BLOCKS * BLOCK:
            self.close_handle(modelled)
            self.run(self.catalogue.resize_volume(name, len(modelled.content) + more * BLOCK))
            modelled.content += bytes(more * BLOCK)
            modelled.durable()

    @rule(name=volumes)
    def delete_volume(self, name: str) -> None:
        if name in self.model and len(self.model) > 1:
            self.close_handle(self.model[name])
            self.run(self.catalogue.delete_volume(name, with_snapshots=True))
            del self.model[name]

    @rule(name=volumes)
    def rename(self, name: str) -> None:
        if name in self.model:
            self.names += 1
            self.run(self.catalogue.rename_volume(name, f"n{self.names}"))
            self.run(self.catalogue.rename_volume(f"n{self.names}", name))

    @rule()
    def reopen(self) -> None:
        for modelled in self.model.values():
            self.close_handle(modelled)
        self.run(self.catalogue.close())
        self.catalogue = self.run(self.open_catalogue())

    # A crash

    @rule(
        action=st.sampled_from(["nothing", "delete", "snapshot"]),
        name=volumes,
        snapshot=snapshots,
        steps=st.integers(0, 60),
    )
    def kill(self, action: str, name: str, snapshot: str, steps: int) -> None:
        """Abandon the catalogue after some steps of an operation, and open the store again."""
        modelled = self.model.get(name)
        may_go = may_come = False
        if modelled is not None and action == "delete" and snapshot in modelled.snapshots:
            may_go = True
            operation: Any = self.catalogue.delete_snapshot(name, snapshot)
        elif modelled is not None and action == "snapshot" and snapshot not in modelled.snapshots:
            may_come = True
            operation = self.catalogue.create_snapshots([(name, snapshot)])
        else:
            operation = asyncio.sleep(0)

        async def some_steps() -> None:
            task = asyncio.ensure_future(operation)
            for _ in range(steps):
                await asyncio.sleep(0.00005 if steps % 2 else 0)
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

        self.run(some_steps())
        self.abandon()
        self.runner = asyncio.Runner()
        self.catalogue = self.run(self.open_catalogue())
        for each in self.model.values():
            each.handle = None
        if modelled is not None and (may_go or may_come):
            there = {found.name for found in self.catalogue.list_snapshots(name)}
            if may_go and snapshot not in there:
                del modelled.snapshots[snapshot]
            if may_come and snapshot in there:
                modelled.snapshots[snapshot] = bytes(modelled.content)
                modelled.durable()
        for each_name, each in self.model.items():
            self.adopt(each_name, each)

    def adopt(self, name: str, modelled: Modelled) -> None:
        """Every byte is what was flushed or what was written since; from now on, what it is."""
        found = self.run(self.read_all(self.handle(name)))
        assert len(found) == len(modelled.content)
        if found == modelled.content:
            modelled.since = [(0, bytes(modelled.content))]
            return
        for position in range(0, len(found), 64):
            byte = found[position]
            allowed = {modelled.flushed[position]} | {
                data[position - offset]
                for offset, data in modelled.since
                if offset <= position < offset + len(data)
            }
            assert byte in allowed, f"{name}: byte {position} is {byte}, not in {allowed}"
        modelled.content[:] = found
        modelled.since.append((0, found))

    # Checks

    @rule(name=volumes)
    def check_volume(self, name: str) -> None:
        if name in self.model:
            handle = self.handle(name)
            assert self.run(self.read_all(handle)) == self.model[name].content
            position = 0
            for length, holds in self.run(self.extents(handle)):
                if not holds:
                    assert not any(self.model[name].content[position : position + length])
                position += length
            assert position == handle.size

    @rule(name=volumes, where=fractions, length=lengths)
    def check_part(self, name: str, where: float, length: int) -> None:
        if name in self.model:
            offset, length = self.place(name, where, length, False)
            handle = self.handle(name)
            buffer = bytearray(length)
            if not handle.try_read(offset, memoryview(buffer)):
                self.run(handle.read(offset, memoryview(buffer)))
            assert buffer == self.model[name].content[offset : offset + length]

    @rule(name=volumes, snapshot=snapshots)
    def check_snapshot(self, name: str, snapshot: str) -> None:
        if name in self.model and snapshot in self.model[name].snapshots:
            handle = self.run(self.open_handle(name, snapshot))
            assert self.run(self.read_all(handle)) == self.model[name].snapshots[snapshot]
            self.run(self.end_handle(handle))

    @rule(name=volumes, older=snapshots, newer=st.one_of(st.none(), snapshots))
    def check_diff(self, name: str, older: str, newer: str | None) -> None:
        modelled = self.model.get(name)
        if modelled is None or older not in modelled.snapshots:
            return
        if newer is not None and newer not in modelled.snapshots:
            return
        new = bytes(modelled.content) if newer is None else modelled.snapshots[newer]
        old = modelled.snapshots[older].ljust(len(new), b"\0")
        changed = bytearray(len(new))
        for extent in self.run(self.catalogue.diff(name, older, newer)).extents:
            end = extent.offset + extent.length
            changed[extent.offset : end] = b"\1" * extent.length
            if extent.zero:
                assert not any(new[extent.offset : end])
        for block in range(0, len(new), BLOCK):
            if new[block : block + BLOCK] != old[block : block + BLOCK]:
                assert changed[block], f"block {block // BLOCK} differs but is not listed"

    @rule(name=volumes)
    def delete_newest_and_check_space(self, name: str) -> None:
        """Nothing uses space below a head that nobody but the head sees, and it hides."""
        if name in self.model:
            newest = self.catalogue.list_snapshots(name)[-1:]
            for info in newest:
                self.delete_snapshot(name, info.name)
            handle = self.handle(name)
            self.run(handle.flush())
            self.model[name].durable()
            self.check_own_layer(name, handle)

    def check_own_layer(self, name: str, handle: Handle) -> None:
        manifests = self.catalogue._manifests
        # While a merge is under way, it may copy what is hidden.
        self.run(self.catalogue._merging.merge_now())
        self.run(self.catalogue._freeing.free(manifests.get(name).id))
        layer = manifests.own_layer(manifests.get(name))
        # Where it lists nothing it may have space that was never recorded before a kill.
        regions = set() if layer is None else self.run(handle.view.regions_of(layer))
        if regions:
            owners = handle.view.owners
            found = {
                owners.raw[page]
                for page in self.store._data[layer]
                if page < owners.blocks and page >> owner_map.REGION_SHIFT in regions
            }
            assert found.isdisjoint({0, handle.view.slots_by_depth()[0]})
            own_layers.append(1)

    @precondition(lambda self: self.model)
    @invariant()
    def listed(self) -> None:
        names = {found.name for found in self.catalogue.list_snapshots()}
        expected = {name for modelled in self.model.values() for name in modelled.snapshots}
        note(f"snapshots {names}")
        assert names == expected


@pytest.mark.timeout(600 * TIMES)
def test_random_operations_match_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small limits, so that threads and syncs nobody asked for take part.
    monkeypatch.setattr(volume_module, "INLINE_WRITE", 2 * BLOCK)
    monkeypatch.setattr(volume_module, "SYNC_FROM", 8)
    run_state_machine_as_test(
        VolumeModel,
        settings=settings(
            max_examples=140 * TIMES,
            stateful_step_count=80,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert len(counted) >= OPERATIONS, f"only {len(counted)} operations were run"
    assert len(own_layers) >= 10, "hardly any layer was a head's own"
