"""Merges: killed, cut off and failed at every step, what is read never changes."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from backends.errors import StorageError
from snapshots import merge as merge_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from tests.snapshots.stores import BLOCK, Crash, FaultyStore, until

BLOCKS = 24
Content = dict[str, bytes]


async def put(handle: Handle, first: int, last: int, fill: int) -> None:
    for block in range(first, last):
        await handle.write(block * BLOCK, bytes([fill + block]) * BLOCK)


async def read_all(handle: Handle) -> bytes:
    buffer = bytearray(handle.size)
    await handle.read(0, memoryview(buffer))
    return bytes(buffer)


async def read_everything(catalogue: Catalogue) -> Content:
    """Every volume and snapshot by its name, as a client reads it."""
    found = {}
    for name in catalogue.volume_names():
        handle = await catalogue.open_volume(name, lambda: None)
        found[name] = await read_all(handle)
        await catalogue.close_export(handle)
    for info in catalogue.list_snapshots():
        handle = await catalogue.open_snapshot(info.volume, info.name, lambda: None)
        found[f"{info.volume}@{info.name}"] = await read_all(handle)
        await catalogue.close_export(handle)
    return found


async def build(store: FaultyStore, *, down: bool, bottom: bool) -> tuple[Content, str]:
    """A volume with a clone on top and a snapshot to be deleted; what everything holds.

    ``down``: the upper layer is the smaller one, so it is copied into the lower. ``bottom``: the
    pair to be merged has no layer below it. Each of the layers has data, zeroes over data of the
    one below, and zeroes over nothing.
    """
    catalogue = await Catalogue.open(store)
    await catalogue.create_volume("v", BLOCKS * BLOCK)
    handle = await catalogue.open_volume("v", lambda: None)
    if not bottom:
        await put(handle, 0, 20, 1)
        await catalogue.create_snapshots([("v", "base")])
    await put(handle, 2, 12 if down else 6, 50)
    await handle.trim(12 * BLOCK, 2 * BLOCK)
    await catalogue.create_snapshots([("v", "gone")])
    await handle.trim(4 * BLOCK, BLOCK)
    await put(handle, 5, 7 if down else 16, 100)
    await handle.trim(12 * BLOCK, BLOCK)
    await catalogue.create_snapshots([("v", "kept")])
    await put(handle, 0, 1, 150)
    await put(handle, 9, 10, 150)
    await catalogue.close_export(handle)
    await catalogue.clone_volume("clone", "v", "kept")
    handle = await catalogue.open_volume("clone", lambda: None)
    await put(handle, 5, 6, 200)
    await handle.trim(10 * BLOCK, BLOCK)
    await catalogue.close_export(handle)
    content = await read_everything(catalogue)
    await catalogue.close()
    del content["v@gone"]
    return content, "gone"


async def check_after(store: FaultyStore, expected: Content, gone: str) -> None:
    """Open what a crash left, read it before, while and after the merge ends; then once more."""
    for _ in range(2):
        catalogue = await Catalogue.open(store)
        if any(info.name == gone for info in catalogue.list_snapshots("v")):
            await catalogue.delete_snapshot("v", gone)
        assert await read_everything(catalogue) == expected
        await catalogue._merging.merge_now()
        assert await read_everything(catalogue) == expected
        await catalogue.close()
    assert not await store.list_records("merges")
    catalogue = await Catalogue.open(store)
    layers = set(await store.list_layers())
    assert layers == catalogue._manifests.live_layers()
    await catalogue.close()


def abandon(operation: Callable[[], Any]) -> BaseException | None:
    """Run to the end or to a crash; nothing of this process is tidied up afterwards."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    try:
        loop.run_until_complete(operation())
    except BaseException as error:
        return error
    finally:
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    return None


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "_CHUNK_BLOCKS", 3)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", ["kill", "cut", "mixed"])
@pytest.mark.parametrize("bottom", [True, False])
@pytest.mark.parametrize("down", [True, False])
def test_a_crash_at_every_step_of_a_deletion(down: bool, bottom: bool, how: str) -> None:
    built = FaultyStore()
    expected, gone = asyncio.run(build(built, down=down, bottom=bottom))
    steps = 0
    while True:
        store = built.after_crash("cut" if how == "cut" else "kill")
        count = 0

        def crash(kind: str, layer: str, detail: Any, last: int = steps) -> None:
            nonlocal count
            count += 1
            if count > last:
                raise Crash

        store.hook = crash

        async def delete(store: FaultyStore = store) -> None:
            catalogue = await Catalogue.open(store)
            try:
                await catalogue.delete_snapshot("v", gone)
                await catalogue.close()
            finally:
                catalogue._views.threads.close()

        error = abandon(delete)
        finished = count <= steps
        assert finished == (error is None), error
        found = store.after_crash(how, steps)
        asyncio.run(check_after(found, expected, gone))
        if finished:
            break
        steps += 1
    assert steps > 15, "the deletion took fewer steps than a merge has"
    gc.collect()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("bottom", [True, False])
