"""Space below the head: given back when nobody sees it any more, and never before."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from backends.layers import DataFile
from snapshots import hidden, lending, merge
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.volume import Volume
from tests.snapshots.stores import BLOCK, Crash, FaultyStore, until
from tests.snapshots.test_merges import abandon, put, read_all, read_everything

BLOCKS = 24


async def opened(catalogue: Catalogue, name: str = "v") -> Handle:
    lease = await catalogue.open_volume(name, lambda: None)
    assert isinstance(lease, Handle)
    return lease


def stack(catalogue: Catalogue, name: str = "v") -> list[str]:
    manifest = catalogue._manifests.get(name)
    return manifest.stack(manifest.head)


def held(store: FaultyStore, layer: str) -> set[int]:
    """The blocks that a layer uses space for."""
    return set(store._data[layer])


async def two_layers(store: FaultyStore) -> Catalogue:
    """A volume "v" that was written before a snapshot "s", and in parts after it."""
    catalogue = await Catalogue.open(store)
    await catalogue.create_volume("v", BLOCKS * BLOCK)
    handle = await opened(catalogue)
    await put(handle, 0, 20, 1)
    await catalogue.create_snapshots([("v", "s")])
    await put(handle, 2, 6, 50)
    await handle.trim(10 * BLOCK, 3 * BLOCK)
    await handle.flush()
    await catalogue.close_export(handle)
    await until(lambda: not catalogue._merging._tasks)
    return catalogue


HIDDEN = {2, 3, 4, 5, 10, 11, 12}


@pytest.mark.parametrize("is_open", [True, False])
def test_what_a_deleted_snapshot_alone_held_is_given_back(is_open: bool) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        handle = await opened(catalogue) if is_open else None
        expected = await read_everything(catalogue)
        lower, head = stack(catalogue)
        store.events.clear()
        await catalogue.delete_snapshot("v", "s")
        assert stack(catalogue) == [lower, head], "nothing was copied"
        assert not store.kinds("write")
        assert held(store, lower) == set(range(20)) - HIDDEN
        assert held(store, head) == {2, 3, 4, 5}
        if handle is not None:
            assert await read_all(handle) == expected["v"]
            await catalogue.close_export(handle)
        await until(lambda: not catalogue._views.open_volumes())
        await catalogue.close()
        catalogue = await Catalogue.open(store)
        del expected["v@s"]
        assert await read_everything(catalogue) == expected
        await catalogue.close()

    asyncio.run(scenario())


def test_what_is_written_and_trimmed_later_is_given_back_below() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        await catalogue.delete_snapshot("v", "s")
        lower, head = stack(catalogue)
        # In a life of its own, from which all is given back when it ends.
        handle = await opened(catalogue)
        await put(handle, 0, 1, 100)
        await handle.trim(15 * BLOCK, 2 * BLOCK)
        await catalogue.close_export(handle)
        await until(lambda: not catalogue._views.open_volumes())
        left = set(range(20)) - HIDDEN - {0, 15, 16}
        assert held(store, lower) == left
        # While it is open, and after it was recorded.
        handle = await opened(catalogue)
        await handle.trim(0, BLOCKS * BLOCK)
        assert held(store, lower) == left, "it is not durable yet"
        await catalogue._views.record_all()
        catalogue._freeing.go_round()
        await until(lambda: not held(store, lower) and not held(store, head))
        assert await read_all(handle) == bytes(BLOCKS * BLOCK)
        # The next snapshot merges the two.
        await put(handle, 7, 9, 9)
        await catalogue.create_snapshots([("v", "t")])
        await until(lambda: len(stack(catalogue)) == 2)
        expected = await read_everything(catalogue)
        assert expected["v"] == expected["v@t"] == await read_all(handle)
        assert expected["v"][7 * BLOCK :] == bytes([16]) * BLOCK + bytes([17]) * BLOCK + bytes(
            (BLOCKS - 9) * BLOCK
        )
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def test_what_a_killed_process_left_is_given_back() -> None:
    async def scenario() -> None:
        built = FaultyStore()
        catalogue = await two_layers(built)
        await catalogue.close()
        store = built.after_crash("kill")
        store.hook = refuse_punches(store)
        catalogue = await Catalogue.open(store)
        await catalogue.delete_snapshot("v", "s")
        catalogue._views.threads.close()
        store = store.after_crash("kill")
        catalogue = await Catalogue.open(store)
        lower, _ = stack(catalogue)
        assert held(store, lower) == set(range(20))
        await catalogue.close_export(await opened(catalogue))
        await until(lambda: not catalogue._views.open_volumes())
        assert held(store, lower) == set(range(20)) - HIDDEN
        await catalogue.close()

    asyncio.run(scenario())


def refuse_punches(store: FaultyStore) -> Callable[[str, str, Any], None]:
    def hook(kind: str, layer: str, detail: Any) -> None:
        if kind == "punch":
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    return hook


def test_a_file_system_without_holes_is_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        handle = await opened(catalogue)
        expected = await read_all(handle)
        store.hook = refuse_punches(store)
        await catalogue.delete_snapshot("v", "s")
        for _ in range(3):
            await put(handle, 7, 8, 7)
            await handle.flush()
            await catalogue._freeing.free(catalogue._manifests.get("v").id)
        found = await read_all(handle)
        assert (
            found[: 7 * BLOCK] + found[8 * BLOCK :] == expected[: 7 * BLOCK] + expected[8 * BLOCK :]
        )
        await catalogue.close_export(handle)
        await catalogue.close()

    caplog.set_level(logging.WARNING)
    asyncio.run(scenario())
    assert len([line for line in caplog.messages if "is not given back" in line]) == 1


def test_not_while_a_clone_has_the_layer() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        await catalogue.clone_volume("c", "v", "s")
        expected = await read_everything(catalogue)
        handle = await opened(catalogue)
        lower, _ = stack(catalogue)
        await catalogue.delete_snapshot("v", "s")
        await put(handle, 0, 20, 100)
        await handle.flush()
        catalogue._freeing.go_round()
        await asyncio.sleep(0.02)
        assert held(store, lower) == set(range(20))
        assert (await read_everything(catalogue))["c"] == expected["c"]
        await catalogue.close_export(handle)
        # The clone goes, and the space comes back, though nobody has the volume open.
        await catalogue.delete_volume("c")
        await until(lambda: not held(store, lower))
        await catalogue.close()

    asyncio.run(scenario())


def test_not_while_another_process_reads_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup whose daemon died: the next one does not know of it, but the file is locked."""

    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        lower, _ = stack(catalogue)
        claim = store.claim_layer

        async def claimed(layer: str) -> Any:
            return None

        monkeypatch.setattr(store, "claim_layer", claimed)
        await catalogue.delete_snapshot("v", "s")
        assert held(store, lower) == set(range(20))
        monkeypatch.setattr(store, "claim_layer", claim)
        await catalogue._freeing.free(catalogue._manifests.get("v").id)
        assert held(store, lower) == set(range(20)) - HIDDEN
        await catalogue.close()

    asyncio.run(scenario())


