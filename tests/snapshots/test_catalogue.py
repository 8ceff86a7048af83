"""The catalogue: what it refuses and how, and what it leaves behind when things go wrong."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from backends.errors import (
    ExistsError,
    InUseError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
)
from backends.local_layers import LocalLayerStore
from backends.memory_layers import MemoryLayerStore
from snapshots import catalogue as catalogue_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.sink import open_sink
from snapshots.source import open_source
from snapshots.space import SpacePolicy
from snapshots.space_watch import Threshold
from tests.snapshots.stores import BLOCK, FaultyStore, run, until

SIZE = 32 * BLOCK


@asynccontextmanager
async def opened(store: Any = None) -> AsyncIterator[Catalogue]:
    catalogue = await Catalogue.open(store or FaultyStore())
    try:
        yield catalogue
    finally:
        await catalogue.close()


async def write(catalogue: Catalogue, name: str, block: int, value: int, count: int = 1) -> None:
    handle = await catalogue.open_volume(name, lambda: None)
    await handle.write(block * BLOCK, bytes([value]) * (count * BLOCK))
    await catalogue.close_export(handle)


async def read(catalogue: Catalogue, name: str) -> bytes:
    """The first byte of each block of VOL or VOL@SNAP."""
    volume, _, snapshot = name.partition("@")
    if snapshot:
        handle = await catalogue.open_snapshot(volume, snapshot, lambda: None)
    else:
        handle = await catalogue.open_volume(volume, lambda: None)
    buffer = bytearray(handle.size)
    await handle.read(0, memoryview(buffer))
    await catalogue.close_export(handle)
    return bytes(buffer[::BLOCK])


async def quiet(catalogue: Catalogue) -> None:
    """Until indexes are written and merges done."""
    await until(lambda: not catalogue._merging._tasks and not catalogue._tasks)


async def refused(error: type[Exception], words: str, operation: Awaitable[Any]) -> None:
    with pytest.raises(error) as caught:
        await operation
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# What is refused


def test_refusals_say_why_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", SIZE)
            await catalogue.create_volume("w", SIZE)
            await catalogue.create_snapshots([("v", "s")])
            await quiet(catalogue)
            before = dict(store._records), set(store._data)
            c = catalogue
            await refused(ExistsError, "volume v exists already", c.create_volume("v", SIZE))
            for name in ("", ".x", "-x", "a/b", "..", "a@b", "ä", "x" * 128, "a\n", "a\0b"):
                await refused(InvalidError, "volume name", c.create_volume(name, SIZE))
                await refused(InvalidError, "volume name", c.rename_volume("v", name))
                await refused(InvalidError, "snapshot name", c.create_snapshots([("v", name)]))
            for size, words in (
                (0, "too small"),
                (-1, "too small"),
                (BLOCK + 1, "nearest are 4096 and 8192"),
                ((16 << 40) + BLOCK, "too large"),
            ):
                await refused(InvalidError, words, c.create_volume("n", size))
                await refused(InvalidError, words, c.resize_volume("v", size))
                await refused(InvalidError, words, c.begin_import("n", size))
            await refused(InvalidError, "cannot be made smaller", c.resize_volume("v", BLOCK))
            smaller = c.clone_volume("n", "v", "s", BLOCK)
            await refused(InvalidError, "smaller than the snapshot's", smaller)
            await refused(ExistsError, "w exists already", c.clone_volume("w", "v", "s"))
            await refused(ExistsError, "w exists already", c.rename_volume("v", "w"))
            await refused(ExistsError, "w exists already", c.begin_import("w", SIZE))
            await refused(ExistsError, "v@s exists already", c.create_snapshots([("v", "s")]))
            await refused(InvalidError, "no snapshot", c.create_snapshots([]))
            twice = [("v", "a"), ("v", "b")]
            await refused(InvalidError, "named twice", c.create_snapshots(twice))
            group = [("w", "ok"), ("v", "s")]
            await refused(ExistsError, "v@s exists already", c.create_snapshots(group))
            absent = "volume x does not exist"
            await refused(NotFoundError, absent, c.show_volume("x"))
            await refused(NotFoundError, absent, c.resize_volume("x", SIZE))
            await refused(NotFoundError, absent, c.rename_volume("x", "y"))
            await refused(NotFoundError, absent, c.delete_volume("x"))
            await refused(NotFoundError, absent, c.open_volume("x", lambda: None))
            await refused(NotFoundError, absent, c.create_snapshots([("w", "q"), ("x", "q")]))
            absent = "snapshot v@x does not exist"
            await refused(NotFoundError, absent, c.open_snapshot("v", "x", lambda: None))
            await refused(NotFoundError, absent, c.delete_snapshot("v", "x"))
            await refused(NotFoundError, absent, c.rollback("v", "x"))
            await refused(NotFoundError, absent, c.diff("v", "x"))
            await refused(NotFoundError, absent, c.diff("v", "s", "x"))
            await refused(NotFoundError, absent, c.clone_volume("n", "v", "x"))
            await refused(NotFoundError, absent, c.pin("v", "x"))
            await refused(InUseError, "volume v has 1 snapshot;", c.delete_volume("v"))
            client = await c.open_volume("v", lambda: None)
            await refused(InUseError, "open by 1 client;", c.rollback("v", "s"))
            await refused(InUseError, "open by 1 client;", c.delete_volume("v", True))
            await c.close_export(client)
            client = await c.open_snapshot("v", "s", lambda: None)
            await refused(InUseError, "v@s is open", c.delete_snapshot("v", "s"))
            await refused(InUseError, "open by 1 client;", c.delete_volume("v", True))
            await c.close_export(client)
            pin = await c.pin("v", "s")
            await refused(InUseError, "v@s is being pushed", c.delete_snapshot("v", "s"))
            await refused(InUseError, "is being pushed", c.delete_volume("v", True))
            pin.release()
            pin.release()
            await quiet(c)
            c.space.policy = SpacePolicy(min_free=Threshold(size=1 << 60))
            store.capacity = store.used + (100 << 20)
            await refused(NoSpaceError, "needed for a snapshot", c.create_snapshots([("v", "t")]))
            monkeypatch.setattr(catalogue_module, "MAX_LAYERS", 2)
            await refused(InvalidError, "2 layers, the most", c.create_snapshots([("v", "t")]))
            assert (dict(store._records), set(store._data)) == before

    run(scenario())


def test_the_limit_of_layers_is_kept_and_left_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_LAYERS", 5)

    async def scenario() -> None:
        async with opened() as catalogue:
            await catalogue.create_volume("v", SIZE)
            for index in range(4):
                await write(catalogue, "v", index, index + 1)
                await catalogue.create_snapshots([("v", f"s{index}")])
            with pytest.raises(InvalidError, match="5 layers"):
                await catalogue.create_snapshots([("v", "more")])
            with pytest.raises(InvalidError, match="5 layers"):
                await write(catalogue, "v", 9, 9)
                await catalogue.create_snapshots([("v", "more")])
            await catalogue.clone_volume("full", "v", "s3")
            await catalogue.delete_snapshot("v", "s1")
            await catalogue.delete_volume("full")
            await catalogue._merging.merge_now()
            await catalogue.create_snapshots([("v", "more")])
            assert await read(catalogue, "v@more") == bytes([1, 2, 3, 4]) + bytes(5) + b"\x09" + (
                bytes(22)
            )

    run(scenario())


def test_as_many_layers_as_there_can_be() -> None:
    async def scenario() -> None:
        store = MemoryLayerStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", 256 * BLOCK)
            handle = await catalogue.open_volume("v", lambda: None)
            for index in range(249):
                await handle.write(index * BLOCK, bytes([index + 1]) * BLOCK)
                await catalogue.create_snapshots([("v", f"s{index}")])
            with pytest.raises(InvalidError, match="250 layers"):
                await catalogue.create_snapshots([("v", "more")])
            await catalogue.close_export(handle)
            # The head's neighbour goes: for a moment there is a layer more.
            await catalogue.delete_snapshot("v", "s248")
        async with opened(store) as catalogue:
            expected = bytes(range(1, 250)) + bytes(7)
            assert await read(catalogue, "v") == expected
            assert (await catalogue.show_volume("v")).layers == 250
            await catalogue.delete_snapshot("v", "s7")
            assert (await catalogue.show_volume("v")).layers == 249
            assert await read(catalogue, "v") == expected

    run(scenario())


# Sizes


def test_snapshots_larger_than_their_volume_are_merged_and_indexed() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", 4 * BLOCK)
            await write(catalogue, "v", 0, 1, 4)
            await catalogue.create_snapshots([("v", "small")])
            await catalogue.resize_volume("v", SIZE)
            for index, block in enumerate((10, 20, 30)):
                await write(catalogue, "v", block, index + 2)
                await catalogue.create_snapshots([("v", f"large{index}")])
            await catalogue.rollback("v", "small")
            assert (await catalogue.show_volume("v")).size == 4 * BLOCK
        async with opened(store) as catalogue:
            await quiet(catalogue)
            before = await read(catalogue, "v@large2")
            await catalogue.delete_snapshot("v", "large0")
            await catalogue.delete_snapshot("v", "large1")
            assert await read(catalogue, "v@large2") == before
            assert before[10] == 2 and before[30] == 4
            found = (await catalogue.diff("v", "small", "large2")).extents
            assert [extent.offset // BLOCK for extent in found] == [10, 20, 30]
            for layer in set(catalogue._manifests.get("v").parents):
                if layer != catalogue._manifests.get("v").head:
                    assert await store.has_log(layer, "index")
        async with opened(store) as catalogue:
            assert await read(catalogue, "v@large2") == before
            assert await read(catalogue, "v") == bytes([1] * 4)

    run(scenario())


# Sharing


def test_clones_share_layers_and_outlive_their_parents_in_any_order() -> None:
    async def scenario(order: list[str]) -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("base", SIZE)
            await write(catalogue, "base", 0, 1, 8)
            await catalogue.create_snapshots([("base", "s")])
            await quiet(catalogue)
            expected = {"base": bytes([1] * 8) + bytes(24)}
            await catalogue.clone_volume("one", "base", "s")
            await write(catalogue, "one", 4, 2, 8)
            expected["one"] = bytes([1] * 4 + [2] * 8) + bytes(20)
            await catalogue.create_snapshots([("one", "t")])
            await catalogue.clone_volume("two", "one", "t", 2 * SIZE)
            await write(catalogue, "two", 40, 3)
            expected["two"] = expected["one"] + bytes(8) + b"\3" + bytes(23)
            await quiet(catalogue)
            infos = {info.name: info for info in await catalogue.list_volumes()}
            assert infos["base"].shared >= 8 * BLOCK
            assert infos["one"].shared >= 16 * BLOCK
            assert infos["two"].own >= BLOCK
            assert infos["two"].mapped == 13 * BLOCK
            total = sum(len(pages) for pages in store._data.values())
            assert total == 8 + 8 + 1
            for name in order:
                await catalogue.delete_volume(name, with_snapshots=True)
                del expected[name]
                await catalogue._merging.merge_now()
                assert {left: await read(catalogue, left) for left in expected} == expected
                live = catalogue._manifests.live_layers()
                assert set(await store.list_layers()) == live
            assert await store.list_layers() == []
            assert store.used == 0

    for order in (["base", "one", "two"], ["two", "base", "one"], ["one", "two", "base"]):
        run(scenario(order))


def test_snapshots_deleted_in_any_order_leave_the_others_whole() -> None:
    async def scenario(order: list[int]) -> None:
        async with opened() as catalogue:
            await catalogue.create_volume("v", SIZE)
            expected = {}
            for index in range(5):
                await write(catalogue, "v", 2 * index, index + 1, 6)
                handle = await catalogue.open_volume("v", lambda: None)
                await handle.trim(index * BLOCK, BLOCK)
                await catalogue.close_export(handle)
                await catalogue.create_snapshots([("v", f"s{index}")])
                expected[f"v@s{index}"] = await read(catalogue, "v")
            expected["v"] = expected["v@s4"]
            done: list[tuple[int, int]] = []
            for index in order:
                await catalogue.delete_snapshot("v", f"s{index}", lambda *pair: done.append(pair))
                del expected[f"v@s{index}"]
                assert {name: await read(catalogue, name) for name in expected} == expected
            assert done and all(0 <= part <= whole for part, whole in done)
            assert (await catalogue.show_volume("v")).layers <= 2

    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [3, 4, 0, 2, 1]):
        run(scenario(order))


# Names


def test_a_renamed_volume_keeps_its_clients_and_its_old_name_is_free() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("old", SIZE)
            handle = await catalogue.open_volume("old", lambda: None)
            await catalogue.rename_volume("old", "new")
            await catalogue.create_volume("old", SIZE)
            await handle.write(0, b"\5" * BLOCK)
            assert (await catalogue.show_volume("new")).clients == 1
            assert (await read(catalogue, "old"))[0] == 0
            await catalogue.close_export(handle)
        async with opened(store) as catalogue:
            assert catalogue.volume_names() == ["new", "old"]
            assert (await read(catalogue, "new"))[0] == 5

    run(scenario())


# Rollback


def test_a_forced_rollback_revokes_every_client_and_waits_for_them() -> None:
    async def scenario() -> None:
        async with opened() as catalogue:
            await catalogue.create_volume("v", SIZE)
            await write(catalogue, "v", 0, 1)
            await catalogue.create_snapshots([("v", "s")])
            revoked: list[int] = []
            closing: list[asyncio.Task[None]] = []
            handles: list[Handle] = []

            def revoke(index: int) -> Callable[[], None]:
                async def close() -> None:
                    await asyncio.sleep(0.01)
                    await catalogue.close_export(handles[index])

                def revoking() -> None:
                    revoked.append(index)
                    closing.append(asyncio.ensure_future(close()))

                return revoking

            for index in range(3):
                handles.append(await catalogue.open_volume("v", revoke(index)))
            await handles[0].write(0, b"\2" * BLOCK)
            await handles[0].flush()
            await catalogue.rollback("v", "s", force=True)
            assert sorted(revoked) == [0, 1, 2]
            assert all(task.done() for task in closing)
            assert (await read(catalogue, "v"))[0] == 1
            await quiet(catalogue)

    run(scenario())


def test_a_client_that_does_not_let_go_leaves_the_volume_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalogue_module, "_REVOKE_SECONDS", 0.02)

    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", SIZE)
            await catalogue.create_snapshots([("v", "s")])
            await quiet(catalogue)
            handle = await catalogue.open_volume("v", lambda: None)
            await handle.write(0, b"\2" * BLOCK)
            layers = set(await store.list_layers())
            with pytest.raises(InUseError, match="does not let go"):
                await catalogue.rollback("v", "s", force=True)
            assert set(await store.list_layers()) == layers
            await handle.write(BLOCK, b"\3" * BLOCK)
            await catalogue.close_export(handle)
            assert (await read(catalogue, "v"))[:2] == b"\2\3"

    run(scenario())


# What a crash or damage leaves


def test_orphans_go_at_the_next_start_but_nothing_goes_when_a_manifest_is_unreadable() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            for name in ("v", "w"):
                await catalogue.create_volume(name, SIZE)
                await write(catalogue, name, 0, 7)
        live = set(await store.list_layers())
        await store.create_layer("0badc0de")
        (first, second) = await store.list_records("volumes")
        good = store._records["volumes", first]
        for bad in (good[:-1], b"", good[:30] + b"\0" + good[31:]):
            store._records["volumes", first] = bad
            async with opened(store) as catalogue:
                _, (lost,) = await catalogue.survey_volumes()
            assert f"memory:volumes/{first}" in lost.problem
            assert set(await store.list_layers()) == live | {"0badc0de"}
        store._records["volumes", first] = store._records["volumes", second]
        async with opened(store) as catalogue:
            _, (lost,) = await catalogue.survey_volumes()
        assert "another volume" in lost.problem
        assert set(await store.list_layers()) == live | {"0badc0de"}
        store._records["volumes", first] = good
        async with opened(store) as catalogue:
            assert set(await store.list_layers()) == live
            assert (await read(catalogue, "v"))[0] == 7

    run(scenario())


def test_a_commit_that_may_have_happened_is_not_undone(tmp_path: Path) -> None:
    """The record was replaced but its directory could not be synced: old or new, nobody knows."""

    async def scenario() -> None:
        store = FaultyStore()
        commit = store.commit_record

        async def fails(kind: str, name: str, content: bytes) -> None:
            await commit(kind, name, content)
            if kind == "volumes":
                raise OSError(errno.EIO, "fsync")

        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        await write(catalogue, "v", 0, 1)
        await catalogue.create_snapshots([("v", "s")])
        await quiet(catalogue)
        await write(catalogue, "v", 0, 2)
        old = dict(store._records)
        store.commit_record = fails  # type: ignore[method-assign]
        with pytest.raises(OSError):
            await catalogue.rollback("v", "s")
        store.commit_record = commit  # type: ignore[method-assign]
        await refused(UnavailableError, "restart", catalogue.create_volume("w", SIZE))
        await refused(UnavailableError, "restart", catalogue.rollback("v", "s"))
        await refused(UnavailableError, "restart", catalogue.delete_snapshot("v", "s"))
        assert (await read(catalogue, "v"))[0] == 2
        await catalogue.close()
        new = store.after_crash("kill")
        other = store.after_crash("kill")
        other._records = old
        async with opened(new) as catalogue:
            assert (await read(catalogue, "v"))[0] == 1
        async with opened(other) as catalogue:
            assert (await read(catalogue, "v"))[0] == 2

    run(scenario())


def test_a_commit_that_surely_failed_is_forgotten() -> None:
    async def scenario() -> None:
        store = FaultyStore()

        def hook(kind: str, layer: str, detail: Any) -> None:
            if kind == "commit":
                raise OSError(errno.EMFILE, "too many open files")

        async with opened(store) as catalogue:
            store.hook = hook
            with pytest.raises(OSError):
                await catalogue.create_volume("v", SIZE)
            store.hook = lambda *_: None
            assert await store.list_layers() == []
            await catalogue.create_volume("v", SIZE)
            assert (await read(catalogue, "v")) == bytes(32)

    run(scenario())


# Ends


@pytest.mark.parametrize("turns", range(0, 40, 3))
def test_a_cancelled_caller_leaves_nothing_half_done(turns: int) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", SIZE)
            await write(catalogue, "v", 0, 1)
            await catalogue.create_snapshots([("v", "s")])
            operations: list[Callable[[], Awaitable[Any]]] = [
                lambda: catalogue.create_volume("n", SIZE),
                lambda: catalogue.clone_volume("c", "v", "s"),
                lambda: catalogue.create_snapshots([("v", "t"), ("v", "u")][:1]),
                lambda: catalogue.open_volume("v", lambda: None),
                lambda: catalogue.open_snapshot("v", "s", lambda: None),
                lambda: catalogue.rollback("v", "s"),
                lambda: catalogue.resize_volume("v", 2 * SIZE),
                lambda: catalogue.delete_snapshot("v", "s"),
            ]
            for operation in operations:
                task = asyncio.ensure_future(operation())
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                (result,) = await asyncio.gather(task, return_exceptions=True)
                if isinstance(result, Handle):
                    await catalogue.close_export(result)
                await catalogue.list_volumes()
                await quiet(catalogue)
                await until(lambda: not catalogue._views._leases)
                live = catalogue._manifests.live_layers()
                await until(lambda: set(store._data) == catalogue._manifests.live_layers())
                assert live == catalogue._manifests.live_layers()
            assert all(info.clients == 0 for info in await catalogue.list_volumes())
            assert (await read(catalogue, "v"))[0] == 1

    run(scenario())


def test_close_lets_what_runs_finish_and_refuses_what_waits() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        handle = await catalogue.open_volume("v", lambda: None)
        await handle.write(0, b"\1" * BLOCK)
        operations = [
            asyncio.ensure_future(operation)
            for operation in (
                catalogue.create_snapshots([("v", "a")]),
                catalogue.create_volume("w", SIZE),
                catalogue.create_snapshots([("v", "b")]),
                catalogue.rename_volume("v", "x"),
                catalogue.delete_snapshot("v", "a"),
                catalogue.open_volume("v", lambda: None),
                catalogue.begin_import("i", SIZE),
                catalogue.list_volumes(),
            )
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.gather(catalogue.close(), catalogue.close())
        store.events.clear()
        results = await asyncio.gather(*operations, return_exceptions=True)
        assert not isinstance(results[0], BaseException)
        for result in results[1:]:
            assert isinstance(result, UnavailableError), result
        await catalogue.close_export(handle)
        assert store.events == [], "something was changed after the store was given up"
        async with opened(store) as catalogue:
            assert [info.name for info in catalogue.list_snapshots("v")] == ["a"]
            assert (await read(catalogue, "v"))[0] == 1

    run(scenario())


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(LocalLayerStore(tmp_path / "data")):
            with pytest.raises(InUseError, match="in use by another"):
                await Catalogue.open(LocalLayerStore(tmp_path / "data"))
        async with opened(LocalLayerStore(tmp_path / "data")):
            pass

    run(scenario())


# Pins, sources and other processes


def test_a_pin_stops_merges_and_they_go_on_when_it_is_gone() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", SIZE)
            for index in range(4):
                await write(catalogue, "v", index, index + 1, 4)
                await catalogue.create_snapshots([("v", f"s{index}")])
            await quiet(catalogue)
            pin = await catalogue.pin("v", "s2")
            source = await open_source(store, pin.source)
            before = await read(catalogue, "v@s2")
            assert len(source.ancestors()) == 3
            await catalogue.delete_snapshot("v", "s0")
            await catalogue.delete_snapshot("v", "s1")
            assert store.kinds("punch", "delete_layer") == []
            buffer = bytearray(SIZE)
            source.read_into(0, memoryview(buffer))
            assert bytes(buffer[::BLOCK]) == before
            assert source.extents() == [(0, 6 * BLOCK)]
            changed = await asyncio.to_thread(source.changed_extents, source.ancestors()[-1])
            assert changed == [(BLOCK, 5 * BLOCK)]
            source.close()
            pin.release()
            await quiet(catalogue)
            assert len(store.kinds("delete_layer")) == 2
            assert await read(catalogue, "v@s2") == before

    run(scenario())


def test_layers_that_only_a_pin_kept_go_with_it() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", SIZE)
            await catalogue.create_snapshots([("v", "s")])
            await write(catalogue, "v", 0, 1)
            await catalogue.create_snapshots([("v", "branch")])
            await catalogue.rollback("v", "s")
            await quiet(catalogue)
            pin = await catalogue.pin("v", "s")
            await catalogue.delete_snapshot("v", "branch")
            assert set(await store.list_layers()) > catalogue._manifests.live_layers()
            pin.release()
            await quiet(catalogue)
            assert set(await store.list_layers()) == catalogue._manifests.live_layers()

    run(scenario())


HOLDER = """
import asyncio, sys
from pathlib import Path
from backends.local_layers import LocalLayerStore
store = LocalLayerStore(Path(sys.argv[1]))
claims = [asyncio.run(store.pin_layer(layer)) for layer in sys.argv[2:]]
print("pinned", flush=True)
sys.stdin.read()
"""


def test_a_backup_that_outlived_its_daemon_defers_merges(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = LocalLayerStore(tmp_path)
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", SIZE)
            for index in range(3):
                await write(catalogue, "v", index, index + 1, 4)
                await catalogue.create_snapshots([("v", f"s{index}")])
            await quiet(catalogue)
            layers = await store.list_layers()
            expected = await read(catalogue, "v@s1")
        holder = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", HOLDER, str(tmp_path), *layers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdin is not None and holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"pinned\n"
            async with opened(store) as catalogue:
                await catalogue.delete_snapshot("v", "s0")
                assert catalogue._merging.deferred
                assert set(layers) <= set(await store.list_layers())
                holder.stdin.close()
                holder.wait()
                await catalogue._merging.merge_now()
                assert not catalogue._merging.deferred
                assert len(set(layers) - set(await store.list_layers())) == 1
                assert await read(catalogue, "v@s1") == expected
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()

    run(scenario())


def test_a_source_reads_while_other_volumes_are_merged(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = LocalLayerStore(tmp_path)
        async with opened(store) as catalogue:
            for name in ("v", "w"):
                await catalogue.create_volume(name, SIZE)
                for index in range(3):
                    await write(catalogue, name, index, index + 1, 4)
                    await catalogue.create_snapshots([(name, f"s{index}")])
            pin = await catalogue.pin("v", "s2")
            source = await open_source(LocalLayerStore(tmp_path), pin.source)

            def read_on() -> set[bytes]:
                seen = set()
                for _ in range(200):
                    buffer = bytearray(SIZE)
                    source.read_into(0, memoryview(buffer))
                    seen.add(bytes(buffer[::BLOCK]))
                return seen

            reading = asyncio.create_task(asyncio.to_thread(read_on))
            await catalogue.delete_snapshot("w", "s0")
            await catalogue.delete_snapshot("w", "s1")
            await catalogue.delete_snapshot("v", "s0")
            assert await reading == {bytes([1, 2, 3, 3, 3, 3]) + bytes(26)}
            source.close()
            pin.release()

    run(scenario())


# Imports


def test_an_import_is_nothing_until_it_is_committed() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as catalogue:
            await catalogue.create_volume("v", SIZE)
            layers = set(await store.list_layers())
            begun = await catalogue.begin_import("i", SIZE)
            await refused(ExistsError, "being restored", catalogue.create_volume("i", SIZE))
            await refused(ExistsError, "being restored", catalogue.rename_volume("v", "i"))
            await refused(ExistsError, "being restored", catalogue.begin_import("i", SIZE))
            assert catalogue.volume_names() == ["v"]
            # Not finished: its journal is missing.
            await refused(NotFoundError, "journal is missing", catalogue.commit_import(begun))
            await catalogue.discard_import(begun)
            await catalogue.discard_import(begun)
            assert set(await store.list_layers()) == layers
            await refused(NotFoundError, "given up", catalogue.commit_import(begun))

            begun = await catalogue.begin_import("i", SIZE)
            sink = await open_sink(store, begun.sink)
            for offset, length in ((1, BLOCK), (0, 100), (SIZE, BLOCK), (-BLOCK, BLOCK)):
                with pytest.raises(InvalidError):
                    sink.write(offset, bytes(length))
            sink.write(3 * BLOCK, b"\4" * (2 * BLOCK))
            await sink.finish()
            sink.close()
            info = await catalogue.commit_import(begun)
            assert (info.name, info.mapped, info.size) == ("i", 2 * BLOCK, SIZE)
            await catalogue.discard_import(begun)
            await write(catalogue, "i", 4, 5)
            left = await catalogue.begin_import("left", SIZE)
        assert left.sink.layer not in await store.list_layers()
        async with opened(store.after_crash("cut")) as catalogue:
            assert (await read(catalogue, "i"))[:6] == bytes([0, 0, 0, 4, 5, 0])
            assert catalogue.volume_names() == ["i", "v"]

    run(scenario())
