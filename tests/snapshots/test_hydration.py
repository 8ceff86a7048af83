"""Volumes that are restored lazily: what they read as, and what becomes of them."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from backends.errors import (
    CorruptError,
    ExistsError,
    InUseError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from backends.memory_layers import MemoryLayerStore
from snapshots import hydration, lazy_data
from snapshots.catalogue import Catalogue
from snapshots.checking import check_store
from snapshots.extent_log import FETCHED, INDEX
from snapshots.handle import Handle
from snapshots.lazy import LAZY, LazyLayer, unpack_lazy
from snapshots.repository import Repository, hydrating
from snapshots.repository.local_fetcher import LocalFetcher
from tests.snapshots.lazy_parts import (
    BLOCK,
    PAGE,
    URL,
    RiggedObjects,
    make_content,
    make_repository,
    push,
)
from tests.snapshots.stores import FaultyStore, run, until

SIZE = 3 * PAGE + 5 * BLOCK


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrating, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(hydrating, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(hydrating, "_LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(hydrating, "PASS_SECONDS", 0.05)
    monkeypatch.setattr(lazy_data, "_TICK", 0.02)
    monkeypatch.setattr(lazy_data, "ASK_AGAIN", 0.05)


class Scene:
    """A repository with web@s in it, and a catalogue that may restore it lazily."""

    def __init__(
        self, store: Any = None, chunk_size: int = BLOCK, content: bytes | None = None
    ) -> None:
        self.store = store or MemoryLayerStore()
        self.objects: RiggedObjects
        self.repository: Repository
        self.objects, self.repository = make_repository(chunk_size)
        self.content = make_content(SIZE) if content is None else content
        push(self.repository, self.content)
        self.free = 1 << 40

    @asynccontextmanager
    async def open(self, *, hydrates: bool = True) -> AsyncIterator[Catalogue]:
        fetcher = LocalFetcher(self.store, lambda: self.free, lambda url: self.repository)
        catalogue = await Catalogue.open(self.store, fetcher=fetcher)
        if hydrates:
            catalogue.hydrate()
        try:
            yield catalogue
        finally:
            await catalogue.close()

    async def restore(self, catalogue: Catalogue, rate: int | None = 0) -> None:
        await catalogue.restore_lazily("new", URL, "web", "s", rate)


async def open_(catalogue: Catalogue, name: str = "new", snapshot: str | None = None) -> Handle:
    if snapshot is None:
        handle = await catalogue.open_volume(name, lambda: None)
    else:
        handle = await catalogue.open_snapshot(name, snapshot, lambda: None)
    assert isinstance(handle, Handle)
    return handle


async def read(handle: Handle, offset: int = 0, length: int | None = None) -> bytes:
    buffer = bytearray(handle.size - offset if length is None else length)
    if not handle.try_read(offset, memoryview(buffer)):
        await handle.read(offset, memoryview(buffer))
    return bytes(buffer)


def first_data(content: bytes) -> int:
    """Where the first block is that is no hole."""
    return next(at for at in range(0, len(content), BLOCK) if any(content[at : at + BLOCK]))


async def whole(catalogue: Catalogue, name: str = "new") -> None:
    await until(lambda: catalogue.hydration(name) is None)


def intents_without_outcome(objects: RiggedObjects) -> set[str]:
    def names(prefix: str) -> set[str]:
        return {key.removeprefix(prefix) for key, _ in objects.inner.list(prefix)}

    return names("intents/") - names("outcomes/")


@pytest.mark.parametrize("chunk_size", [BLOCK, 4 * BLOCK, 16 * BLOCK])
def test_reads_what_the_snapshot_has(chunk_size: int) -> None:
    scene = Scene(chunk_size=chunk_size)

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            choice = random.Random(5)
            for _ in range(60):
                offset = choice.randrange(SIZE)
                length = min(choice.choice([1, 512, 5000, 100_000]), SIZE - offset)
                assert await read(handle, offset, length) == scene.content[offset:][:length]
            info = catalogue.hydration("new")
            assert info is not None
            assert info.source == f"web@s in {URL}"
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)
            assert (await catalogue.show_volume("new")).hydration is None

    run(go())


def test_nothing_is_read_from_the_segments_before_somebody_reads() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            await catalogue.show_volume("new")
            assert scene.objects.ranges == []
            handle = await open_(catalogue)
            await read(handle, first_data(scene.content), BLOCK)
            assert 0 < sum(length for _, _, length in scene.objects.segments_read()) < 1 << 20
            await catalogue.close_export(handle)

    run(go())


def test_each_chunk_is_fetched_once() -> None:
    """By many readers of the same places and the background, all at the same time."""
    scene = Scene()

    def slow(key: str, offset: int, data: bytes) -> bytes:
        time.sleep(0.02)
        return data

    scene.objects.rig = slow

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue, None)
            handle = await open_(catalogue)
            choice = random.Random(7)
            offsets = [choice.randrange(SIZE - 70_000) for _ in range(40)] * 4
            # Not the same wants, or they would be taken for one.
            lengths = [50_000 + 5000 * (n // 40) for n in range(160)]
            found = await asyncio.gather(
                *(read(handle, at, length) for at, length in zip(offsets, lengths, strict=True))
            )
            for at, data in zip(offsets, found, strict=True):
                assert data == scene.content[at : at + len(data)]
            await whole(catalogue)
            await catalogue.close_export(handle)

    run(go())
    # Gaps between chunks that are here already are read for nothing now and then, chunks never.
    read_in_all = sum(length for _, _, length in scene.objects.segments_read())
    assert read_in_all <= 1.2 * scene.repository.find("web", "s").stored


def test_neighbours_come_along_and_a_stream_gets_more_of_them() -> None:
    scene = Scene(content=random.Random(3).randbytes(PAGE))

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            for offset in range(0, PAGE, 4 * BLOCK):
                await read(handle, offset, 4 * BLOCK)
            await catalogue.close_export(handle)

    run(go())
    lengths = [length for _, _, length in scene.objects.segments_read()]
    assert len(lengths) <= 5
    assert max(lengths) >= 2 * min(lengths[:1])


def test_writes_snapshots_clones_growth_and_rollback_before_it_is_whole() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            model = bytearray(scene.content)

            async def put(offset: int, data: bytes) -> None:
                await handle.write(offset, data)
                model[offset : offset + len(data)] = data

            await put(100, b"a" * 10_000)  # the edges of its blocks are fetched
            await put(PAGE - 70, b"b" * 140)
            await handle.trim(2 * PAGE, 3 * BLOCK)
            model[2 * PAGE : 2 * PAGE + 3 * BLOCK] = bytes(3 * BLOCK)
            await catalogue.create_snapshots([("new", "one")])
            one = bytes(model)
            await put(50 * BLOCK, b"c" * BLOCK)
            await catalogue.clone_volume("clone", "new", "one", SIZE + 2 * PAGE)
            clone = await open_(catalogue, "clone")
            assert await read(clone) == one + bytes(2 * PAGE)
            assert await read(handle) == model
            await catalogue.close_export(clone)
            await catalogue.close_export(handle)
            await catalogue.resize_volume("new", SIZE + PAGE)
            await catalogue.create_snapshots([("new", "two")])
            await catalogue.rollback("new", "one")
            handle = await open_(catalogue)
            assert await read(handle) == one
            await catalogue.close_export(handle)
            await catalogue.delete_snapshot("new", "one")
            await catalogue.rename_volume("new", "renamed")
            await catalogue.set_hydration_rate("renamed", None)
            await whole(catalogue, "renamed")
            assert catalogue.hydration("clone") is None
            for name, snapshot, expected in (
                ("renamed", None, one),
                ("renamed", "two", bytes(model) + bytes(PAGE)),
                ("clone", None, one + bytes(2 * PAGE)),
            ):
                handle = await open_(catalogue, name, snapshot)
                assert await read(handle) == expected
                await catalogue.close_export(handle)

    run(go())


def test_it_goes_on_where_it_was_after_a_restart() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            assert await read(handle, 0, PAGE) == scene.content[:PAGE]
            await catalogue.close_export(handle)
        first = sum(length for _, _, length in scene.objects.segments_read())
        scene.objects.ranges.clear()
        async with scene.open() as catalogue:
            info = catalogue.hydration("new")
            assert info is not None
            assert 0 < info.fetched < info.total
            handle = await open_(catalogue)
            assert await read(handle, 0, PAGE) == scene.content[:PAGE]
            assert scene.objects.segments_read() == []
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)
        second = sum(length for _, _, length in scene.objects.segments_read())
        stored = scene.repository.find("web", "s").stored
        assert first + second <= 1.2 * stored
        assert await scene.store.list_records("volumes")

    run(go())


def test_once_whole_nothing_is_left_of_it() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue, None)
            assert len(intents_without_outcome(scene.objects)) == 1
            await whole(catalogue)
            await until(lambda: not intents_without_outcome(scene.objects))
        scene.objects.down = True
        async with scene.open(hydrates=False) as catalogue:
            handle = await open_(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)
            report = await catalogue.check_directory(None)
            assert report.findings == []
        for layer in await scene.store.list_layers():
            assert not await scene.store.has_log(layer, LAZY)
            assert not await scene.store.has_log(layer, FETCHED)

    run(go())


def test_holes_are_nobodys_once_it_is_whole_in_views_that_are_open() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            assert handle.extents(0, SIZE, 10)[0] == (3 * PAGE, True)
            await handle.write(0, b"x" * BLOCK)
            await catalogue.create_snapshots([("new", "one")])
            snapshot = await open_(catalogue, "new", "one")
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            expected = b"x" * BLOCK + scene.content[BLOCK:]
            for each in (handle, snapshot):
                position = 0
                for length, data in each.extents(0, SIZE, 10_000):
                    for block in range(position, position + length, BLOCK):
                        assert data == any(expected[block : block + BLOCK])
                    position += length
                assert position == SIZE
            # Its layer is merged with the one above, under the views.
            await until(lambda: len(catalogue._manifests.get("new").parents) == 2)
            assert await read(handle) == expected
            assert await read(snapshot) == expected
            await catalogue.close_export(snapshot)
            await catalogue.close_export(handle)

    run(go())


def test_an_outage_harms_only_what_is_not_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lazy_data, "WAIT_SECONDS", 0.3)
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            assert await read(handle, 0, 4 * BLOCK) == scene.content[: 4 * BLOCK]
            scene.objects.down = True
            absent = [
                asyncio.create_task(read(handle, 2 * PAGE + at * BLOCK, BLOCK)) for at in range(100)
            ]
            # Reads of what is here, writes, FLUSH and snapshots go on, however many wait.
            for _ in range(3):
                assert await read(handle, 0, 4 * BLOCK) == scene.content[: 4 * BLOCK]
                await handle.write(PAGE, b"w" * BLOCK)
                await handle.flush()
            await catalogue.create_snapshots([("new", "during")])
            failed = await asyncio.gather(*absent, return_exceptions=True)
            assert {getattr(each, "errno", None) for each in failed} == {errno.EIO}
            scene.objects.down = False
            assert (
                await read(handle, 2 * PAGE, 100 * BLOCK)
                == (scene.content[2 * PAGE : 2 * PAGE + 100 * BLOCK])
            )
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            await catalogue.close_export(handle)

    with caplog.at_level(logging.WARNING):
        run(go())
    said = [record.getMessage() for record in caplog.records]
    assert sum("reads of what is not fetched yet of web@s" in line for line in said) == 1
    assert any("forced: the endpoint is down" in line for line in said)


def test_a_snapshot_does_not_wait_for_a_write_that_waits_for_the_store() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            scene.objects.down = True
            writing = asyncio.create_task(handle.write(PAGE + 5, b"edges" * 2000))
            await asyncio.sleep(0.05)
            await asyncio.wait_for(catalogue.create_snapshots([("new", "one")]), 5)
            await asyncio.wait_for(handle.flush(), 5)
            assert not writing.done()
            scene.objects.down = False
            await writing
            expected = bytearray(scene.content)
            snapshot = await open_(catalogue, "new", "one")
            assert await read(snapshot) == expected
            expected[PAGE + 5 : PAGE + 10_005] = b"edges" * 2000
            assert await read(handle) == expected
            await catalogue.close_export(snapshot)
            await catalogue.close_export(handle)

    run(go())


def test_the_rate_bounds_the_background_and_not_what_is_read() -> None:
    scene = Scene(content=random.Random(3).randbytes(SIZE))

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue, 1)
            await until(scene.objects.segments_read)
            await asyncio.sleep(0.3)
            # Each thread may have begun a range before the first had come.
            assert len(scene.objects.segments_read()) <= hydrating.BACKGROUND
            handle = await open_(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)

    run(go())


@pytest.mark.parametrize("rate", [-1, 1 << 60])
def test_a_rate_that_is_none_is_refused(rate: int) -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            with pytest.raises(InvalidError, match="50M"):
                await scene.restore(catalogue, rate)

    run(go())


def test_an_index_that_cannot_be_written_is_written_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hydration, "_TRY_AGAIN", 0.02)
    store = FaultyStore()
    scene = Scene(store)
    failures = 3

    def hook(kind: str, layer: str, detail: Any) -> None:
        nonlocal failures
        if kind == "create_log" and detail == INDEX and failures:
            failures -= 1
            raise OSError(errno.EIO, "the disk failed")

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            store.hook = hook
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            assert failures == 0
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)

    run(go())


def test_a_short_outage_is_waited_for() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            scene.objects.down = True
            handle = await open_(catalogue)
            reading = asyncio.create_task(read(handle, PAGE, BLOCK))
            await asyncio.sleep(0.2)
            assert not reading.done()
            scene.objects.down = False
            assert await reading == scene.content[PAGE : PAGE + BLOCK]
            await catalogue.close_export(handle)

    run(go())


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes((data[-1] ^ 1,))


@pytest.mark.parametrize(
    "wrong",
    [flipped, lambda data: data[: len(data) // 2], lambda data: b"", lambda data: bytes(len(data))],
)
def test_what_is_damaged_on_its_way_is_never_served(wrong: Callable[[bytes], bytes]) -> None:
    scene = Scene(content=make_content(PAGE // 2))
    choice = random.Random(11)
    scene.objects.rig = lambda key, offset, data: wrong(data) if choice.random() < 0.4 else data

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            refused = 0
            for offset in range(0, PAGE // 2, 11 * BLOCK):
                try:
                    assert await read(handle, offset, BLOCK) == scene.content[offset:][:BLOCK]
                except OSError as error:
                    assert error.errno == errno.EIO
                    refused += 1
            assert refused < 30
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)

    run(go())


def test_a_damaged_chunk_is_refused_and_the_rest_comes(caplog: pytest.LogCaptureFixture) -> None:
    size = PAGE // 2
    scene = Scene(content=random.Random(3).randbytes(size))
    key = min(key for key, _ in scene.objects.inner.list("segments/"))
    bad = range(100_000, 101_000)

    def rig(found: str, offset: int, data: bytes) -> bytes:
        if found != key:
            return data
        changed = bytearray(data)
        for place in bad:
            if offset <= place < offset + len(data):
                changed[place - offset] ^= 1
        return bytes(changed)

    async def go() -> None:
        scene.objects.rig = rig
        async with scene.open() as catalogue:
            await scene.restore(catalogue, None)
            handle = await open_(catalogue)
            problems = 0
            for offset in range(0, size, BLOCK):
                try:
                    assert await read(handle, offset, BLOCK) == scene.content[offset:][:BLOCK]
                except OSError as error:
                    assert error.errno == errno.EIO
                    assert key in str(error)
                    problems += 1
            assert 1 <= problems <= 2
            info = catalogue.hydration("new")
            assert info is not None
            await until(lambda: "SHA-256" in ((catalogue.hydration("new") or info).problem or ""))
            scene.objects.rig = lambda found, offset, data: data
            await whole(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)

    with caplog.at_level(logging.ERROR):
        run(go())
    assert any(key in record.getMessage() for record in caplog.records)


def test_a_snapshot_that_was_collected_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
        scene.repository.delete("web", "s")
        for prefix in ("outcomes/", "segments/", "pages/"):
            for key, _ in scene.objects.inner.list(prefix):
                scene.objects.inner.delete(key)
        async with scene.open() as catalogue:
            handle = await open_(catalogue)
            with pytest.raises(OSError, match="deleted and collected"):
                await read(handle, 0, BLOCK)
            await handle.write(0, b"x" * BLOCK)
            assert await read(handle, 0, BLOCK) == b"x" * BLOCK
            await catalogue.close_export(handle)
            await catalogue.delete_volume("new")

    run(go())


def test_the_pin_keeps_a_deleted_snapshot_and_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydrating, "RENEW_SECONDS", 0.05)
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            first = intents_without_outcome(scene.objects)
            scene.repository.delete("web", "s")
            await until(lambda: len(list(scene.objects.inner.list("intents/"))) > 4)
            pins = intents_without_outcome(scene.objects)
            assert 1 <= len(pins) <= 2
            assert not pins & first
            monkeypatch.setattr(hydrating, "RENEW_SECONDS", 1e9)
            await asyncio.sleep(0.3)
            (pin,) = intents_without_outcome(scene.objects)

            async def recorded() -> str:
                for layer in await scene.store.list_layers():
                    content = await scene.store.read_log(layer, LAZY)
                    if content is not None:
                        return unpack_lazy(content, "").pin
                return ""

            assert await recorded() == pin
            handle = await open_(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)
            await catalogue.delete_volume("new")
            await until(lambda: not intents_without_outcome(scene.objects))

    run(go())


def test_a_store_that_lets_us_read_only_serves_too() -> None:
    scene = Scene()
    scene.objects.read_only = True

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue, None)
            await whole(catalogue)

    run(go())


def test_what_cannot_be_restored_leaves_nothing() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            with pytest.raises(NotFoundError, match="there is no web@other"):
                await catalogue.restore_lazily("new", URL, "web", "other")
            scene.objects.down = True
            with pytest.raises(UnavailableError, match="forced"):
                await scene.restore(catalogue)
            scene.objects.down = False
            await catalogue.create_volume("new", BLOCK)
            with pytest.raises(ExistsError):
                await scene.restore(catalogue)
            await catalogue.delete_volume("new")
            # The name is taken while the snapshot is looked up.
            real = scene.repository.find

            def find(volume: str, snapshot: str) -> Any:
                asyncio.run_coroutine_threadsafe(
                    catalogue.create_volume("new", BLOCK), loop
                ).result()
                return real(volume, snapshot)

            loop = asyncio.get_running_loop()
            scene.repository.find = find  # type: ignore[method-assign]
            with pytest.raises(ExistsError):
                await scene.restore(catalogue)
            assert len(await scene.store.list_layers()) == 1
            assert intents_without_outcome(scene.objects) == set()

    run(go())


def test_a_snapshot_that_is_not_whole_is_not_pushed() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            await catalogue.create_snapshots([("new", "one")])
            with pytest.raises(InUseError, match="volume hydrate new --wait"):
                await catalogue.pin("new", "one")
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            (await catalogue.pin("new", "one")).release()
            assert (await catalogue.set_hydration_rate("new", 0)).hydration is None

    run(go())


def test_its_layer_is_not_merged_before_it_is_whole() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            for name in ("one", "two"):
                await handle.write(0, name.encode() * 1000)
                await catalogue.create_snapshots([("new", name)])
            await catalogue.delete_snapshot("new", "one")
            manifest = catalogue._manifests.get("new")
            assert len(manifest.stack(manifest.head)) == 3
            await catalogue.close_export(handle)
        async with scene.open() as catalogue:
            await asyncio.sleep(0.1)
            manifest = catalogue._manifests.get("new")
            assert len(manifest.stack(manifest.head)) == 3
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            await until(lambda: len(catalogue._manifests.get("new").parents) == 2)
            handle = await open_(catalogue)
            expected = (b"two" * 1000) + scene.content[3000:]
            assert await read(handle) == expected
            await catalogue.close_export(handle)

    run(go())


def test_without_a_daemon_it_is_made_and_nothing_is_fetched() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open(hydrates=False) as catalogue:
            await scene.restore(catalogue, None)
            handle = await open_(catalogue)
            with pytest.raises(OSError, match="no daemon runs"):
                await read(handle, 0, BLOCK)
            await catalogue.close_export(handle)
        async with scene.open() as catalogue:
            await whole(catalogue)

    run(go())


def test_a_full_disk_stops_the_background_and_leaves_room() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            scene.free = hydrating.LOW_SPACE - 1
            await scene.restore(catalogue, None)
            await until(
                lambda: (
                    "nearly full" in (((info := catalogue.hydration("new")) and info.problem) or "")
                )
            )
            assert scene.objects.segments_read() == []
            handle = await open_(catalogue)
            assert await read(handle, 0, BLOCK) == scene.content[:BLOCK]
            await catalogue.close_export(handle)

    run(go())


def test_chunks_that_cannot_be_written_are_refused() -> None:
    store = MemoryLayerStore()
    scene = Scene(store)

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            store.capacity = store.used
            at = first_data(scene.content)
            with pytest.raises(OSError, match="no space left"):
                await read(handle, at, BLOCK)
            store.capacity = 1 << 60
            assert await read(handle, at, BLOCK) == scene.content[at : at + BLOCK]
            await catalogue.close_export(handle)

    run(go())


def test_what_a_disk_failed_to_keep_is_fetched_again() -> None:
    store = FaultyStore()
    scene = Scene(store)
    failing = [True]

    def hook(kind: str, layer: str, detail: Any) -> None:
        if kind == "sync" and failing[0] and layer in lazies:
            failing[0] = False
            raise OSError(errno.EIO, "the disk failed")

    lazies: set[str] = set()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            lazies.update(catalogue._hydration._records)
            store.hook = hook
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            assert not failing[0]
            handle = await open_(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)

    run(go())
    bytes_read = sum(length for _, _, length in scene.objects.segments_read())
    assert bytes_read > 1.5 * scene.repository.find("web", "s").stored


def test_deleting_it_lets_the_snapshot_go() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            await catalogue.delete_volume("new")
            await until(lambda: not intents_without_outcome(scene.objects))
            assert await scene.store.list_layers() == []
            assert catalogue.hydrations() == {}

    run(go())


def test_a_damaged_log_is_fetched_anew_and_a_damaged_record_refused() -> None:
    scene = Scene()

    async def damage(log: str) -> None:
        for layer in await scene.store.list_layers():
            content = await scene.store.read_log(layer, log)
            if content is not None:
                changed = bytearray(content)
                changed[520] ^= 1
                await scene.store.create_log(layer, log, bytes(changed))

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            handle = await open_(catalogue)
            await read(handle, 0, PAGE)
            await catalogue.close_export(handle)
        await damage(FETCHED)
        async with scene.open() as catalogue:
            handle = await open_(catalogue)
            assert await read(handle, 0, PAGE) == scene.content[:PAGE]
            await catalogue.close_export(handle)
        await damage(FETCHED)
        report = await check_store(scene.store, None, repair=False)
        assert [(found.harms, LAZY in found.file) for found in report.findings] == [((), False)]
        for layer in await scene.store.list_layers():
            content = await scene.store.read_log(layer, LAZY)
            if content is not None:
                await scene.store.create_log(layer, LAZY, content[:-1] + b"\xff")
        async with scene.open() as catalogue:
            with pytest.raises(CorruptError, match=LAZY):
                await open_(catalogue)
            report = await catalogue.check_directory(None)
            assert [found.harms for found in report.findings] == [("new",)]

    run(go())


def test_clients_that_leave_do_not_keep_a_volume_open() -> None:
    scene = Scene()

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            scene.objects.down = True
            handle = await open_(catalogue)
            reading = asyncio.create_task(read(handle, PAGE, BLOCK))
            writing = asyncio.create_task(handle.write(2 * PAGE + 5, b"x"))
            await asyncio.sleep(0.1)
            reading.cancel()
            await asyncio.wait_for(catalogue.close_export(handle), 5)
            with pytest.raises(OSError, match="is closed"):
                await writing

    run(go())


def test_a_record_says_what_it_is_or_is_refused() -> None:
    lazy = LazyLayer(
        "file:///r", "r", "v", "s", "p", "i", 10 * BLOCK, BLOCK, 0, ((0, 4), (6, 10)), None
    )
    assert unpack_lazy(lazy.pack(), "x") == lazy
    wrong: list[dict[str, Any]] = [
        {"claims": ((0, 11),)},
        {"claims": ((4, 2),)},
        {"claims": ((0, 4), (2, 6))},
        {"chunk_size": 3 * BLOCK},
        {"chunk_size": 512},
        {"chunk_size": 4 * BLOCK},
        {"size": 10 * BLOCK + 1},
    ]
    for changes in wrong:
        with pytest.raises(CorruptError, match="x: not what it should be"):
            unpack_lazy(lazy.changed(**changes).pack(), "x")
    content = lazy.pack()
    for place in range(len(content)):
        with pytest.raises(CorruptError):
            unpack_lazy(content[:place] + bytes((content[place] ^ 1,)) + content[place + 1 :], "x")


def test_an_index_makes_it_an_ordinary_layer() -> None:
    """Whatever a crash has left beside it."""
    scene = Scene()
    left: dict[str, dict[str, bytes]] = {}

    async def keep() -> None:
        for layer in await scene.store.list_layers():
            logs = {log: await scene.store.read_log(layer, log) for log in (LAZY, FETCHED)}
            left[layer] = {log: content for log, content in logs.items() if content is not None}

    async def go() -> None:
        async with scene.open() as catalogue:
            await scene.restore(catalogue)
            await keep()
            await catalogue.set_hydration_rate("new", None)
            await whole(catalogue)
            await until(lambda: not intents_without_outcome(scene.objects))
        for layer, logs in left.items():
            for log, content in logs.items():
                await scene.store.create_log(layer, log, content)
        async with scene.open() as catalogue:
            assert catalogue.hydration("new") is None
            handle = await open_(catalogue)
            assert await read(handle) == scene.content
            await catalogue.close_export(handle)
            layers = [layer for layer in left if await scene.store.has_log(layer, INDEX)]
            assert len(layers) == 1

            def gone() -> bool:
                return LAZY not in scene.store._logs[layers[0]]

            await until(gone)

    run(go())
