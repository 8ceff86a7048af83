"""A restore that was interrupted goes on; the volume is there when it is whole, and not before."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from backends.errors import ExistsError, NotFoundError
from backends.memory_objects import MemoryObjectStore
from snapshots import sink as sinks
from snapshots.catalogue import Catalogue
from snapshots.repository import Repository, init_in_store, packing
from snapshots.sink import open_sink
from snapshots.transfer import Origin
from tests.snapshots.repository.model import ModelSource, ModelVolume
from tests.snapshots.stores import Crash, FaultyStore, run

CHUNK = 8192
SIZE = 120 * CHUNK
ROUNDS = int(os.environ.get("NBDSERVE_RESTORE_ROUNDS", "8"))
ORIGIN = Origin("a repository", "a push", "disk@one")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "STEP", 6 * CHUNK)
    monkeypatch.setattr(packing, "SEGMENT_TARGET", 40_000)


def pushed() -> tuple[Repository, ModelSource]:
    rng = random.Random(1)
    volume = ModelVolume("disk", SIZE)
    volume.data[: 70 * CHUNK] = rng.randbytes(70 * CHUNK)
    for chunk in range(80, 100, 3):  # partly zero
        volume.data[chunk * CHUNK + 4096 : (chunk + 1) * CHUNK] = rng.randbytes(4096)
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    source = volume.snapshot("one")
    repository.push(source)
    return repository, source


async def content_of(catalogue: Catalogue, name: str) -> bytes:
    handle = await catalogue.open_volume(name, lambda: None)
    buffer = bytearray(handle.size)
    await handle.read(0, memoryview(buffer))
    await catalogue.close_export(handle)
    return bytes(buffer)


async def restore(store: FaultyStore, repository: Repository, expected: bytes) -> int:
    """Restore as the volume v, from wherever it stands; returns what need not be fetched."""
    catalogue = await Catalogue.open(store)
    if catalogue.volume_names() == ["v"]:  # it was committed just before the crash
        assert await content_of(catalogue, "v") == expected
        await catalogue.close()
        return SIZE
    assert catalogue.volume_names() == []
    imported = await catalogue.begin_import("v", SIZE, ORIGIN)
    sink = await open_sink(store, imported.sink)
    here = sum(sink.holds(at, CHUNK) for at in range(0, SIZE, CHUNK)) * CHUNK
    report = await asyncio.to_thread(repository.restore, "disk", "one", sink)
    assert report.resumed == here
    await sink.finish()
    sink.close()
    await catalogue.commit_import(imported)
    assert await content_of(catalogue, "v") == expected
    assert catalogue.half_restored() == []
    await catalogue.close()
    return here


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_crashes(seed: int) -> None:
    rng = random.Random(seed)
    repository, source = pushed()
    store = FaultyStore()
    resumed, crashes, done = 0, 0, False
    while not done:
        left = rng.choice((5, 20, 40, 60, 80)) if crashes < 12 else 1 << 30

        def count(kind: str, layer: str, detail: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        store.hook = count
        try:
            resumed = run(restore(store, repository, source.content))
            done = True
        except Crash:
            crashes += 1
        store = store.after_crash(rng.choice(("kill", "cut", "mixed")), rng.randrange(1 << 30))

    async def check() -> None:
        catalogue = await Catalogue.open(store)
        # Of a volume that was committed just before the crash the content is there as well.
        assert await content_of(catalogue, "v") == source.content
        (info,) = await catalogue.list_volumes()
        assert catalogue.half_restored() == []
        assert len(await store.list_layers()) == 1
        assert not any(log in store._logs[layer] for layer in await store.list_layers()
                       for log in ("restore", "fetched"))  # fmt: skip
        findings = (await catalogue.check_directory(None)).findings
        assert findings == []
        assert info.layers == 1
        await catalogue.close()

    run(check())
    assert resumed <= SIZE


def test_given_up_and_gone_on_with() -> None:
    _, source = pushed()
    store = FaultyStore()

    async def steps() -> None:
        catalogue = await Catalogue.open(store)
        begun = await catalogue.begin_import("v", SIZE, ORIGIN)
        with pytest.raises(ExistsError, match="being restored"):
            await catalogue.begin_import("v", SIZE, ORIGIN)
        await catalogue.discard_import(begun)
        # Nothing had come: nothing is left.
        assert (catalogue.half_restored(), await store.list_layers()) == ([], [])

        await catalogue.begin_import("v", SIZE, ORIGIN)
        again = await Catalogue.open(store.after_crash("kill"))
        assert (again.half_restored(), await again._store.list_layers()) == ([], [])
        await again.close()
        store.dead = False
        await catalogue.close()

        catalogue = await Catalogue.open(store)
        begun = await catalogue.begin_import("v", SIZE, ORIGIN)
        sink = await open_sink(store, begun.sink)
        for chunk in range(20):
            at = chunk * CHUNK
            sink.write(at, source.content[at : at + CHUNK])
            sink.complete(at, CHUNK)
        sink.close()
        await catalogue.discard_import(begun)
        (kept,) = catalogue.half_restored()
        assert (kept.volume, kept.size, kept.origin) == ("v", SIZE, ORIGIN)
        assert catalogue.volume_names() == []
        with pytest.raises(NotFoundError):
            await catalogue.open_volume("v", lambda: None)
        with pytest.raises(NotFoundError):
            await catalogue.commit_import(begun)
        other = Origin(ORIGIN.repository, "another push", "disk@two")
        for refused in (
            catalogue.create_volume("v", SIZE),
            catalogue.begin_import("v", SIZE),
            catalogue.begin_import("v", SIZE, other),
            catalogue.begin_import("v", 2 * SIZE, ORIGIN),
        ):
            with pytest.raises(ExistsError, match="volume delete v"):
                await refused
        await catalogue.close()

        catalogue = await Catalogue.open(store)
        assert catalogue.half_restored() == [kept]
        await catalogue.delete_volume("v")
        assert (catalogue.half_restored(), await store.list_layers()) == ([], [])
        await catalogue.create_volume("v", SIZE)
        await catalogue.close()

    run(steps())


def test_a_note_that_is_damaged_costs_fetching_again() -> None:
    repository, source = pushed()
    for log in ("fetched", "restore"):
        store = FaultyStore()

        async def begin(store: FaultyStore = store) -> None:
            catalogue = await Catalogue.open(store)
            begun = await catalogue.begin_import("v", SIZE, ORIGIN)
            sink = await open_sink(store, begun.sink)
            for chunk in range(20):
                at = chunk * CHUNK
                sink.write(at, source.content[at : at + CHUNK])
                sink.complete(at, CHUNK)
            sink.close()
            await catalogue.close()

        run(begin())
        (layer,) = store._logs
        content = store._logs[layer][log]
        content[len(content) // 3] ^= 1
        assert run(restore(store, repository, source.content)) <= 20 * CHUNK