@pytest.mark.parametrize("down", [True, False])
def test_an_error_at_every_step_puts_the_merge_off_and_no_more(
    down: bool, bottom: bool, number: int
) -> None:
    """Once, at any step of the merge itself; tried again in the same process, then reopened."""

    async def scenario(store: FaultyStore, step: int) -> bool:
        count = 0
        failed = False

        def fail(kind: str, layer: str, detail: Any) -> None:
            nonlocal count, failed
            count += 1
            if count == step:
                failed = True
                raise OSError(number, "no")

        catalogue = await Catalogue.open(store)
        await until(lambda: not catalogue._merging._tasks)
        await catalogue._merging.lock.acquire()
        deleting = asyncio.ensure_future(catalogue.delete_snapshot("v", gone))
        await until(lambda: not catalogue.list_snapshots("v") or gone not in names(catalogue))
        handle = await catalogue.open_volume("v", lambda: None)
        store.hook = fail
        catalogue._merging.lock.release()
        (result,) = await asyncio.gather(deleting, return_exceptions=True)
        store.hook = lambda *_: None
        assert result is None or isinstance(result, (OSError, StorageError))
        if catalogue._manifests.in_doubt is None:
            await catalogue._merging.merge_now()
        assert await read_all(handle) == expected["v"]
        assert await read_everything(catalogue) == expected
        await catalogue.close_export(handle)
        await catalogue.close()
        for how in ("cut", "kill"):
            await check_after(store.after_crash(how), expected, gone)
        return failed

    built = FaultyStore()
    expected, gone = asyncio.run(build(built, down=down, bottom=bottom))
    step = 1
    while asyncio.run(scenario(built.after_crash("kill"), step)):
        step += 1
    assert step > 12


def names(catalogue: Catalogue) -> set[str]:
    return {info.name for info in catalogue.list_snapshots("v")}


@pytest.mark.parametrize("down", [True, False])
def test_a_merge_needs_the_space_of_one_chunk(down: bool) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await Catalogue.open(store)
        blocks = 5000
        await catalogue.create_volume("v", 2 * blocks * BLOCK)
        handle = await catalogue.open_volume("v", lambda: None)

        async def put_large(first: int, count: int, value: int) -> None:
            await handle.write(first * BLOCK, bytes([value]) * (count * BLOCK))

        await put_large(0, 3500 if down else blocks, 1)
        await catalogue.create_snapshots([("v", "gone")])
        await put_large(4000, 3000 if down else 5500, 2)
        await catalogue.create_snapshots([("v", "kept")])
        await catalogue.close_export(handle)
        await until(lambda: not catalogue._merging._tasks)
        expected = await read_everything(catalogue)
        del expected["v@gone"]
        before = store.peak = store.used
        await catalogue.delete_snapshot("v", "gone")
        chunk = merge_module.CHUNK
        assert chunk // 2 < store.peak - before < chunk + (1 << 20)
        assert await read_everything(catalogue) == expected
        assert len(store.kinds("punch")) >= 3
        await catalogue.close()

    asyncio.run(scenario())


