"""A process that ends, or a machine that loses its power, at any step of a lazy volume's life."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import Any

import pytest

from snapshots import lazy_data
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.repository import hydrating
from snapshots.repository.local_fetcher import LocalFetcher
from tests.snapshots.lazy_parts import BLOCK, PAGE, URL, make_content, make_repository, push
from tests.snapshots.stores import Crash, FaultyStore, until

CONTENT = make_content(PAGE + 8 * BLOCK, share=0.15)
WRITTEN = b"w" * BLOCK
SECONDS = 20.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrating, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(hydrating, "_LONGEST_PAUSE", 0.005)
    monkeypatch.setattr(hydrating, "_LOOK_SECONDS", 0.002)
    monkeypatch.setattr(hydrating, "SYNC_SECONDS", 0.003)
    monkeypatch.setattr(lazy_data, "_TICK", 0.005)
    # A thread in which the process "ends" has nothing to say.
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


class Life:
    """A catalogue over a store, until it is closed or abandoned."""

    def __init__(self, store: FaultyStore, repository: Any) -> None:
        self.store = store
        self.fetcher = LocalFetcher(store, lambda: 1 << 40, lambda url: repository)
        self.catalogue: Catalogue | None = None

    async def open(self) -> Catalogue:
        self.catalogue = await Catalogue.open(self.store, fetcher=self.fetcher)
        self.catalogue.hydrate()
        return self.catalogue

    def abandon(self) -> None:
        self.store.dead = True
        for fetching in self.fetcher._layers.values():
            if fetching.hydrator is not None:
                fetching.hydrator._filling.sync = lambda: []  # type: ignore[method-assign]
                fetching.hydrator.stop()
        if self.catalogue is not None:
            self.catalogue._views.threads.close()


async def read(handle: Handle) -> bytes:
    buffer = bytearray(handle.size)
    await handle.read(0, memoryview(buffer))
    return bytes(buffer)


async def live(life: Life, done: list[str]) -> None:
    """From the restore to the merge of what has become an ordinary layer."""
    catalogue = await life.open()
    await catalogue.restore_lazily("new", URL, "web", "s", 0)
    done.append("restored")
    handle = await catalogue.open_volume("new", lambda: None)
    assert isinstance(handle, Handle)
    await handle.write(BLOCK, WRITTEN)
    await handle.flush()
    done.append("written")
    await catalogue.create_snapshots([("new", "one")])
    await catalogue.set_hydration_rate("new", None)
    await until(lambda: life.store.dead or catalogue.hydration("new") is None)
    await until(lambda: life.store.dead or len(catalogue._manifests.get("new").parents) == 2)
    done.append("merged")


def first_life(repository: Any, stop_at: int) -> tuple[FaultyStore, list[str]]:
    """Until the event of that number; the store, and what was answered before."""
    store = FaultyStore()
    events = 0

    def hook(kind: str, layer: str, detail: Any) -> None:
        nonlocal events
        events += 1
        if events > stop_at:
            raise Crash

    store.hook = hook
    done: list[str] = []
    runner = asyncio.Runner()
    life = Life(store, repository)

    async def go() -> None:
        runner.get_loop().set_exception_handler(lambda loop, context: None)
        living = asyncio.ensure_future(live(life, done))
        await until(lambda: living.done() or store.dead)

    with contextlib.suppress(Crash):
        runner.run(asyncio.wait_for(go(), SECONDS))
    life.abandon()
    with contextlib.suppress(Crash):
        runner.close()
    return store, done


async def second_life(store: FaultyStore, repository: Any, done: list[str]) -> None:
    life = Life(store, repository)
    catalogue = await life.open()
    if "restored" in done:
        assert catalogue.volume_names() == ["new"]
    for name in catalogue.volume_names():
        allowed = [CONTENT[:BLOCK] + WRITTEN + CONTENT[2 * BLOCK :]]
        if "written" not in done:
            allowed.append(CONTENT)
        handle = await catalogue.open_volume(name, lambda: None)
        assert isinstance(handle, Handle)
        found = await read(handle)
        assert found in allowed
        await catalogue.set_hydration_rate(name, None)
        await until(lambda: catalogue.hydration("new") is None)
        assert await read(handle) == found
        await catalogue.close_export(handle)
        for snapshot in catalogue.list_snapshots(name):
            handle = await catalogue.open_snapshot(name, snapshot.name, lambda: None)
            assert isinstance(handle, Handle)
            assert await read(handle) == found
            await catalogue.close_export(handle)
    await catalogue.close()
    if not done:
        return
    assert await store.list_layers()


@pytest.mark.parametrize("how", ["kill", "cut", "mixed"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_every_end_is_survived(how: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    reached: list[str] = []
    for stop_at in [*range(0, 60, 3), *range(60, 400, 17)]:
        _, repository = make_repository()
        push(repository, CONTENT)
        store, done = first_life(repository, stop_at)
        reached += done
        found = store.after_crash(how, seed=stop_at)
        asyncio.run(asyncio.wait_for(second_life(found, repository, done), SECONDS))
    assert {"restored", "written", "merged"} <= set(reached)