def test_a_claim_that_cannot_be_tried_is_no_failed_deletion(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        expected = await read_everything(catalogue)
        lower = stack(catalogue)[0]

        async def fail(layer: str) -> None:
            raise OSError(errno.EIO, "the claim's file cannot be opened")

        with monkeypatch.context() as patch:
            patch.setattr(store, "claim_layer", fail)
            await catalogue.delete_snapshot("v", "s")
        assert "space is given back later" in caplog.text
        assert held(store, lower) == set(range(20))
        handle = await opened(catalogue)
        await until(lambda: held(store, lower) == set(range(20)) - HIDDEN)
        assert await read_all(handle) == expected["v"]
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def test_pending_blocks_are_left_until_the_journal_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recording does not help here: what is written while a pass looks for holes is pending."""

    async def nothing(self: Volume) -> None:
        pass

    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        lower, _ = stack(catalogue)
        handle = await opened(catalogue)
        await put(handle, 7, 9, 77)
        await handle.trim(16 * BLOCK, BLOCK)
        with monkeypatch.context() as patch:
            patch.setattr(Volume, "record", nothing)
            await catalogue.delete_snapshot("v", "s")
        assert held(store, lower) == set(range(20)) - HIDDEN
        await handle.flush()
        await catalogue._freeing.free(catalogue._manifests.get("v").id)
        assert held(store, lower) == set(range(20)) - HIDDEN - {7, 8, 16}
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def test_nothing_is_given_back_when_a_sync_has_failed() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        lower, head = stack(catalogue)
        await catalogue.delete_snapshot("v", "s")
        handle = await opened(catalogue)
        before = held(store, lower)
        await put(handle, 7, 9, 77)

        def fail(kind: str, layer: str, detail: Any) -> None:
            if kind == "log_sync" and layer == head:
                raise OSError(errno.EIO, "Input/output error")

        store.hook = fail
        with pytest.raises(OSError, match="a sync failed"):
            await handle.flush()
        store.hook = lambda *_: None
        await catalogue._freeing.free(catalogue._manifests.get("v").id)
        await catalogue.close_export(handle)
        assert held(store, lower) == before
        await catalogue.close()

    asyncio.run(scenario())


class Gate:
    """Holds up a pass at its first punch, in its thread, until ``go``; one hole a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.calls = 0
        monkeypatch.setattr(hidden, "punch_for_a_while", self.punch)

    def punch(self, data: DataFile, holes: list[tuple[int, int]], disturbs: object) -> int:
        self.calls += 1
        self.entered.set()
        assert self.go.wait(30)
        first, last = holes[0]
        data.punch(first * BLOCK, (last - first) * BLOCK)
        return 1


def test_a_snapshot_ends_a_pass_and_waits_for_the_punch_in_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or what a merge then copies into the layer could be punched out of it."""

    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        handle = await opened(catalogue)
        gate = Gate(monkeypatch)
        deleting = asyncio.ensure_future(catalogue.delete_snapshot("v", "s"))
        await until(gate.entered.is_set)
        expected = await read_all(handle)
        taking = asyncio.ensure_future(catalogue.create_snapshots([("v", "t")]))
        await asyncio.sleep(0.05)
        assert not taking.done()
        gate.go.set()
        await taking
        await deleting
        assert gate.calls == 1, "the other holes were left to the merge"
        await until(lambda: not catalogue._merging._tasks and len(stack(catalogue)) == 2)
        await handle.trim(0, BLOCKS * BLOCK)
        await handle.flush()
        found = await read_everything(catalogue)
        assert found == {"v": bytes(BLOCKS * BLOCK), "v@t": expected}
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def test_a_rollback_ends_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        await catalogue.create_snapshots([("v", "t")])
        handle = await opened(catalogue)
        await put(handle, 0, 8, 100)
        await catalogue.close_export(handle)
        expected = await read_everything(catalogue)
        lower = stack(catalogue)[1]
        gate = Gate(monkeypatch)
        deleting = asyncio.ensure_future(catalogue.delete_snapshot("v", "t"))
        await until(gate.entered.is_set)
        rolling = asyncio.ensure_future(catalogue.rollback("v", "s"))
        await asyncio.sleep(0.05)
        gate.go.set()
        await rolling
        await deleting
        found = await read_everything(catalogue)
        assert found == {"v": expected["v@s"], "v@s": expected["v@s"]}
        await catalogue.close()
        assert lower not in await store.list_layers()

    asyncio.run(scenario())


def test_a_volume_is_deleted_in_the_middle_of_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        gate = Gate(monkeypatch)
        deleting = asyncio.ensure_future(catalogue.delete_snapshot("v", "s"))
        await until(gate.entered.is_set)
        removing = asyncio.ensure_future(catalogue.delete_volume("v"))
        await asyncio.sleep(0.05)
        gate.go.set()
        await removing
        await deleting
        await catalogue.close()
        assert await store.list_layers() == []

    asyncio.run(scenario())


def test_reads_that_began_before_are_waited_for() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await two_layers(store)
        await catalogue.delete_snapshot("v", "s")
        handle = await opened(catalogue)
        expected = await read_all(handle)
        lower, _ = stack(catalogue)
        entered, go = threading.Event(), threading.Event()

        def wait(layer: str) -> None:
            entered.set()
            assert go.wait(30)

        store.on_read, store.cold = wait, True
        reading = asyncio.ensure_future(read_all(handle))
        await until(entered.is_set)
        store.cold = False
        await put(handle, 0, 20, 100)
        await handle.flush()
        before = held(store, lower)
        freeing = asyncio.ensure_future(catalogue._freeing.free(handle_id(catalogue)))
        await asyncio.sleep(0.05)
        assert held(store, lower) == before
        go.set()
        found = await reading
        written = await read_all(handle)
        for block in range(0, BLOCKS * BLOCK, BLOCK):
            part = slice(block, block + BLOCK)
            assert found[part] in (expected[part], written[part]), block // BLOCK
        assert found != written
        await freeing
        assert not held(store, lower)
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def handle_id(catalogue: Catalogue) -> str:
    return catalogue._manifests.get("v").id


class SlowBorrower:
    """A client that has not received what it was lent."""

    received = False

    def mark(self) -> int:
        return 1

    def has_passed(self, mark: int) -> bool:
        return self.received


def test_what_was_lent_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(lending, "GRACE", 0.01)
        monkeypatch.setattr(lending, "RECALL", 0.1)
        store = FaultyStore()
        catalogue = await two_layers(store)
        await catalogue.delete_snapshot("v", "s")
        handle = await opened(catalogue)
        lower, _ = stack(catalogue)
        borrower = SlowBorrower()
        handle.borrowers.add(borrower)
        handle.view._lent = True
        await put(handle, 0, 20, 100)
        await handle.flush()
        before = held(store, lower)
        await catalogue._freeing.free(handle_id(catalogue))
        assert held(store, lower) == before
        assert "does not take its replies" in caplog.text
        borrower.received = True
        await catalogue._freeing.free(handle_id(catalogue))
        assert not held(store, lower)
        # Closing waits for no client.
        await put(handle, 0, 20, 100)
        await handle.flush()
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["kill", "cut", "mixed"])
def test_a_crash_at_every_step(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of deleting two snapshots, with writes and TRIMs that are flushed in between."""
    monkeypatch.setattr(merge, "_CHUNK_BLOCKS", 3)

    async def work(store: FaultyStore, states: list[bytes]) -> None:
        catalogue = await Catalogue.open(store)
        try:
            handle = await opened(catalogue)
            for name, fill in (("t", 100), ("s", 150)):
                await catalogue.delete_snapshot("v", name)
                next_state = b"".join(bytes([fill + block]) * BLOCK for block in range(4))
                next_state += states[-1][4 * BLOCK : 6 * BLOCK] + bytes(3 * BLOCK)
                states.append(next_state + states[-1][9 * BLOCK :])
                await put(handle, 0, 4, fill)
                await handle.trim(6 * BLOCK, 3 * BLOCK)
                assert await read_all(handle) == states[-1]
                await handle.flush()
                del states[0]
                await catalogue._freeing.free(handle_id(catalogue))
            await catalogue.close_export(handle)
            await catalogue.close()
        finally:
            catalogue._views.threads.close()

    async def build(store: FaultyStore) -> dict[str, bytes]:
        catalogue = await two_layers(store)
        handle = await opened(catalogue)
        await catalogue.create_snapshots([("v", "t")])
        await put(handle, 8, 12, 80)
        await handle.trim(0, 3 * BLOCK)
        await catalogue.close_export(handle)
        expected = await read_everything(catalogue)
        await catalogue.close()
        return expected

    async def check(store: FaultyStore, states: list[bytes]) -> None:
        catalogue = await Catalogue.open(store)
        found = await read_everything(catalogue)
        for block in range(0, BLOCKS * BLOCK, BLOCK):
            allowed = {state[block : block + BLOCK] for state in states}
            assert found["v"][block : block + BLOCK] in allowed
        for name in ("v@s", "v@t"):
            assert found.get(name, expected[name]) == expected[name]
        for name in ("s", "t"):
            if f"v@{name}" in found:
                await catalogue.delete_snapshot("v", name)
        await catalogue._merging.merge_now()
        assert await read_everything(catalogue) == {"v": found["v"]}
        await catalogue._freeing.free(handle_id(catalogue))
        view = (await opened(catalogue)).view
        lower, _ = stack(catalogue)
        owners = {view.owners.raw[block] for block in held(store, lower)}
        assert owners <= {view.slot_of(lower)}, "hidden, and still there"
        await catalogue.close()

    built = FaultyStore()
    expected = asyncio.run(build(built))
    steps = 0
    while True:
        store = built.after_crash("kill")
        count = 0

        def crash(kind: str, layer: str, detail: Any, last: int = steps) -> None:
            nonlocal count
            count += 1
            if count > last:
                raise Crash

        store.hook = crash
        states = [expected["v"]]
        error = abandon(lambda store=store, states=states: work(store, states))  # type: ignore[misc]
        finished = count <= steps
        assert finished == (error is None), error
        # What was not flushed is there or not, block by block.
        asyncio.run(check(store.after_crash(how, steps), states))
        if finished:
            break
        steps += 3 if steps > 10 else 1
    assert steps > 40
