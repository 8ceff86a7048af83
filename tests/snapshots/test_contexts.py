"""Metadata contexts: no changed block is ever called clean, whatever is done to a volume.

Hypothesis drives the operations of test_model.py on volumes whose clients, and those of their
snapshots, have every context open for as long as they live: over snapshots that come and go, merges
under way and finished, rollbacks, clones, new sizes. What they are told is held against copies of
the content.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import rule, run_state_machine_as_test

from backends.errors import InUseError, NotFoundError
from snapshots import hidden, owner_map
from snapshots import volume as volume_module
from snapshots.catalogue import Catalogue
from snapshots.contexts import ALLOCATION_DEPTH, context_names
from snapshots.handle import Handle
from snapshots.owner_map import OwnerMap
from tests.snapshots.stores import BLOCK, FaultyStore, run
from tests.snapshots.test_model import VolumeModel, fractions, lengths, snapshots, volumes

GIB = 1 << 30
TIB = 1 << 40
SIZE = 16 * BLOCK
ALL = 1 << 30


def dirty(snapshot: str) -> str:
    return f"qemu:dirty-bitmap:{snapshot}"


def ask(
    call: Callable[[int, int, int], list[tuple[int, Any]]], start: int, end: int, limit: int = ALL
) -> Iterator[tuple[int, int, Any]]:
    """(start, end, status) of a range, asked for again behind each answer."""
    while start < end:
        runs = call(start, end - start, limit)
        assert 1 <= len(runs) <= limit
        assert all(one[1] != other[1] for one, other in itertools.pairwise(runs))
        for length, status in runs:
            assert length > 0
            yield start, start + length, status
            start += length
        assert start <= end


def statuses(handle: Handle, context: str, limit: int = ALL) -> list[int]:
    """The status of every block."""
    found: list[int] = []
    runs = ask(lambda *asked: handle.status(context, *asked), 0, handle.size, limit)
    for start, end, status in runs:
        found += [status] * ((end - start) // BLOCK)
    return found


def changed(handle: Handle, snapshot: str) -> list[int]:
    """The blocks that may differ from a snapshot."""
    found = statuses(handle, dirty(snapshot))
    assert set(found) <= {0, 1}
    return [block for block, status in enumerate(found) if status]


def differing(new: bytes, old: bytes) -> set[int]:
    """The blocks that do."""
    old = old.ljust(len(new), b"\0")
    return {
        at // BLOCK
        for at in range(0, len(new), BLOCK)
        if new[at : at + BLOCK] != old[at : at + BLOCK]
    }


class Held:
    """A handle with its contexts, and what the snapshots that they compare with held."""

    def __init__(self, handle: Handle, bases: dict[str, bytes]) -> None:
        self.handle = handle
        self.bases = bases


counted = {"changed": 0, "same": 0, "gone": 0, "merging": 0}


class ContextsModel(VolumeModel):
    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Held] = {}
        self.snapshot_handles: dict[tuple[str, str], Handle] = {}

    # Every handle has all contexts

    async def open_handle(self, name: str, snapshot: str | None = None) -> Any:
        contexts = self.catalogue.volume_contexts(name)
        bases = self.model[name].snapshots
        assert sorted(contexts) == sorted(context_names(bases))
        if snapshot is None:
            lease = await self.catalogue.open_volume(name, lambda: None, contexts)
        else:
            lease = await self.catalogue.open_snapshot(name, snapshot, lambda: None, contexts)
        assert isinstance(lease, Handle)
        self.held[id(lease)] = Held(lease, dict(bases))
        return lease

    async def end_handle(self, handle: Any) -> None:
        del self.held[id(handle)]
        await super().end_handle(handle)

    async def extents(self, handle: Any) -> list[tuple[int, bool]]:
        return [(end - start, data) for start, end, data in ask(handle.extents, 0, handle.size)]

    def abandon(self) -> None:
        self.held.clear()
        self.snapshot_handles.clear()
        super().abandon()

    def teardown(self) -> None:
        self.let_go(lambda name, snapshot: True)
        super().teardown()

    def reconnect(self, name: str) -> None:
        """Open a volume again, with the contexts that it has now; its view stays open."""
        modelled = self.model[name]
        old = self.handle(name)
        modelled.handle = self.run(self.open_handle(name))
        self.run(self.end_handle(old))

    @rule(
        name=volumes,
        steps=st.lists(
            st.tuples(
                st.sampled_from(["write", "write", "trim", "take", "take", "delete", "rollback"]),
                snapshots,
                fractions,
                st.integers(1, 4),
            ),
            min_size=6,
            max_size=24,
        ),
    )
    def live(self, name: str, steps: list[tuple[str, str, float, int]]) -> None:
        """Much happens to one volume, and clients come and go all the time."""
        if name not in self.model:
            return
        taken = self.model[name].snapshots
        for what, snapshot, where, blocks in steps:
            if what == "write":
                self.write(name, where, blocks * BLOCK, True, blocks)
            elif what == "trim":
                self.zero(name, where, blocks * BLOCK, True, 0)
            elif what == "take" and snapshot not in taken:
                self.snapshot({name}, snapshot)
            elif what == "delete":
                self.delete_snapshot(name, snapshot)
            elif what == "rollback":
                self.rollback(name, snapshot, False)
            self.reconnect(name)
            if taken:
                self.hold_snapshot(name, sorted(taken)[blocks % len(taken)])
            self.check_all()

    @rule(
        name=volumes,
        snapshot=snapshots,
        places=st.lists(st.tuples(fractions, st.integers(1, 4)), min_size=1, max_size=6),
        before=st.integers(0, 6),
    )
    def write_around_a_gate(
        self, name: str, snapshot: str, places: list[tuple[float, int]], before: int
    ) -> None:
        """Writes in threads that begin and end on either side of a snapshot's gate."""
        modelled = self.model.get(name)
        if modelled is None or snapshot in modelled.snapshots:
            return
        handle = self.handle(name)
        found = (self.place(name, where, blocks * BLOCK, True) for where, blocks in places)
        taken = bytearray(handle.size)
        writes: list[tuple[int, bytes]] = []
        for offset, length in found:
            if not any(taken[offset : offset + length]):
                taken[offset : offset + length] = b"\1" * length
                writes.append((offset, bytes([100 + len(writes)]) * length))

        async def scene() -> bytes:
            started = [asyncio.ensure_future(handle.write(*each)) for each in writes[:before]]
            await asyncio.sleep(0)
            taking = asyncio.ensure_future(self.catalogue.create_snapshots([(name, snapshot)]))
            for each in writes[before:]:
                await asyncio.sleep(0.0002)
                started.append(asyncio.ensure_future(handle.write(*each)))
            await asyncio.gather(taking, *started)
            opened = await self.catalogue.open_snapshot(name, snapshot, lambda: None)
            assert isinstance(opened, Handle)
            try:
                return await self.read_all(opened)
            finally:
                await self.catalogue.close_export(opened)

        # Each is in the snapshot or is not: it tells.
        content = self.run(scene())
        for offset, data in writes:
            old = bytes(modelled.content[offset : offset + len(data)])
            assert content[offset : offset + len(data)] in (old, data)
            modelled.put(offset, data)
        modelled.snapshots[snapshot] = content
        self.reconnect(name)
        self.check_all()

    # Snapshots that stay open

    @rule(name=volumes, snapshot=snapshots)
    def hold_snapshot(self, name: str, snapshot: str) -> None:
        if name in self.model and snapshot in self.model[name].snapshots:
            self.let_go(lambda *held: held == (name, snapshot))
            self.snapshot_handles[name, snapshot] = self.run(self.open_handle(name, snapshot))

    def let_go(self, which: Callable[[str, str], bool]) -> None:
        for key in [key for key in self.snapshot_handles if which(*key)]:
            self.run(self.end_handle(self.snapshot_handles.pop(key)))

    @rule(name=volumes, snapshot=snapshots)
    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """With everybody asking all the time."""
        if name not in self.model or snapshot not in self.model[name].snapshots:
            return
        if (name, snapshot) in self.snapshot_handles:
            with pytest.raises(InUseError):
                self.run(self.catalogue.delete_snapshot(name, snapshot))
            self.let_go(lambda *held: held == (name, snapshot))

        async def scene() -> None:
            deletion = asyncio.ensure_future(self.catalogue.delete_snapshot(name, snapshot))
            while not deletion.done():
                counted["merging"] += bool(self.catalogue._manifests.merges)
                self.check_all(going=self.model[name].snapshots[snapshot])
                await asyncio.sleep(0)
            await deletion

        self.run(scene())
        del self.model[name].snapshots[snapshot]

    @rule(name=volumes)
    def delete_volume(self, name: str) -> None:
        if len(self.model) > 1:
            self.let_go(lambda volume, _: volume == name)
        super().delete_volume(name)

    @rule()
    def reopen(self) -> None:
        self.let_go(lambda name, snapshot: True)
        super().reopen()

    # Checks

    @rule()
    def check_contexts(self) -> None:
        self.check_all()

    def check_all(self, going: bytes | None = None) -> None:
        """What every open handle is told; ``going`` is of a snapshot that is being deleted."""
        for name, modelled in self.model.items():
            if modelled.handle is not None:
                self.check_held(name, modelled.handle, bytes(modelled.content), going)
        for (name, snapshot), handle in self.snapshot_handles.items():
            self.check_held(name, handle, self.model[name].snapshots[snapshot], going)

    def check_held(self, name: str, handle: Handle, content: bytes, going: bytes | None) -> None:
        for snapshot, base in self.held[id(handle)].bases.items():
            is_there = self.model[name].snapshots.get(snapshot) is base
            try:
                found = changed(handle, snapshot)
            except OSError as error:
                assert not is_there or base is going
                assert error.errno == errno.EIO
                assert f"snapshot {snapshot} was deleted" in str(error)
                counted["gone"] += 1
                continue
            assert is_there, "a snapshot that is gone was compared with"
            assert differing(content, base) <= set(found)
            counted["changed" if found else "same"] += 1
        depths = statuses(handle, ALLOCATION_DEPTH)
        holds = [
            bool(data)
            for start, end, data in ask(handle.extents, 0, handle.size)
            for _ in range(start, end, BLOCK)
        ]
        assert [depth > 0 for depth in depths] == holds
        assert max(depths) <= len(handle.view.stack)

    @rule(
        name=volumes,
        snapshot=snapshots,
        where=fractions,
        length=lengths,
        limit=st.integers(1, 3),
    )
    def check_part_of_context(
        self, name: str, snapshot: str, where: float, length: int, limit: int
    ) -> None:
        """A part is told as it is told in the whole, at any offset and limit."""
        if name not in self.model:
            return
        offset, length = self.place(name, where, length, False)
        handle = self.handle(name)
        for context in (ALLOCATION_DEPTH, dirty(snapshot)):
            if context != ALLOCATION_DEPTH:
                base = self.held[id(handle)].bases.get(snapshot)
                if base is None or self.model[name].snapshots.get(snapshot) is not base:
                    continue
            whole = statuses(handle, context)

            def status(*asked: int, context: str = context) -> list[tuple[int, int]]:
                return handle.status(context, *asked)

            for start, end, found in ask(status, offset, offset + length, limit):
                blocks = range(start // BLOCK, -(-end // BLOCK))
                assert {whole[block] for block in blocks} == {found}

    @rule(name=volumes, snapshot=snapshots)
    def check_nothing_else_is_dirty(self, name: str, snapshot: str) -> None:
        """What no layer since has touched is clean."""
        if name not in self.model:
            return
        handle = self.handle(name)
        base = self.held[id(handle)].bases.get(snapshot)
        if base is None or self.model[name].snapshots.get(snapshot) is not base:
            return
        touched = {
            block
            for extent in self.run(self.catalogue.diff(name, snapshot)).extents
            for block in range(extent.offset // BLOCK, (extent.offset + extent.length) // BLOCK)
        }
        assert set(changed(handle, snapshot)) <= touched


@pytest.fixture
def small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions of four blocks, two of them at a time: then a few blocks are many regions."""
    for module in (owner_map, hidden):
        monkeypatch.setattr(module, "REGION_SHIFT", 2)
        monkeypatch.setattr(module, "REGION", 4)
    monkeypatch.setattr(owner_map, "_EMPTY", bytes(4))
    monkeypatch.setattr(owner_map, "REACH", 2)

    def clear(self: OwnerMap, first: int, last: int) -> None:
        """Without giving memory back, which goes by pages."""
        self.raw[first:last] = bytes(last - first)

    monkeypatch.setattr(OwnerMap, "_clear", clear)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("small_regions")
def test_no_changed_block_is_ever_called_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_module, "INLINE_WRITE", 2 * BLOCK)
    monkeypatch.setattr(volume_module, "SYNC_FROM", 8)
    run_state_machine_as_test(
        ContextsModel,
        settings=settings(
            max_examples=40,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert all(counted.values()), f"something was never tried: {counted}"


# What they say, case by case


@asynccontextmanager
async def opened(size: int = SIZE) -> AsyncIterator[Catalogue]:
    """A catalogue with a volume v, and nothing left open at its end."""
    catalogue = await Catalogue.open(FaultyStore())
    try:
        await catalogue.create_volume("v", size)
        yield catalogue
        assert not catalogue._views._open
    finally:
        await catalogue.close()


@asynccontextmanager
async def client(
    catalogue: Catalogue, name: str = "v", contexts: tuple[str, ...] | None = None
) -> AsyncIterator[Handle]:
    """An open volume or snapshot, with all contexts unless they are named."""
    volume, _, snapshot = name.partition("@")
    if contexts is None:
        contexts = catalogue.volume_contexts(volume)
    if snapshot:
        lease = await catalogue.open_snapshot(volume, snapshot, lambda: None, contexts)
    else:
        lease = await catalogue.open_volume(volume, lambda: None, contexts)
    assert isinstance(lease, Handle)
    try:
        yield lease
    finally:
        await catalogue.close_export(lease)


async def write(handle: Handle, *blocks: int) -> None:
    for block in blocks:
        await handle.write(block * BLOCK, b"\x99" * BLOCK)


def test_writes_trims_and_zeroes_since_a_snapshot_show_at_the_next_request() -> None:
    async def scene() -> None:
        async with opened() as catalogue, client(catalogue) as first:
            await write(first, 1, 2, 3, 4)
            await catalogue.create_snapshots([("v", "s")])
            async with client(catalogue) as second:
                assert changed(second, "s") == []
                await first.write(2 * BLOCK + 7, b"a part of a block")
                assert changed(second, "s") == [2]
                await first.trim(3 * BLOCK, 4 * BLOCK)  # of which two blocks held nothing
                assert changed(second, "s") == [2, 3, 4]
                await first.write_zeroes(9 * BLOCK, BLOCK, no_hole=True)
                await first.write_zeroes(10 * BLOCK, BLOCK, no_hole=False)
                assert changed(second, "s") == [2, 3, 4, 9]
                await write(second, 15)
                assert changed(second, "s") == [2, 3, 4, 9, 15]
                await first.trim(15 * BLOCK, BLOCK)  # it is as it was
                assert changed(second, "s") == [2, 3, 4, 9]

    run(scene())


def test_snapshots_are_compared_with_older_younger_and_abandoned_ones() -> None:
    async def scene() -> None:
        async with opened() as catalogue:
            for block, snapshot in enumerate(("one", "two", "three")):
                async with client(catalogue) as handle:
                    await write(handle, block)
                await catalogue.create_snapshots([("v", snapshot)])
            await catalogue.rollback("v", "one")
            async with client(catalogue) as handle:
                await write(handle, 5)
                assert [changed(handle, name) for name in ("one", "two", "three")] == [
                    [5],
                    [1, 5],
                    [1, 2, 5],
                ]
            await catalogue.create_snapshots([("v", "other")])
            async with client(catalogue, "v@two") as handle:
                assert [changed(handle, name) for name in ("one", "two", "three", "other")] == [
                    [1],
                    [],
                    [2],
                    [1, 5],
                ]

    run(scene())


def test_what_lies_behind_the_end_of_a_smaller_snapshot_counts_where_it_holds_data() -> None:
    async def scene() -> None:
        async with opened() as catalogue:
            async with client(catalogue) as handle:
                await write(handle, 15)
            await catalogue.create_snapshots([("v", "small")])
            await catalogue.resize_volume("v", 2 * SIZE)
            async with client(catalogue) as handle:
                assert changed(handle, "small") == []
                await write(handle, 16, 31)
                assert changed(handle, "small") == [16, 31]
            await catalogue.create_snapshots([("v", "large")])
            await catalogue.rollback("v", "small")
            async with client(catalogue) as handle:
                assert handle.size == SIZE
                assert changed(handle, "large") == []
                await catalogue.resize_volume("v", 2 * SIZE)
                assert handle.size == 2 * SIZE
                assert changed(handle, "large") == [16, 31]
            async with client(catalogue) as handle:
                assert changed(handle, "large") == [16, 31]

    run(scene())


def test_a_depth_is_counted_from_the_top_and_a_next_head_counts_for_nothing() -> None:
    async def scene() -> None:
        async with opened() as catalogue:
            for block, snapshot in enumerate(("one", "two")):
                async with client(catalogue) as handle:
                    await write(handle, *range(block, 4))
                await catalogue.create_snapshots([("v", snapshot)])
            async with client(catalogue) as handle:
                await write(handle, 3)
                await handle.trim(2 * BLOCK, BLOCK)
                assert statuses(handle, ALLOCATION_DEPTH) == [3, 2, 0, 1] + [0] * 12
                opened_view, *_ = catalogue._views._leases[handle]
                await catalogue._views.add_head(opened_view, "next")
                assert len(handle.view.stack) == 4
                assert statuses(handle, ALLOCATION_DEPTH) == [3, 2, 0, 1] + [0] * 12
                await catalogue._views.remove_head(opened_view, "next")
            async with client(catalogue, "v@two") as handle:
                assert statuses(handle, ALLOCATION_DEPTH) == [2, 1, 1, 1] + [0] * 12

    run(scene())


def test_a_snapshot_that_is_compared_with_can_be_deleted_and_its_context_fails_from_then_on() -> (
    None
):
    async def scene() -> None:
        async with opened() as catalogue:
            async with client(catalogue) as handle:
                await write(handle, 1, 2)
            await catalogue.create_snapshots([("v", "s")])
            async with client(catalogue) as volume, client(catalogue, "v@s") as reader:
                await write(volume, 2, 3)
                with pytest.raises(InUseError, match="v@s is open"):
                    await catalogue.delete_snapshot("v", "s")
                assert changed(volume, "s") == [2, 3]
                assert changed(reader, "s") == []
            await catalogue.create_snapshots([("v", "t")])
            async with client(catalogue) as volume, client(catalogue, "v@t") as snapshot:
                await catalogue.delete_snapshot("v", "s")
                assert not catalogue._manifests.merges
                await catalogue.create_snapshots([("v", "s")])  # another one
                for handle in (volume, snapshot):
                    with pytest.raises(OSError, match="snapshot s was deleted") as failure:
                        handle.status(dirty("s"), 0, SIZE, 1)
                    assert failure.value.errno == errno.EIO
                    assert changed(handle, "t") == []
                    assert statuses(handle, ALLOCATION_DEPTH)
            async with client(catalogue) as volume:
                assert changed(volume, "s") == []

    run(scene())


def test_an_open_that_fails_leaves_nothing_open() -> None:
    async def scene() -> None:
        async with opened() as catalogue:
            await catalogue.create_snapshots([("v", "s")])
            with pytest.raises(NotFoundError, match="snapshot v@gone does not exist"):
                async with client(catalogue, contexts=(dirty("s"), dirty("gone"))):
                    pass
            assert not catalogue._views._open
            found = catalogue._manifests.get("v").snapshots[0].layer
            store = catalogue._store
            assert isinstance(store, FaultyStore)
            content = store._logs[found].copy()
            store._logs[found].clear()
            with pytest.raises(NotFoundError, match="the layer cannot be read"):
                async with client(catalogue):
                    pass
            assert not catalogue._views._open
            store._logs[found].update(content)
            async with client(catalogue) as handle:
                assert changed(handle, "s") == []

    run(scene())


def test_views_that_are_compared_with_are_shared_and_closed_with_the_last_client() -> None:
    async def scene() -> None:
        async with opened() as catalogue:
            await catalogue.create_snapshots([("v", "s")])
            async with client(catalogue) as one:
                async with client(catalogue) as two:
                    assert one.bases[dirty("s")] is two.bases[dirty("s")]
                    assert len(catalogue._views._open) == 2
                assert changed(one, "s") == []
                async with client(catalogue, contexts=(ALLOCATION_DEPTH,)):
                    assert (await catalogue.show_volume("v")).clients == 2
            assert not catalogue._views._open
            with pytest.raises(InUseError):
                async with client(catalogue, "v@s"):
                    await catalogue.delete_volume("v", with_snapshots=True)

    run(scene())


def test_eight_tebibytes_are_one_answer_unless_much_was_touched() -> None:
    async def scene() -> None:
        size = 8 * TIB
        async with opened(size) as catalogue:
            async with client(catalogue) as handle:
                await write(handle, 0, size // BLOCK - 1)
            await catalogue.create_snapshots([("v", "s")])
            async with client(catalogue) as handle:
                await write(handle, TIB // BLOCK)
                assert handle.status(dirty("s"), 0, size, 4096) == [
                    (TIB, 0),
                    (BLOCK, 1),
                    (7 * TIB - BLOCK, 0),
                ]
                assert handle.status(ALLOCATION_DEPTH, 0, size, 4096) == [
                    (BLOCK, 2),
                    (TIB - BLOCK, 0),
                    (BLOCK, 1),
                    (7 * TIB - 2 * BLOCK, 0),
                    (BLOCK, 2),
                ]
                await write(handle, *range(0, size // BLOCK, 32 * GIB // BLOCK))
                for context in (dirty("s"), ALLOCATION_DEPTH):
                    runs = handle.status(context, 0, size, 4096)
                    assert sum(length for length, _ in runs) == owner_map.REACH * 32 * GIB
                    assert [status for _, status in runs] == [1, 0] * (len(runs) // 2)
                    assert sum(statuses_of(handle, context, 1)) == 256 * BLOCK

    run(scene())


def statuses_of(handle: Handle, context: str, wanted: int) -> Iterator[int]:
    """The lengths of all runs with a status."""
    runs = ask(lambda *asked: handle.status(context, *asked), 0, handle.size)
    return (end - start for start, end, status in runs if status == wanted)
