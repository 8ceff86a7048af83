"""Volumes on a store that notes every operation, fails on demand and forgets what is not synced."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from backends.errors import NoSpaceError
from snapshots import head as head_module
from snapshots import volume as volume_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.volume import Volume
from tests.snapshots.stores import BLOCK, FaultyStore, run, until

SIZE = 64 * BLOCK
MIB = 1 << 20


@asynccontextmanager
async def opened(
    store: FaultyStore, size: int = SIZE, name: str = "v"
) -> AsyncIterator[tuple[Catalogue, Handle]]:
    catalogue = await Catalogue.open(store)
    if name not in catalogue.volume_names():
        await catalogue.create_volume(name, size)
    handle = await catalogue.open_volume(name, lambda: None)
    try:
        yield catalogue, handle
    finally:
        await catalogue.close_export(handle)
        await catalogue.close()


async def get(handle: Handle, block: int, count: int = 1) -> bytes:
    buffer = bytearray(count * BLOCK)
    await handle.read(block * BLOCK, memoryview(buffer))
    return bytes(buffer)


def fill(value: int, count: int = 1) -> bytes:
    return bytes([value]) * (count * BLOCK)


def volume_of(handle: Handle) -> Volume:
    assert isinstance(handle.view, Volume)
    return handle.view


async def settled(handle: Handle) -> None:
    """Until nothing runs in the background, punches included."""
    volume = volume_of(handle)
    while volume._tasks:
        await asyncio.wait(set(volume._tasks))


# FLUSH


def test_flush_syncs_data_then_appends_then_syncs_the_journal() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            await handle.write(0, fill(1, 3))
            store.events.clear()
            await handle.flush()
            assert [kind for kind, _, _ in store.events] == ["sync", "append", "log_sync"]

    run(scenario())


def test_a_flush_without_new_blocks_costs_one_sync_and_one_without_writes_none() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            await handle.write(0, fill(1, 3))
            await handle.flush()
            store.events.clear()
            await handle.flush()
            assert store.events == []
            assert handle.try_write(BLOCK, memoryview(b"x" * 100))
            store.events.clear()
            await handle.flush()
            assert [kind for kind, _, _ in store.events] == ["sync"]

    run(scenario())


def test_flushes_that_wait_share_the_next_sync() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        entered, go = threading.Event(), threading.Event()

        def hook(kind: str, layer: str, detail: Any) -> None:
            if kind == "sync" and not entered.is_set():
                entered.set()
                go.wait(30)

        async with opened(store) as (_, handle):
            store.events.clear()
            await handle.write(0, fill(1))
            store.hook = hook
            store.guard = threading.RLock()
            first = asyncio.ensure_future(handle.flush())
            await until(entered.is_set)
            # The hook waits inside the store's guard, so writes go around the store here.
            volume_of(handle).head.written += 1
            others = [asyncio.ensure_future(handle.flush()) for _ in range(20)]
            await asyncio.sleep(0.01)
            assert not first.done()
            assert not any(other.done() for other in others)
            go.set()
            await asyncio.gather(first, *others)
            assert len(store.kinds("sync")) == 2

    run(scenario())


@pytest.mark.parametrize("how", ["cut", "mixed", "kill"])
def test_what_was_flushed_is_there_after_a_crash_whatever_came_later(how: str) -> None:
    async def before(store: FaultyStore, seed: int) -> tuple[bytes, list[set[int]]]:
        choice = random.Random(seed)
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        handle = await catalogue.open_volume("v", lambda: None)
        now = bytearray(64)
        flushed = bytes(64)
        later: list[set[int]] = [set() for _ in range(64)]
        crash_at = choice.randrange(20, 80)
        for step in range(crash_at):
            block, count = choice.randrange(60), choice.randrange(1, 5)
            what = choice.random()
            if what < 0.5:
                value = step % 255 + 1
                await handle.write(block * BLOCK, fill(value, count))
            elif what < 0.8:
                value = 0
                await handle.trim(block * BLOCK, count * BLOCK)
            elif what < 0.97:
                await handle.flush()
                flushed, later = bytes(now), [set() for _ in range(64)]
                continue
            else:
                await catalogue.create_snapshots([("v", f"s{step}")])
                flushed, later = bytes(now), [set() for _ in range(64)]
                continue
            for each in range(block, block + count):
                now[each] = value
                later[each].add(value)
        store.dead = True
        catalogue._views.threads.close()
        return flushed, later

    async def after(store: FaultyStore, flushed: bytes, later: list[set[int]]) -> None:
        async with opened(store) as (_, handle):
            for block in range(64):
                found = await get(handle, block)
                assert found == fill(found[0]), "a block is torn"
                assert found[0] in {flushed[block]} | later[block], f"block {block}"

    def abandoned(store: FaultyStore, seed: int) -> tuple[bytes, list[set[int]]]:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        try:
            return loop.run_until_complete(before(store, seed))
        finally:
            for task in asyncio.all_tasks(loop):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.close()

    for seed in range(40):
        store = FaultyStore()
        flushed, later = abandoned(store, seed)
        found = store.after_crash(how, seed)
        run(after(found, flushed, later))
        # And once more after the next crash, which comes right away.
        run(after(found.after_crash(how, seed), flushed, later))


def test_what_a_killed_process_appended_is_durable_before_anything_builds_on_it() -> None:
    async def scenario() -> None:
        store = FaultyStore()

        def hook(kind: str, layer: str, detail: Any) -> None:
            if kind == "log_sync" and detail == "journal":
                raise OSError(errno.EIO, "lost")

        async with opened(store) as (_, handle):
            await handle.write(0, fill(1))
            await handle.flush()
            store.hook = hook
            await handle.write(5 * BLOCK, fill(2))
            with pytest.raises(OSError, match="sync failed"):
                await handle.flush()
        # The second sector is written, but not durable. Killed, started, flushed again:
        killed = store.after_crash("kill")
        async with opened(killed) as (_, handle):
            assert await get(handle, 5) == fill(2)
            synced = [detail for _, _, detail in killed.kinds("log_sync")]
            assert synced == ["journal"]
            assert not killed.kinds("append")

    run(scenario())


# Holes


def test_holes_are_punched_only_once_the_journal_says_zero_durably() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            await handle.write(0, fill(1, 10))
            await handle.flush()
            store.events.clear()
            await handle.trim(2 * BLOCK, 4 * BLOCK)
            await settled(handle)
            assert store.events == []
            assert await get(handle, 3) == fill(0)
            await handle.flush()
            await settled(handle)
            kinds = [kind for kind, _, _ in store.events]
            assert kinds == ["sync", "append", "log_sync", "punch"]
            assert store.events[-1][2] == (2 * BLOCK, 4 * BLOCK)

    run(scenario())


def test_a_block_written_again_is_not_punched() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (_, handle):
            await handle.write(0, fill(1, 10))
            await handle.flush()
            await handle.trim(0, 10 * BLOCK)

            def rewrite(kind: str, layer: str, detail: Any) -> None:
                if kind == "log_sync":
                    store.hook = lambda *_: None
                    loop.call_soon_threadsafe(handle.try_write, 4 * BLOCK, memoryview(fill(9)))

            loop = asyncio.get_running_loop()
            store.hook = rewrite
            await handle.flush()
            await settled(handle)
            punched = {
                block
                for _, _, (offset, length) in store.kinds("punch")
                for block in range(offset // BLOCK, (offset + length) // BLOCK)
            }
            assert punched == set(range(10)) - {4}
            assert await get(handle, 4) == fill(9)
            await handle.flush()
        async with opened(store) as (_, handle):
            assert await get(handle, 0, 10) == fill(0, 4) + fill(9) + fill(0, 5)

    run(scenario())


# Failures


def test_a_failed_sync_refuses_writes_and_flushes_but_not_reads() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        fail = True

        def hook(kind: str, layer: str, detail: Any) -> None:
            if kind == "sync" and fail:
                raise OSError(errno.EIO, "gone")

        async with opened(store) as (catalogue, handle):
            await handle.write(0, fill(1))
            store.hook = hook
            with pytest.raises(OSError) as caught:
                await handle.flush()
            assert caught.value.errno == errno.EIO
            fail = False  # a later fdatasync would succeed, and prove nothing
            assert not handle.try_write(0, memoryview(fill(2)))
            operations = [
                lambda: handle.write(0, fill(2)),
                handle.flush,
                lambda: handle.trim(0, BLOCK),
                lambda: handle.write_zeroes(0, BLOCK, no_hole=True),
                lambda: handle.write_zeroes(0, 100, no_hole=False),
                lambda: catalogue.create_snapshots([("v", "s")]),
            ]
            for operation in operations:
                with pytest.raises(OSError) as caught:
                    await operation()
                assert caught.value.errno == errno.EIO
            assert await get(handle, 0) == fill(1)
            assert catalogue.list_snapshots() == []

    run(scenario())


def test_a_failed_commit_of_a_snapshot_makes_nothing_durable_that_would_be_lost() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (catalogue, handle):
            await handle.write(0, fill(1))
            await handle.flush()

            def hook(kind: str, layer: str, detail: Any) -> None:
                if kind == "commit":
                    raise NoSpaceError("full")

            store.hook = hook
            with pytest.raises(NoSpaceError):
                await catalogue.create_snapshots([("v", "s")])
            with pytest.raises(OSError):
                await handle.write(0, fill(2))
            with pytest.raises(OSError):
                await handle.flush()
            assert await get(handle, 0) == fill(1)
            store.hook = lambda *_: None
        async with opened(store) as (catalogue, handle):
            assert await get(handle, 0) == fill(1)
            assert catalogue.list_snapshots() == []
            await handle.write(0, fill(3))
            await handle.flush()

    run(scenario())


# The disk is full


def test_a_write_without_space_changes_nothing_and_gives_back_what_it_took() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store, 4096 * BLOCK) as (catalogue, handle):
            await handle.write(0, fill(1, 8))
            await catalogue.create_snapshots([("v", "s")])
            await handle.write(0, fill(2, 4))
            await handle.flush()
            await until(lambda: not catalogue._merging._tasks)  # the sealed layer gets its index
            store.capacity = store.used + 3 * BLOCK
            used = store.used
            for length in (6 * BLOCK, 100 * BLOCK, 2 * MIB):
                for offset in (2 * BLOCK, 2 * BLOCK + 100):
                    with pytest.raises(OSError) as caught:
                        await handle.write(offset, b"\7" * length)
                    assert caught.value.errno == errno.ENOSPC
                    assert store.used == used
            with pytest.raises(OSError) as caught:
                await handle.write_zeroes(16 * BLOCK, 64 * BLOCK, no_hole=True)
            assert caught.value.errno == errno.ENOSPC
            assert store.used == used
            # Blocks that were the head's own may have been overwritten; the others are as before.
            assert await get(handle, 4, 12) == fill(1, 4) + fill(0, 8)
            # Overwrites, TRIM and FLUSH go on.
            await handle.write(0, fill(3, 4))
            await handle.flush()
            await handle.trim(0, 4 * BLOCK)
            await handle.flush()
            await settled(handle)
            assert store.used == used - 4 * BLOCK
            assert await get(handle, 0, 8) == fill(0, 4) + fill(1, 4)
            # There is space again.
            await handle.write(20 * BLOCK, fill(5, 5))
            await handle.flush()
            store.capacity = 1 << 60
        async with opened(store) as (_, handle):
            assert await get(handle, 0, 8) == fill(0, 4) + fill(1, 4)
            assert await get(handle, 20, 5) == fill(5, 5)

    run(scenario())


def test_the_journal_has_room_for_everything_that_was_taken() -> None:
    """However extents alternate: on a full disk a FLUSH never fails for want of journal."""

    async def scenario(adjacent: bool, blocks: int) -> None:
        choice = random.Random(1)
        store = FaultyStore()
        async with opened(store, blocks * BLOCK) as (_, handle):
            volume = volume_of(handle)
            # Owned without writing 400 MB: what matters here are the extents.
            volume.owners.set(0, blocks, volume.head.slot)
            store.capacity = store.used
            refused = 0
            for block in range(0, blocks - 1, 2):
                at = block if adjacent else choice.randrange(blocks)
                try:
                    await volume._disown(at, at + 1)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    refused += 1
                if len(volume.head.pending) < volume.head.write_limit and at + 1 < blocks:
                    volume._take(volume.head, at + 1, at + 2)
                if block % 1000 == 0:
                    await asyncio.sleep(0)
            await handle.flush()
            assert volume.failure is None
            assert store.used <= store.capacity
            await settled(handle)
            store.capacity = 1 << 60

    run(scenario(True, 160_000))
    run(scenario(False, 12_000))


def test_writes_wait_for_room_in_the_journal_and_get_no_space_without() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        blocks = 60_000
        async with opened(store, blocks * BLOCK) as (_, handle):
            head = volume_of(handle).head
            store.capacity = store.used + 200 * BLOCK
            limit = head.write_limit
            assert head.zero_limit > limit > 0
            error = None
            taken = 0
            for block in range(0, blocks, 2):
                try:
                    await handle.write(block * BLOCK, fill(1))
                except OSError as failed:
                    error = failed
                    break
                taken += 1
            assert error is not None and error.errno == errno.ENOSPC
            assert taken <= 200
            await handle.trim(0, blocks * BLOCK)
            await handle.flush()
            await settled(handle)
            await handle.write(0, fill(2))
            await handle.flush()

    run(scenario())


# Concurrency


def test_writes_to_one_block_from_many_sides_all_land() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (catalogue, handle):
            await handle.write(0, fill(9, 4))
            for round_number in range(4):
                await catalogue.create_snapshots([("v", f"s{round_number}")])
                part = 64
                writes = []
                for index in range(2 * BLOCK // part):
                    writes.append(handle.write(index * part + 10, bytes([index % 250 + 1]) * 40))
                random.Random(round_number).shuffle(writes)
                await asyncio.gather(*writes, *(handle.flush() for _ in range(3)))
                found = await get(handle, 0, 3)
                for index in range(2 * BLOCK // part):
                    at = index * part
                    assert found[at + 10 : at + 50] == bytes([index % 250 + 1]) * 40
                    assert found[at : at + 10] == b"\x09" * 10

    run(scenario())


def test_a_write_in_a_thread_across_the_gate_is_in_the_snapshot_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(volume_module, "INLINE_WRITE", 256 << 10)

    async def scenario(length: int, owned: bool) -> None:
        store = FaultyStore()
        entered, go = threading.Event(), threading.Event()
        async with opened(store, 512 * BLOCK) as (catalogue, handle):
            if owned:
                await handle.write(0, fill(1, 512))

            def hook(kind: str, layer: str, detail: Any) -> None:
                if kind == "write" and detail[1] >= length and not entered.is_set():
                    entered.set()
                    store.guard.release()
                    go.wait(30)
                    store.guard.acquire()

            store.hook = hook
            writing = asyncio.ensure_future(handle.write(BLOCK, b"\7" * length))
            await until(entered.is_set)
            sealing = asyncio.ensure_future(catalogue.create_snapshots([("v", "s")]))
            old = volume_of(handle).head
            await until(lambda: volume_of(handle).head is not old)
            assert not writing.done()
            assert not sealing.done()
            # A FLUSH waits for the commit; a write elsewhere goes into the new head at once.
            flushing = asyncio.ensure_future(handle.flush())
            await handle.write(500 * BLOCK, fill(8))
            await asyncio.sleep(0.01)
            assert not flushing.done()
            assert not sealing.done()
            go.set()
            await asyncio.gather(writing, sealing, flushing)
            snapshot = await catalogue.open_snapshot("v", "s", lambda: None)
            buffer = bytearray(length)
            await snapshot.read(BLOCK, memoryview(buffer))
            assert buffer == b"\7" * length
            assert await get(snapshot, 500) == fill(1 if owned else 0)
            await catalogue.close_export(snapshot)
            # Once: the new head owns nothing of it.
            owners = volume_of(handle).owners
            new = volume_of(handle).head.slot
            assert list(owners.runs(0, 400)) and all(
                owner != new for _, _, owner in owners.runs(0, 400)
            )
            assert await get(handle, 500) == fill(8)
        for found in (store.after_crash("cut"), store):
            found.dead = False
            found._locked = False
            async with opened(found) as (catalogue, handle):
                buffer = bytearray(length)
                await handle.read(BLOCK, memoryview(buffer))
                assert buffer == b"\7" * length
                assert await get(handle, 500) == fill(8)

    run(scenario(MIB, False))
    run(scenario(MIB, True))
    run(scenario(MIB + 100, True))


def test_a_flush_during_a_commit_waits_for_it() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store) as (catalogue, handle):
            gate = asyncio.Event()
            committing = asyncio.Event()
            commit = store.commit_record

            async def slow(kind: str, name: str, content: bytes) -> None:
                committing.set()
                await gate.wait()
                await commit(kind, name, content)

            store.commit_record = slow  # type: ignore[method-assign]
            sealing = asyncio.ensure_future(catalogue.create_snapshots([("v", "s")]))
            await committing.wait()
            await handle.write(0, fill(4))
            flushing = asyncio.ensure_future(handle.flush())
            await asyncio.sleep(0.02)
            assert not flushing.done()
            assert not store.kinds("append")
            gate.set()
            await asyncio.gather(sealing, flushing)
        for found in (store.after_crash("cut"),):
            async with opened(found) as (_, handle):
                assert await get(handle, 0) == fill(4)

    run(scenario())


def test_a_group_is_one_instant() -> None:
    """A client that counts up in one volume, then in the other, is never seen out of order."""

    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await Catalogue.open(store)
        for name in ("one", "two"):
            await catalogue.create_volume(name, SIZE)
        one = await catalogue.open_volume("one", lambda: None)
        two = await catalogue.open_volume("two", lambda: None)
        stop = False

        async def count() -> int:
            number = 0
            while not stop:
                number += 1
                for handle in (one, two):
                    data = number.to_bytes(8, "big") * 64
                    # Sub-block, whole, and so large that a thread takes it.
                    length = (512, BLOCK, 16 * BLOCK)[number % 3]
                    data = (data * 128)[:length]
                    if number % 2 or not handle.try_write(0, memoryview(data)):
                        await handle.write(0, data)
                await asyncio.sleep(0)
            return number

        counting = asyncio.create_task(count())
        for index in range(25):
            await asyncio.sleep(0.002)
            await catalogue.create_snapshots([("one", f"s{index}"), ("two", f"s{index}")])
        stop = True
        assert await counting > 25
        seen = []
        for index in range(25):
            pair = []
            for name in ("one", "two"):
                snapshot = await catalogue.open_snapshot(name, f"s{index}", lambda: None)
                pair.append(int.from_bytes((await get(snapshot, 0))[:8], "big"))
                await catalogue.close_export(snapshot)
            first, second = pair
            assert first - second in (0, 1)
            seen.append(first)
        assert seen == sorted(seen)
        assert seen[-1] > seen[0]
        await catalogue.close_export(one)
        await catalogue.close_export(two)
        await catalogue.close()

    limit = volume_module.INLINE_WRITE
    volume_module.INLINE_WRITE = 2 * BLOCK
    try:
        run(scenario())
    finally:
        volume_module.INLINE_WRITE = limit


def test_a_trim_of_sixteen_tebibytes_lets_others_run() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store, 16 << 40) as (_, handle):
            for tebibyte in range(16):
                await handle.write(tebibyte << 40, fill(tebibyte + 1))
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.create_task(other())
            await handle.trim(0, 16 << 40)
            task.cancel()
            assert turns >= 1000
            assert await get(handle, 0) == fill(0)
            await handle.flush()
            assert handle.extents(0, 16 << 40, 10) == [(16 << 40, False)]

    run(scenario())


# The journal's own size


def test_a_journal_is_compacted_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_COMPACT_FROM", 20 * 512)
    monkeypatch.setattr(volume_module, "SYNC_FROM", 16)

    async def scenario() -> None:
        store = FaultyStore()
        model = bytearray(SIZE)
        choice = random.Random(5)
        async with opened(store) as (_, handle):

            async def client(base: int) -> None:
                for step in range(150):
                    offset = (base + choice.randrange(14)) * BLOCK
                    length = choice.choice([100, BLOCK, 2 * BLOCK])
                    if choice.random() < 0.4:
                        await handle.trim(offset, length)
                        model[offset : offset + length] = bytes(length)
                    else:
                        data = bytes([step % 255 + 1]) * length
                        await handle.write(offset, data)
                        model[offset : offset + length] = data
                    if choice.random() < 0.3:
                        await handle.flush()

            await asyncio.gather(*(client(base) for base in (0, 16, 32, 48)))
            await handle.flush()
            compacted = [event for event in store.kinds("create_log") if event[2] == "journal"]
            assert len(compacted) >= 3
            assert volume_of(handle).head._end <= 60 * 512
            assert bytes(await get(handle, 0, 64)) == bytes(model)
            content = bytes(model)
        cut = store.after_crash("cut")
        async with opened(cut) as (_, handle):
            assert await get(handle, 0, 64) == content

    run(scenario())


def test_a_torn_tail_is_cut_off_and_never_comes_back() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store, 4096 * BLOCK) as (_, handle):
            volume_of(handle).head.ample = True  # no early sync: all is one batch
            for block in range(0, 4096, 2):
                await handle.write(block * BLOCK, fill(1))
            await handle.flush()
            (layer,) = await store.list_layers()
            journal = store._logs[layer]["journal"]
            end = volume_of(handle).head._end
            assert end >= 10 * 512
        # The batch was never acknowledged, and its second and fifth sector did not get written.
        # Nor did the mark that closing the volume wrote.
        for lost in (2, 5, end // 512):
            journal[lost * 512 : (lost + 1) * 512] = bytes(512)
        kept = 0
        async with opened(store) as (_, handle):
            assert len(store._logs[layer]["journal"]) >= 2 * 512
            while await get(handle, 2 * kept) == fill(1):
                kept += 1
            assert 40 < kept < 2048 // 4
            for block in range(2 * kept, 4096, 256):
                assert await get(handle, block) == fill(0)
            await handle.write(4000 * BLOCK, fill(2))
            await handle.flush()
        async with opened(store) as (_, handle):
            assert await get(handle, 4000) == fill(2)
            assert await get(handle, 2 * kept) == fill(0)

    run(scenario())


def test_many_extents_survive_a_reopening() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        blocks = 1 << 16
        async with opened(store, blocks * BLOCK) as (catalogue, handle):
            volume = volume_of(handle)
            for block in range(0, blocks, 2):
                if not handle.try_write(block * BLOCK, memoryview(b"x")):
                    await handle.write(block * BLOCK, b"x")
            await handle.flush()
            assert volume.owners.count_owned() == blocks // 2
            await catalogue.create_snapshots([("v", "s")])
        for _ in range(2):
            async with opened(store) as (_, handle):
                assert volume_of(handle).owners.count_owned() == blocks // 2
                assert handle.extents(0, blocks * BLOCK, 5) == [
                    (BLOCK, True),
                    (BLOCK, False),
                    (BLOCK, True),
                    (BLOCK, False),
                    (BLOCK, True),
                ]

    run(scenario())


# Cancellation


def test_a_cancelled_writer_leaves_a_whole_write() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        async with opened(store, 1024 * BLOCK) as (_, handle):
            for turn in range(30):
                data = bytes([turn + 1]) * (300 * BLOCK)
                writing = asyncio.ensure_future(handle.write(100, data))
                for _ in range(turn % 6):
                    await asyncio.sleep(0)
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
                await settled(handle)
                buffer = bytearray(len(data))
                await handle.read(100, memoryview(buffer))
                assert len(set(buffer)) == 1
                assert buffer[0] in (turn, turn + 1, 0) or turn == 0
            assert not volume_of(handle)._locks.entries

    run(scenario())


def test_a_write_that_reads_first_keeps_others_off_its_block() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        entered, go = threading.Event(), threading.Event()

        def wait(layer: str) -> None:
            entered.set()
            go.wait(30)

        async with opened(store) as (catalogue, handle):
            await handle.write(0, fill(1))
            await catalogue.create_snapshots([("v", "s")])
            store.on_read, store.cold = wait, True
            first = asyncio.ensure_future(handle.write(100, b"\2" * 100))
            await until(entered.is_set)
            assert not handle.try_write(0, memoryview(b"\3" * BLOCK))
            assert not handle.try_write(200, memoryview(b"\3"))
            second = asyncio.ensure_future(handle.write(150, b"\4" * 100))
            third = asyncio.ensure_future(handle.trim(0, 50))
            assert handle.try_write(BLOCK, memoryview(fill(5)))
            await asyncio.sleep(0.01)
            assert not (first.done() or second.done() or third.done())
            go.set()
            await asyncio.gather(first, second, third)
            store.cold = False
            expected = bytes(50) + b"\1" * 50 + b"\2" * 50 + b"\4" * 100 + b"\1" * (BLOCK - 250)
            assert await get(handle, 0, 2) == expected + fill(5)

    run(scenario())


def test_recording_syncs_what_is_new_and_leaves_overwrites_to_the_kernel() -> None:
    async def scenario() -> None:
        async with opened(FaultyStore(), 64 * BLOCK) as (_, handle):
            volume = volume_of(handle)
            await handle.write(0, fill(1))
            await volume.record()
            assert not volume.head.dirty
            await handle.write(0, fill(2))
            await volume.record()
            assert volume.head.dirty and not volume.head.pending
            await handle.write(BLOCK, fill(3))
            await volume.record()
            assert not volume.head.dirty
            await handle.trim(0, BLOCK)
            await volume.record()
            assert not volume.head.dirty and await get(handle, 0) == bytes(BLOCK)

    run(scenario())
