"""Deletion with wiping: what is overwritten, in which order; what a crash or an error leaves."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from backends.errors import InUseError, NotFoundError, UnavailableError
from snapshots import wiping as wiping_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from tests.snapshots.stores import BLOCK, Crash, FaultyStore, run, until

SIZE = 64 * BLOCK


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiping_module, "_PIECE", 3 * BLOCK)
    monkeypatch.setattr(wiping_module, "_WRITE", 2 * BLOCK)


async def write(catalogue: Catalogue, name: str, first: int, blocks: int, value: int) -> None:
    lease = await catalogue.open_volume(name, lambda: None)
    assert isinstance(lease, Handle)
    await lease.write(first * BLOCK, bytes([value]) * (blocks * BLOCK))
    await lease.flush()
    await catalogue.close_export(lease)


async def read(catalogue: Catalogue, name: str) -> bytes:
    lease = await catalogue.open_volume(name, lambda: None)
    assert isinstance(lease, Handle)
    buffer = bytearray(SIZE)
    await lease.read(0, memoryview(buffer))
    await catalogue.close_export(lease)
    return bytes(buffer)


async def made(store: FaultyStore) -> Catalogue:
    """``secret``, with a snapshot, and ``other``, a clone that shares the lower of its layers."""
    catalogue = await Catalogue.open(store)
    await catalogue.create_volume("secret", SIZE)
    await write(catalogue, "secret", 0, 5, 1)
    await catalogue.create_snapshots([("secret", "shared")])
    await catalogue.clone_volume("other", "secret", "shared")
    await write(catalogue, "secret", 3, 7, 2)
    await catalogue.create_snapshots([("secret", "own")])
    await write(catalogue, "secret", 20, 2, 3)
    await write(catalogue, "secret", 40, 1, 3)
    await write(catalogue, "other", 60, 1, 4)
    while catalogue._merging._tasks:
        await asyncio.wait(set(catalogue._merging._tasks))
    return catalogue


def test_all_that_only_the_volume_has_is_overwritten_durably_before_it_goes() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await made(store)
        manifest = catalogue._manifests.get("secret")
        own = {layer for layer in manifest.parents if len(catalogue._manifests.uses(layer)) == 1}
        pages = {(layer, page) for layer in own for page in store._data[layer]}
        assert len(own) == 2
        assert len(pages) == 7 + 3
        before = await read(catalogue, "other")
        used = store.used
        store.peak = 0
        store.events.clear()
        told: list[tuple[int, int]] = []
        deleted = await catalogue.delete_volume(
            "secret", True, wipe=True, progress=lambda done, total: told.append((done, total))
        )
        assert deleted.wiped == 10 * BLOCK
        (shared,) = set(manifest.parents) - own
        assert (deleted.shared, deleted.others) == (await store.allocated(shared), ("other",))
        assert told == sorted(told)
        assert told[-1][0] == 10 * BLOCK
        # Nothing but the deletion's record took space.
        assert store.peak < used + 200

        condemned = store.events.index(("commit", "deletions", *_names(store, "deletions")))
        gone = store.events.index(("delete_record", "volumes", manifest.id))
        assert condemned < gone
        dirty: set[tuple[str, int]] = set()
        safe: set[tuple[str, int]] = set()
        for kind, layer, detail in store.events[gone:]:
            assert layer != shared, "a layer that another volume has is not touched"
            if kind in ("write", "punch"):
                first, last = detail[0] // BLOCK, sum(detail) // BLOCK
                touched = {(layer, page) for page in range(first, last)}
                if kind == "write":
                    dirty |= touched
                else:
                    assert touched <= safe, "punched before the zeroes were durable"
            elif kind == "sync":
                safe |= {each for each in dirty if each[0] == layer}
            elif kind == "delete_layer":
                assert {each for each in pages if each[0] == layer} <= safe
        assert safe == pages
        assert await read(catalogue, "other") == before
        assert catalogue.wiping() == []
        assert not catalogue._manifests.condemned
        await catalogue.close()

    run(scenario())


def _names(store: FaultyStore, kind: str) -> list[str]:
    return [name for event, found, name in store.events if (event, found) == ("commit", kind)][:1]


def test_what_is_refused_wipes_nothing() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await made(store)
        content = {layer: dict(pages) for layer, pages in store._data.items()}
        with pytest.raises(InUseError, match="has 2 snapshots"):
            await catalogue.delete_volume("secret", wipe=True)
        with pytest.raises(NotFoundError):
            await catalogue.delete_volume("nothing", wipe=True)
        assert {layer: dict(pages) for layer, pages in store._data.items()} == content
        assert not catalogue._manifests.condemned
        await catalogue.close()

    run(scenario())


@pytest.mark.parametrize("how", ["kill", "cut", "mixed"])
def test_a_crash_anywhere_leaves_it_whole_or_gone_and_wiped_in_the_end(how: str) -> None:
    def crash_at(count: int) -> Any:
        left = [count]

        def hook(kind: str, layer: str, detail: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Crash

        return hook

    async def life(count: int, store: FaultyStore, content: list[bytes]) -> None:
        catalogue = await made(store)
        content.append(await read(catalogue, "secret"))
        store.hook = crash_at(count)
        await catalogue.delete_volume("secret", True, wipe=True)
        while catalogue._tasks:
            await asyncio.wait(set(catalogue._tasks))
        catalogue._views.threads.close()

    async def next_life(store: FaultyStore, before: bytes) -> None:
        catalogue = await Catalogue.open(store)
        if "secret" in catalogue.volume_names():
            assert await read(catalogue, "secret") == before
        else:
            await until(lambda: not catalogue.wiping())
            assert set(store._data) == catalogue._manifests.live_layers()
        assert (await read(catalogue, "other"))[: 5 * BLOCK] == bytes([1]) * (5 * BLOCK)
        await catalogue.close()
        assert not await store.list_records("deletions")

    count = 0
    crashed = True
    while crashed:
        count += 1
        store = FaultyStore()
        content: list[bytes] = []
        with contextlib.suppress(Crash):
            run(life(count, store, content))
        crashed = store.dead
        run(next_life(store.after_crash(how, count), content[0]))
    assert count > 12


def test_an_error_leaves_what_it_was_about_and_nothing_else() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await made(store)
        manifest = catalogue._manifests.get("secret")
        head = manifest.head
        syncs = 0

        def fail(kind: str, layer: str, detail: Any) -> None:
            nonlocal syncs
            if kind == "sync" and layer == head:
                syncs += 1
                if syncs == 2:
                    raise OSError(5, "Input/output error")

        store.hook = fail
        with pytest.raises(UnavailableError) as refused:
            await catalogue.delete_volume("secret", True, wipe=True)
        line = (
            "volume secret is deleted, but not all of it wiped: "
            f"memory:{head}: Input/output error between offsets {20 * BLOCK} and {41 * BLOCK}"
        )
        assert str(refused.value) == line
        assert [found.problem for found in catalogue.wiping()] == [line.partition("wiped: ")[2]]
        (warning,) = catalogue.warnings(await store.space())
        assert (warning.kind, warning.message) == ("wiping", line)
        # The other layer is gone, and this one is nobody's.
        assert set(store._data) == catalogue._manifests.live_layers() | {head}
        assert "secret" not in catalogue.volume_names()
        await catalogue.create_volume("secret", SIZE)  # the name is free
        await catalogue.delete_volume("secret")
        await catalogue.close()

        store.hook = lambda kind, layer, detail: None
        catalogue = await Catalogue.open(store)
        await until(lambda: not catalogue.wiping())
        assert set(store._data) == catalogue._manifests.live_layers()
        await catalogue.close()

    run(scenario())


@pytest.mark.parametrize("wipe", [True, False])
def test_a_failed_wipe_is_begun_anew_or_given_up(wipe: bool) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await made(store)

        def fail(kind: str, layer: str, detail: Any) -> None:
            if kind == "write":
                raise OSError(5, "Input/output error")

        store.hook = fail
        with pytest.raises(UnavailableError, match="Input/output error"):
            await catalogue.delete_volume("secret", True, wipe=True)
        store.hook = lambda kind, layer, detail: None
        store.events.clear()
        await catalogue.delete_volume("secret", wipe=wipe)
        assert bool(store.kinds("write")) == wipe
        assert catalogue.wiping() == []
        assert set(store._data) == catalogue._manifests.live_layers()
        with pytest.raises(NotFoundError):
            await catalogue.delete_volume("secret", wipe=wipe)
        await catalogue.close()
        assert not await store.list_records("deletions")

    run(scenario())


def test_clients_get_as_much_of_the_time_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        rests.append(seconds)
        await real(0)

    async def scenario() -> None:
        catalogue = await made(FaultyStore())
        times = iter(range(1000))
        monkeypatch.setattr(wiping_module, "perf_counter", lambda: next(times))
        monkeypatch.setattr(wiping_module.asyncio, "sleep", sleep)
        client = await catalogue.open_volume("other", lambda: None)
        await catalogue.delete_volume("secret", True, wipe=True)
        assert rests.count(1) == 4  # pieces: three of seven blocks, and one of three
        await catalogue.close_export(client)
        await catalogue.close()

    run(scenario())
