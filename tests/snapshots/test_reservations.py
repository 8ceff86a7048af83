"""Reserved space: a volume can write what is reserved for it, whatever others have done before."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import InvalidError, NoSpaceError
from snapshots import rationing as rationing_module
from snapshots import reservations as reservations_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.manifest import Manifest, unpack_manifest
from snapshots.space import SpacePolicy
from snapshots.space_watch import Threshold
from tests.snapshots.stores import BLOCK, FaultyStore, run

MIB = 1 << 20
SIZE = 8 * MIB
BLOCKS = SIZE // BLOCK


@pytest.fixture(autouse=True, scope="module")
def _small_margins() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rationing_module, "MARGIN", 64 * BLOCK)
        patch.setattr(rationing_module, "_AMPLE", 256 * BLOCK)
        patch.setattr(rationing_module, "_STEP", 4 * BLOCK)
        patch.setattr(reservations_module, "_MORE", MIB)
        patch.setattr(reservations_module, "_NEAR", 4 * BLOCK)
        yield


class Disks:
    """A catalogue on a small store, and what its volumes hold."""

    def __init__(self, store: FaultyStore) -> None:
        self.store = store
        self.handles: dict[str, Handle] = {}
        self.content: dict[str, dict[int, int]] = {}
        self.numbers = 0

    async def open(self) -> None:
        self.catalogue = await Catalogue.open(self.store)
        self.catalogue.space.policy = SpacePolicy(min_free=Threshold())
        for name in self.catalogue.volume_names():
            await self.connect(name)

    async def connect(self, name: str) -> None:
        lease = await self.catalogue.open_volume(name, lambda: None)
        assert isinstance(lease, Handle)
        self.handles[name] = lease
        self.content.setdefault(name, {})

    async def create(self, name: str, reserve: int = 0) -> None:
        await self.catalogue.create_volume(name, SIZE, reserve=reserve)
        await self.connect(name)

    async def write(self, name: str, first: int, blocks: int = 1) -> None:
        """ENOSPC as the volume has it; then nothing has changed."""
        self.numbers += 1
        value = self.numbers % 255 + 1
        handle = self.handles[name]
        data = memoryview(bytes([value]) * (blocks * BLOCK))
        if not handle.try_write(first * BLOCK, data):
            await handle.write(first * BLOCK, data)
        self.content[name].update(dict.fromkeys(range(first, first + blocks), value))

    async def trim(self, name: str, first: int, blocks: int) -> None:
        await self.handles[name].trim(first * BLOCK, blocks * BLOCK)
        for block in range(first, first + blocks):
            self.content[name].pop(block, None)
        await self.handles[name].flush()

    async def fill(self, name: str) -> int:
        """Write new places until there is no space, or none left; how many blocks that were."""
        before = len(self.content[name])
        for step in (32, 1):
            for block in range(0, BLOCKS, step):
                if self.content[name].keys().isdisjoint(range(block, block + step)):
                    try:
                        await self.write(name, block, step)
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
                        break
        return len(self.content[name]) - before

    async def check(self) -> None:
        for name, content in self.content.items():
            buffer = bytearray(SIZE)
            await self.handles[name].read(0, memoryview(buffer))
            for block in range(BLOCKS):
                piece = buffer[block * BLOCK : (block + 1) * BLOCK]
                assert piece == bytes([content.get(block, 0)]) * BLOCK, (name, block)

    async def left(self, name: str) -> int:
        """Bytes that the reservation of a volume still promises."""
        manifest = self.catalogue._manifests.get(name)
        return max(0, manifest.reserve - await self.store.allocated(manifest.head))

    async def use_up(self, name: str) -> None:
        """Write what is promised to new places."""
        blocks = await self.left(name) // BLOCK
        places = [block for block in range(BLOCKS) if block not in self.content[name]]
        for block in places[:blocks]:
            await self.write(name, block)
        await self.handles[name].flush()

    async def close(self) -> None:
        for handle in self.handles.values():
            await self.catalogue.close_export(handle)
        await self.catalogue.close()


def test_what_is_reserved_can_be_written_when_others_have_filled_the_disk() -> None:
    async def scenario() -> None:
        disks = Disks(FaultyStore(12 * MIB))
        await disks.open()
        await disks.create("ours", 4 * MIB)
        await disks.create("other")
        assert await disks.fill("other") > 100
        assert await disks.left("ours") > 3 * MIB
        await disks.use_up("ours")
        with pytest.raises(OSError, match="no space left"):
            await disks.write("other", BLOCKS - 1)
        # What needs no space goes on, for both.
        await disks.write("other", 0)
        await disks.trim("other", 1, 1)
        await disks.check()
        # Beyond it, a volume is as any other.
        await disks.fill("ours")
        # And when there is space again, nobody is held to anything.
        disks.store.capacity += 64 * MIB
        await disks.write("other", BLOCKS - 1)
        await disks.write("ours", BLOCKS - 1)
        assert disks.handles["other"].try_write(BLOCK, memoryview(bytes(BLOCK)))
        await disks.close()

    run(scenario())


def test_two_that_have_reserved_do_not_take_from_each_other() -> None:
    async def scenario() -> None:
        disks = Disks(FaultyStore(14 * MIB))
        await disks.open()
        await disks.create("a", 2 * MIB)
        await disks.create("b", 2 * MIB)
        await disks.create("other")
        await disks.fill("other")
        left = {name: await disks.left(name) // BLOCK for name in "ab"}
        for block in range(max(left.values())):
            for name in "ab":
                if block < left[name]:
                    await disks.write(name, block)
        await disks.check()
        await disks.close()

    run(scenario())


def test_a_reservation_is_anew_at_a_snapshot_or_there_is_none() -> None:
    async def scenario() -> None:
        disks = Disks(FaultyStore(12 * MIB))
        await disks.open()
        await disks.create("ours", 3 * MIB)
        await disks.use_up("ours")
        await disks.catalogue._reservations.keep()
        assert await disks.store.list_held() == {}
        used = disks.store.used
        await disks.catalogue.create_snapshots([("ours", "one")])
        assert disks.store.used > used + 2 * MIB
        await disks.use_up("ours")
        await disks.catalogue._reservations.keep()
        disks.store.capacity = disks.store.used + 2 * MIB
        with pytest.raises(NoSpaceError, match="volume ours: to reserve 3M another"):
            await disks.catalogue.create_snapshots([("ours", "two")])
        await disks.check()
        await disks.catalogue.reserve_space("ours", 0)
        disks.store.capacity += 2 * MIB
        await disks.catalogue.create_snapshots([("ours", "two")])
        assert await disks.store.list_held() == {}
        await disks.close()

    run(scenario())


def test_what_cannot_be_reserved_is_refused_and_changes_nothing() -> None:
    async def scenario() -> None:
        disks = Disks(FaultyStore(12 * MIB))
        await disks.open()
        await disks.create("ours", MIB)
        await disks.catalogue._reservations.keep()
        held = await disks.store.list_held()
        for change, error in (
            (disks.catalogue.reserve_space("ours", SIZE + BLOCK), InvalidError),
            (disks.catalogue.reserve_space("ours", 5), InvalidError),
            (disks.catalogue.create_volume("big", 1 << 40, reserve=1 << 30), NoSpaceError),
            (disks.catalogue.create_volume("big", MIB, reserve=2 * MIB), InvalidError),
        ):
            with pytest.raises(error):
                await change
            await disks.catalogue._reservations.keep()
            assert await disks.store.list_held() == held
            assert disks.catalogue.volume_names() == ["ours"]
        disks.store.capacity = disks.store.used + MIB
        with pytest.raises(NoSpaceError, match="are free: make room, or reserve less"):
            await disks.catalogue.reserve_space("ours", 6 * MIB)
        assert (await disks.catalogue.show_volume("ours")).reserved == MIB
        await disks.close()

    run(scenario())


def test_what_is_short_is_said_until_it_is_not() -> None:
    async def scenario() -> None:
        disks = Disks(FaultyStore(16 * MIB))
        await disks.open()
        await disks.create("ours", 3 * MIB)
        await disks.catalogue.create_snapshots([("ours", "one")])
        await disks.use_up("ours")
        disks.store.capacity = disks.store.used
        await disks.close()
        disks.handles.clear()
        # A rollback is not refused for that, but its new head has not been written yet.
        disks.store.capacity += 300 * 1024
        await disks.open()
        await disks.close()
        catalogue = await Catalogue.open(disks.store)
        disks.store.capacity = disks.store.used + MIB
        await catalogue.rollback("ours", "one")
        disks.store.capacity = disks.store.used + MIB // 2
        await catalogue._reservations.keep()
        space = await disks.store.space()
        kinds = [warning.kind for warning in catalogue.warnings(space)]
        room = await catalogue.space.measure()
        assert ("reserve" in kinds) == (room.held < 2 * MIB)
        disks.store.capacity += 64 * MIB
        await catalogue._reservations.keep()
        assert not [found for found in catalogue.warnings(space) if found.kind == "reserve"]
        await catalogue.delete_volume("ours", True)
        assert await disks.store.list_held() == {}
        await catalogue.close()

    run(scenario())


@pytest.mark.parametrize("how", ["kill", "cut", "mixed"])
def test_a_crash_loses_no_reservation(how: str) -> None:
    async def before(store: FaultyStore) -> None:
        disks = Disks(store)
        await disks.open()
        await disks.create("ours", 3 * MIB)
        await disks.create("other")
        await disks.fill("other")
        for block in range(100):
            await disks.write("ours", block)
        store._held["nobody"] = BLOCK
        store.used += BLOCK

    async def after(store: FaultyStore) -> None:
        disks = Disks(store)
        await disks.open()
        assert list(await store.list_held()) == [disks.catalogue._manifests.get("ours").id]
        assert not [w for w in disks.catalogue.warnings(await store.space()) if w.kind == "reserve"]
        disks.content = {"ours": {}, "other": {}}
        if how != "kill":
            await disks.fill("other")
        await disks.use_up("ours")
        await disks.close()

    store = FaultyStore(12 * MIB)
    run(before(store))
    run(after(store.after_crash(how)))


def test_a_manifest_without_one_is_what_it_was_before_there_were_any() -> None:
    plain = Manifest("i", "v", MIB, 1.5, 1, "a", {"a": ""})
    assert "reserve" not in plain.as_map()
    reserved = plain.changed(reserve=BLOCK)
    assert unpack_manifest(reserved.pack(), "there", "i").reserve == BLOCK
    assert unpack_manifest(plain.pack(), "there", "i").reserve == 0


EXAMPLES = int(os.environ.get("NBDSERVE_RESERVATION_EXAMPLES", "12"))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from("ab"), st.integers(0, BLOCKS - 65),
                  st.integers(1, 64)),
        st.tuples(st.just("trim"), st.sampled_from("ab"), st.integers(0, BLOCKS - 65),
                  st.integers(1, 64)),
        st.tuples(st.just("reserve"), st.sampled_from("ab"), st.integers(0, 600), st.just(0)),
        st.tuples(st.just("snapshot"), st.sampled_from("ab"), st.just(0), st.just(0)),
        st.tuples(st.just("fill"), st.sampled_from("abc"), st.just(0), st.just(0)),
        st.tuples(st.just("keep"), st.just("a"), st.just(0), st.just(0)),
        st.tuples(st.just("reopen"), st.just("a"), st.just(0), st.just(0)),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(STEPS)
def test_whatever_happens_what_is_kept_back_can_be_written(steps: list[Any]) -> None:
    async def scenario() -> None:
        disks = Disks(FaultyStore(14 * MIB))
        await disks.open()
        for name in "abc":
            await disks.create(name)
        for number, (step, name, first, blocks) in enumerate(steps):
            try:
                if step == "write":
                    await disks.write(name, first, blocks)
                elif step == "trim":
                    await disks.trim(name, first, blocks)
                elif step == "reserve":
                    await disks.catalogue.reserve_space(name, first * BLOCK)
                elif step == "snapshot":
                    await disks.catalogue.create_snapshots([(name, f"s{number}")])
                elif step == "fill":
                    await disks.fill(name)
                elif step == "keep":
                    await disks.catalogue._reservations.keep()
                else:
                    await disks.close()
                    await disks.open()
            except OSError as error:
                assert error.errno == errno.ENOSPC
            except NoSpaceError:
                pass
        await disks.check()
        await disks.catalogue._reservations.keep()
        warnings = disks.catalogue.warnings(await disks.store.space())
        short = {found.message.split()[1] for found in warnings if found.kind == "reserve"}
        await disks.fill("c")
        for name in "ab":
            if f"{name}:" not in short:
                await disks.use_up(name)
        await disks.check()
        await disks.close()

    run(scenario())
