"""Space that TRIM frees comes back while the volume goes on being used."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.local_layers import LocalLayerStore
from snapshots import punching
from snapshots.catalogue import Catalogue
from tests.snapshots.stores import BLOCK, Crash, FaultyStore, run, until
from tests.snapshots.test_volume import fill, get, opened, settled, volume_of

SIZE = 64 * BLOCK


def held(store: FaultyStore, layer: str) -> set[int]:
    """The blocks that use space."""
    return set(store._data[layer])


places = st.tuples(st.integers(0, 63), st.integers(1, 24)).map(
    lambda drawn: (drawn[0], min(drawn[1], 64 - drawn[0]))
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), places),
        st.tuples(st.just("edge"), places),
        st.tuples(st.just("trim"), places),
        st.tuples(st.just("race"), places),
        st.tuples(st.just("flush"), st.just((0, 0))),
        st.tuples(st.just("snapshot"), st.just((0, 0))),
    ),
    max_size=30,
)


@given(steps, st.integers(1, 8), st.integers(0, 1 << 16))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_writes_into_what_is_being_punched_are_never_lost(
    steps: list[tuple[str, tuple[int, int]]], locked: int, seed: int
) -> None:
    """Whenever a write comes: nothing of it is punched, and all that is nobody's gives its space
    back in the end."""
    choice = random.Random(seed)

    async def scenario() -> None:
        store = FaultyStore()
        model = bytearray(SIZE)
        async with opened(store) as (catalogue, handle):
            for number, (what, (block, count)) in enumerate(steps):
                offset, length = block * BLOCK, count * BLOCK
                data = bytes([number % 255 + 1]) * length
                if what == "edge":
                    offset, data = offset + 100, data[200:]
                if what in ("write", "edge"):
                    if not handle.try_write(offset, memoryview(data)):
                        await handle.write(offset, data)
                    model[offset : offset + len(data)] = data
                elif what == "trim":
                    await handle.trim(offset, length)
                    model[offset : offset + length] = bytes(length)
                elif what == "race":
                    await handle.trim(offset, length)
                    await handle.flush()
                    # Its space is being given back from now on, and here comes the next write.
                    for _ in range(choice.randrange(3)):
                        await asyncio.sleep(choice.choice((0, 0.0002)))
                    await handle.write(offset + length - BLOCK, data[:BLOCK])
                    model[offset : offset + length] = bytes(length - BLOCK) + data[:BLOCK]
                elif what == "flush":
                    await handle.flush()
                else:
                    await catalogue.create_snapshots([("v", f"s{number}")])
                for _ in range(choice.randrange(4)):
                    await asyncio.sleep(choice.choice((0, 0.0002)))
            await handle.flush()
            await settled(handle)
            assert await get(handle, 0, 64) == model
            head = volume_of(handle).head
            owned = {
                block
                for start, end, slot in volume_of(handle).owners.runs(0, 64)
                if slot == head.slot
                for block in range(start, end)
            }
            assert held(store, head.layer.name) == owned
        async with opened(store) as (_, handle):
            assert await get(handle, 0, 64) == model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(punching, "_LOCKED", locked)
        patch.setattr(punching, "_LOOKED_UP", 2 * locked)
        patch.setattr(punching, "LONGEST", 3)
        patch.setattr(punching, "_SECONDS", 0)
        run(scenario())


def test_requests_go_on_between_punches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punching, "LONGEST", 1)
    monkeypatch.setattr(punching, "_SECONDS", 0)

    async def scenario() -> None:
        store = FaultyStore()
        entered, go = threading.Event(), threading.Event()
        async with opened(store) as (_, handle):
            await handle.write(0, fill(1, 64))
            await handle.flush()
            await handle.trim(0, SIZE)
            count = 0

            def hook(kind: str, layer: str, detail: Any) -> None:
                nonlocal count
                if kind == "punch":
                    count += 1
                    if count == 10:
                        entered.set()
                        store.guard.release()
                        go.wait(30)
                        store.guard.acquire()

            store.hook = hook
            await handle.flush()
            await until(entered.is_set)
            # The tenth of 64 blocks is being punched, the next few are locked, others are not.
            assert handle.try_write(60 * BLOCK, memoryview(fill(8)))
            assert not handle.try_write(12 * BLOCK, memoryview(fill(7)))
            writing = asyncio.ensure_future(handle.write(12 * BLOCK, fill(7)))
            await handle.flush()
            assert await get(handle, 0, 64) == bytes(60 * BLOCK) + fill(8) + bytes(3 * BLOCK)
            await asyncio.sleep(0.01)
            assert not writing.done()
            go.set()
            await writing
            assert count < 20, "it got its turn before all was punched"
            await settled(handle)
            assert held(store, volume_of(handle).head.layer.name) == {12, 60}
            assert await get(handle, 12) == fill(7)

    run(scenario())


def test_what_waits_to_be_punched_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punching, "MOST_WAITING", 4)

    async def scenario() -> None:
        store = FaultyStore()
        go = threading.Event()
        async with opened(store) as (_, handle):
            await handle.write(0, fill(1, 64))

            def hook(kind: str, layer: str, detail: Any) -> None:
                if kind == "punch":
                    store.guard.release()
                    go.wait(30)
                    store.guard.acquire()

            store.hook = hook
            for block in range(0, 64, 4):
                await handle.trim(block * BLOCK, BLOCK)
            await handle.flush()
            last = asyncio.ensure_future(handle.trim(BLOCK, BLOCK))
            await asyncio.sleep(0.02)
            assert not last.done()
            assert handle.try_write(2 * BLOCK, memoryview(fill(9)))
            go.set()
            await last
            await handle.flush()
            await settled(handle)
            assert held(store, volume_of(handle).head.layer.name) == {
                block for block in range(2, 64) if block % 4
            }

    run(scenario())


def test_a_punch_that_fails_costs_space_only() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            await handle.write(0, fill(1, 64))

            def hook(kind: str, layer: str, detail: Any) -> None:
                if kind == "punch":
                    raise OSError(errno.EIO, "no")

            store.hook = hook
            await handle.trim(0, 32 * BLOCK)
            await handle.flush()
            await settled(handle)
            assert volume_of(handle).failure is None
            await handle.write(0, fill(2))
            await handle.flush()
            assert await get(handle, 0, 64) == fill(2) + fill(0, 31) + fill(1, 32)
            store.hook = lambda *_: None
            await handle.trim(32 * BLOCK, 32 * BLOCK)
            await handle.flush()
            await settled(handle)
            assert held(store, volume_of(handle).head.layer.name) == set(range(32))

    run(scenario())


def test_freed_space_comes_back_on_a_real_file_system(tmp_path: Path) -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        size = 2 << 40
        await catalogue.create_volume("v", size)
        handle: Any = await catalogue.open_volume("v", lambda: None)
        chosen = random.Random(1).sample(range(size >> 16), 100)
        places = [*(place << 16 for place in chosen), (1 << 40) - 32768]
        for offset in places:
            await handle.write(offset, os.urandom(65536))
        # Allocated but never written, which SEEK_DATA would call a hole.
        await handle.write_zeroes(3 << 30, 20 << 20, no_hole=True)
        await handle.flush()
        assert handle.view.head.data.allocated() >= 26 << 20
        await handle.trim(0, size)
        await handle.write(places[0], b"\7" * BLOCK)
        await handle.flush()
        await settled(handle)
        assert handle.view.head.data.allocated() <= 1 << 20
        buffer = bytearray(65536)
        await handle.read(places[0], memoryview(buffer))
        assert buffer == b"\7" * BLOCK + bytes(65536 - BLOCK)
        # Nothing is noted of what was trimmed already.
        await handle.trim(places[0] + BLOCK, size - places[0] - BLOCK)
        assert handle.view.head.pending == []

        # What a snapshot holds is hidden, and stays.
        await handle.write(places[1], b"\1" * 65536)
        await catalogue.create_snapshots([("v", "s")])
        await handle.trim(0, size)
        await handle.flush()
        await settled(handle)
        assert handle.extents(0, size, 9) == [(size, False)]
        snapshot: Any = await catalogue.open_snapshot("v", "s", lambda: None)
        await snapshot.read(places[1], memoryview(buffer))
        assert buffer == b"\1" * 65536
        for each in (handle, snapshot):
            await catalogue.close_export(each)
        await catalogue.close()

    run(scenario())


def test_a_volume_is_closed_before_all_is_punched_and_the_rest_is_punched_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(punching, "LONGEST", 1)
    monkeypatch.setattr(punching, "GRACE", 0.05)

    async def scenario() -> None:
        store = FaultyStore()

        def hook(kind: str, layer: str, detail: Any) -> None:
            if kind == "punch":
                store.guard.release()
                time.sleep(0.01)
                store.guard.acquire()

        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        handle: Any = await catalogue.open_volume("v", lambda: None)
        await handle.write(0, fill(1, 64))
        await handle.flush()
        store.hook = hook
        await handle.trim(0, SIZE)
        await handle.flush()
        layer = volume_of(handle).head.layer.name
        await catalogue.close_export(handle)
        left = held(store, layer)
        assert 0 < len(left) < 64
        store.hook = lambda kind, layer, detail: None
        await asyncio.sleep(0.05)
        assert held(store, layer) == left, "nothing goes on behind a closed volume"
        handle = await catalogue.open_volume("v", lambda: None)
        await settled(handle)
        assert held(store, layer) == set()
        assert await get(handle, 0, 64) == bytes(SIZE)
        await catalogue.close_export(handle)
        await catalogue.close()

    run(scenario())


@pytest.mark.parametrize("how", ["kill", "cut", "mixed"])
def test_space_that_a_crash_left_unpunched_comes_back(how: str) -> None:
    async def before(store: FaultyStore) -> None:
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        handle: Any = await catalogue.open_volume("v", lambda: None)
        await handle.write(0, fill(1, 64))
        await handle.flush()
        await handle.trim(0, 20 * BLOCK)
        await handle.trim(30 * BLOCK, 10 * BLOCK)
        await handle.write(10 * BLOCK, fill(2))
        punched = 0

        def hook(kind: str, layer: str, detail: Any) -> None:
            nonlocal punched
            if kind == "punch":
                punched += 1
                if punched == 2:
                    raise Crash

        store.hook = hook
        await handle.flush()
        await until(lambda: store.dead)

    async def after(store: FaultyStore) -> None:
        async with opened(store) as (_, handle):
            # Written while it is looked for.
            assert handle.try_write(35 * BLOCK, memoryview(fill(3)))
            await settled(handle)
            layer = volume_of(handle).head.layer.name
            kept = {10, *range(20, 30), 35, *range(40, 64)}
            assert held(store, layer) == kept
            content = await get(handle, 0, 64)
            for block in range(64):
                wanted = {10: 2, 35: 3}.get(block, 1) if block in kept else 0
                assert content[block * BLOCK : (block + 1) * BLOCK] == fill(wanted)
            await handle.flush()
        # It is done: another start finds nothing, and punches nothing.
        store.events.clear()
        async with opened(store) as (_, handle):
            await settled(handle)
            assert not store.kinds("punch")

    store = FaultyStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(punching, "LONGEST", 4)
        run(before(store))
        run(after(store.after_crash(how, seed=3)))
