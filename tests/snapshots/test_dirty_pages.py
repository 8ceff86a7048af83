"""Volumes whose disk does not keep up: their writes are held, nothing else is."""

from __future__ import annotations

import asyncio
import errno
import mmap
from pathlib import Path
from typing import Any

import pytest

from snapshots import dirty_pages
from snapshots.catalogue import Catalogue
from snapshots.dirty_pages import read_room
from snapshots.handle import Handle
from tests.snapshots.stores import BLOCK, FaultyStore, run, until
from tests.snapshots.test_volume import fill, get, opened, settled, volume_of

SHARE = 8 * BLOCK


@pytest.fixture(autouse=True)
def small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_pages, "LEAST_SHARE", SHARE)
    monkeypatch.setattr(dirty_pages, "_MEASURE_SECONDS", 0.001)
    monkeypatch.setattr(dirty_pages, "read_room", lambda: 0)


async def write_until_held(handle: Handle) -> None:
    block = 0
    while handle.try_write(block % 16 * BLOCK, memoryview(fill(1))):
        block += 1
        await asyncio.sleep(0.0005)
        assert block < 10_000, "it is never held"


def test_writes_are_held_until_the_disk_has_caught_up() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (catalogue, handle):
            await catalogue.create_volume("other", 64 * BLOCK)
            other = await catalogue.open_volume("other", lambda: None)
            store.backlog = 4 * SHARE
            await write_until_held(handle)
            await until(lambda: store.kinds("write_back"))
            held = [asyncio.ensure_future(handle.write(n * BLOCK, fill(2))) for n in range(40)]
            await asyncio.sleep(0.02)
            assert not any(write.done() for write in held)
            # Reads, flushes and zeroes of the same volume go on, and writes of others.
            assert (await get(handle, 0)) == fill(1)
            await handle.flush()
            await handle.trim(50 * BLOCK, 4 * BLOCK)
            assert other.try_write(0, memoryview(fill(3)))
            store.backlog = 0
            await asyncio.wait_for(asyncio.gather(*held), 30)
            assert (await get(handle, 0, 40)) == fill(2, 40)
            assert handle.try_write(0, memoryview(fill(4)))
            await settled(handle)
            await catalogue.close_export(other)

    run(scenario())


def test_a_volume_whose_disk_keeps_up_is_never_held() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            store.backlog = SHARE // 2
            for block in range(500):
                assert handle.try_write(block % 64 * BLOCK, memoryview(fill(1)))
                await asyncio.sleep(0)
                await settled(handle)
            assert not store.kinds("write_back")

    run(scenario())


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_in_writing_back_fails_the_volume(number: int) -> None:
    async def scenario() -> None:
        store = FaultyStore()

        def hook(kind: str, layer: str, detail: Any) -> None:
            if kind == "write_back" and broken:
                raise OSError(number, "no")

        broken = False
        store.hook = hook
        async with opened(store) as (_, handle):
            store.backlog = 4 * SHARE
            await write_until_held(handle)
            held = asyncio.ensure_future(handle.write(0, fill(2)))
            await asyncio.sleep(0.01)
            assert not held.done()
            broken = True
            with pytest.raises(OSError, match="writing back failed") as caught:
                await asyncio.wait_for(held, 30)
            assert caught.value.errno == errno.EIO
            assert not handle.try_write(0, memoryview(fill(2)))
            with pytest.raises(OSError, match="writing back failed"):
                await handle.flush()
            assert (await get(handle, 0)) == fill(1)

    run(scenario())


def test_no_space_for_a_write_that_was_held() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            store.backlog = 4 * SHARE
            await write_until_held(handle)
            held = asyncio.ensure_future(handle.write(20 * BLOCK, fill(2)))
            await asyncio.sleep(0.005)
            store.capacity = store.used
            store.backlog = 0
            with pytest.raises(OSError) as caught:
                await asyncio.wait_for(held, 30)
            assert caught.value.errno == errno.ENOSPC
            assert handle.try_write(0, memoryview(fill(3)))

    run(scenario())


def test_a_snapshot_of_a_volume_that_is_held() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (catalogue, handle):
            store.backlog = 4 * SHARE
            await write_until_held(handle)
            held = asyncio.ensure_future(handle.write(0, fill(2)))
            await asyncio.sleep(0.005)
            await asyncio.wait_for(catalogue.create_snapshots([("v", "s")]), 30)
            store.backlog = 0
            await asyncio.wait_for(held, 30)
            snapshot = await catalogue.open_snapshot("v", "s", lambda: None)
            assert (await get(snapshot, 0)) == fill(1)
            assert (await get(handle, 0)) == fill(2)
            await catalogue.close_export(snapshot)

    run(scenario())


def test_a_volume_that_is_held_can_be_closed() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            store.backlog = 4 * SHARE
            await write_until_held(handle)
            held = [asyncio.ensure_future(handle.write(n * BLOCK, fill(2))) for n in range(9)]
            await asyncio.sleep(0.005)
            await asyncio.wait_for(volume_of(handle).quiesce(), 30)
            await asyncio.gather(*held)
        async with opened(store) as (_, handle):
            assert (await get(handle, 0, 9)) == fill(2, 9)

    run(scenario())


def test_where_the_backlog_is_not_known_a_sync_makes_it_less() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            store.backlog = None
            await handle.flush()
            store.events.clear()
            for block in range(64):
                await handle.write(block * BLOCK, fill(1))
            await settled(handle)
            assert not store.kinds("write_back")
            assert store.kinds("sync")

    run(scenario())


def test_the_kernels_limits(tmp_path: Path) -> None:
    path = tmp_path / "vmstat"
    path.write_text(
        "nr_free_pages 7\nnr_dirty 100\nnr_writeback 20\nnr_dirty_threshold 1000\n"
        "nr_dirty_background_threshold 500\n"
    )
    assert read_room(path) == (750 - 120) * mmap.PAGESIZE
    path.write_text("nr_dirty 100\n")
    unknown = read_room(path)
    assert unknown > 0
    assert read_room(tmp_path / "missing") == unknown
    assert read_room() < 1 << 60


def test_the_catalogue_closes_while_a_client_is_held() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", 64 * BLOCK)
        handle = await catalogue.open_volume("v", lambda: None)
        store.backlog = 4 * SHARE
        await write_until_held(handle)
        held = asyncio.ensure_future(handle.write(0, fill(2)))
        await asyncio.sleep(0.005)
        await asyncio.wait_for(catalogue.close(), 30)
        await asyncio.wait_for(held, 30)

    run(scenario())


def test_held_writes_wait_in_their_order_for_one_block() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            store.backlog = 4 * SHARE
            await write_until_held(handle)
            held = [asyncio.ensure_future(handle.write(0, fill(n))) for n in range(2, 30)]
            await asyncio.sleep(0.005)
            store.backlog = 0
            await asyncio.gather(*held)
            assert (await get(handle, 0)) == fill(29)
            await until(lambda: not volume_of(handle)._pacing.held)

    run(scenario())