def test_a_merge_without_space_is_put_off_and_goes_on_later() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", 512 * BLOCK)
        handle = await catalogue.open_volume("v", lambda: None)
        await handle.write(0, b"\1" * (300 * BLOCK))
        await catalogue.create_snapshots([("v", "gone")])
        await handle.write(200 * BLOCK, b"\2" * (300 * BLOCK))
        await catalogue.create_snapshots([("v", "kept")])
        await catalogue.close_export(handle)
        await until(lambda: not catalogue._merging._tasks)
        expected = await read_everything(catalogue)
        del expected["v@gone"]
        for spare in (0, 600, 3 * BLOCK, (256 << 10) + 2000, (256 << 10) + 100 * BLOCK):
            store.capacity = store.used + spare
            if "gone" in names(catalogue):
                with pytest.raises((StorageError, OSError)):
                    await catalogue.delete_snapshot("v", "gone")
            else:
                with pytest.raises((StorageError, OSError)):
                    await catalogue._merging.merge_now()
            found = await read_everything(catalogue)
            found.pop("v@gone", None)
            assert found == expected
        assert catalogue._merging.deferred
        store.capacity = 1 << 60
        await catalogue._merging.merge_now()
        assert await read_everything(catalogue) == expected
        assert (await catalogue.show_volume("v")).layers == 2
        await catalogue.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("down", [True, False])
def test_a_merge_killed_once_may_lose_power_the_next_time(
    down: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process appended is read by the next one before it ever was durable."""
    monkeypatch.setattr(merge_module, "_CHUNK_BLOCKS", 1)
    built = FaultyStore()
    expected, gone = asyncio.run(build(built, down=down, bottom=not down))

    def process(store: FaultyStore) -> None:
        """Until the sync that follows an append to the merge log."""
        appended = False

        def crash(kind: str, layer: str, detail: Any) -> None:
            nonlocal appended
            if (kind, detail) == ("append", "merge"):
                appended = True
            if (kind, detail) == ("log_sync", "merge") and appended:
                raise Crash

        async def work() -> None:
            catalogue = await Catalogue.open(store)
            try:
                if gone in names(catalogue):
                    await catalogue.delete_snapshot("v", gone)
                await catalogue._merging.merge_now()
            finally:
                catalogue._views.threads.close()

        store.hook = crash
        abandon(work)

    killed = built.after_crash("kill")
    process(killed)
    again = killed.after_crash("kill")
    process(again)
    assert killed.dead and again.dead
    asyncio.run(check_after(again.after_crash("cut"), expected, gone))
    for seed in range(20):
        asyncio.run(check_after(again.after_crash("mixed", seed), expected, gone))


def test_a_merge_waits_for_reads_before_it_punches() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        expected, gone = await build(store, down=True, bottom=True)
        entered, go = threading.Event(), threading.Event()

        def wait(layer: str) -> None:
            entered.set()
            go.wait(30)

        catalogue = await Catalogue.open(store)
        await until(lambda: not catalogue._merging._tasks)
        handle = await catalogue.open_snapshot("v", "kept", lambda: None)
        store.on_read, store.cold = wait, True
        reading = asyncio.ensure_future(read_all(handle))
        await until(entered.is_set)
        store.cold = False
        store.events.clear()
        deleting = asyncio.ensure_future(catalogue.delete_snapshot("v", gone))
        await until(lambda: store.kinds("append"))
        await asyncio.sleep(0.05)
        assert not store.kinds("punch")
        assert not deleting.done()
        go.set()
        assert await reading == expected["v@kept"]
        await deleting
        assert store.kinds("punch")
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def test_a_pin_waits_for_the_chunk_in_hand_and_for_no_more(
    monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        _, gone = await build(store, down=False, bottom=False)
        entered, go = threading.Event(), threading.Event()
        punch = merge_module._punch

        def slow(*args: Any) -> None:
            entered.set()
            go.wait(30)
            punch(*args)

        monkeypatch.setattr(merge_module, "_punch", slow)
        catalogue = await Catalogue.open(store)
        await until(lambda: not catalogue._merging._tasks)
        deleting = asyncio.ensure_future(catalogue.delete_snapshot("v", gone))
        await until(entered.is_set)
        pinning = asyncio.ensure_future(catalogue.pin("v", "kept"))
        await asyncio.sleep(0.02)
        assert not pinning.done()
        go.set()
        pin = await pinning
        await deleting
        store.events.clear()
        (merge,) = pin.source.merges
        assert set(merge.values()) <= set(pin.source.parents)
        assert len(catalogue._manifests.merges) == 1
        await asyncio.sleep(0.01)
        assert store.events == []
        pin.release()
        await until(lambda: not catalogue._manifests.merges and not catalogue._merging._tasks)
        await catalogue.close()

    asyncio.run(scenario())
