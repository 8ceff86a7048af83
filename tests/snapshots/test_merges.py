"""Merges: killed, cut off and failed at every step, what is read never changes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

from snapshots import merge as merge_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from tests.snapshots.stores import BLOCK, Crash, FaultyStore

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
