"""Faults forced at every PUT, races, and interruption: nothing half-made is ever seen."""

from __future__ import annotations

import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.errors import (
    ExistsError,
    InUseError,
    InvalidError,
    NoSpaceError,
    StorageError,
    UnavailableError,
)
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store, packing
from snapshots.repository.records import Outcome, Tombstone
from tests.snapshots.repository.model import FaultyStore, ModelSink, ModelSource, ModelVolume
from tests.snapshots.repository.test_repository import CHUNK, PAGE, restored


def prepare(store: FaultyStore) -> tuple[Repository, ModelVolume, ModelSource]:
    """A repository with one snapshot, and a second one to push: several objects of each kind."""
    repository = init_in_store(store, CHUNK)
    volume = ModelVolume("disk", 2 * PAGE)
    volume.data[: 10 * CHUNK] = random.Random(1).randbytes(10 * CHUNK)
    repository.push(volume.snapshot("one"))
    volume.data[5 * CHUNK : 14 * CHUNK] = random.Random(2).randbytes(9 * CHUNK)
    volume.data[PAGE : PAGE + CHUNK] = random.Random(3).randbytes(CHUNK)
    return repository, volume, volume.snapshot("two")


def puts_of_a_push() -> int:
    store = FaultyStore()
    repository, _, source = prepare(store)
    before = store.puts
    repository.push(source)
    return store.puts - before


@pytest.mark.parametrize("takes_effect", [False, True])
@pytest.mark.parametrize("error", [UnavailableError("gone"), NoSpaceError("full")])
def test_an_error_at_any_put(takes_effect: bool, error: StorageError) -> None:
    puts = puts_of_a_push()
    assert puts >= 7  # the intent, segments, pages, the outcome, the pointer
    for number in range(1, puts + 1):
        store = FaultyStore()
        repository, volume, source = prepare(store)
        store.puts, store.fail_at = 0, number
        store.takes_effect, store.error = takes_effect, error
        threads = threading.active_count()
        committed = number == puts or (number == puts - 1 and takes_effect)
        if committed:
            report = repository.push(source)
            assert not report.already_there
            assert len(report.warnings) == (number == puts)
        else:
            with pytest.raises(StorageError) as caught:
                repository.push(source)
            assert str(error) in str(caught.value)
        assert threading.active_count() == threads
        store.fail_at = None
        assert [item.snapshot for item in repository.list()] == ["one", "two"][: 1 + committed]
        again = repository.push(source)
        assert again.already_there == committed
        volume.data[0] ^= 1
        third = volume.snapshot("three")
        assert repository.push(third).parent == "two"
        for snapshot in volume.taken:
            assert restored(repository, snapshot) == snapshot.content
        assert repository.verify(deep=True).damaged == []


def test_a_commit_of_which_nothing_is_known() -> None:
    store = FaultyStore()
    repository, _, source = prepare(store)
    store.puts, store.fail_at, store.takes_effect = 0, puts_of_a_push() - 1, True

    def go_away(key: str) -> None:
        store.read_back_fails = store.read_back_fails or key.startswith("outcomes/")

    store.before_put = go_away
    with pytest.raises(UnavailableError, match=r"disk@two.*not known.*push it again"):
        repository.push(source)
    store.before_put = None
    store.read_back_fails = False
    assert repository.push(source).already_there


def test_a_failed_push_is_aborted_so_that_its_parent_is_free() -> None:
    store = FaultyStore()
    repository, _, source = prepare(store)
    store.puts, store.fail_at, store.error = 0, 3, NoSpaceError("full")
    with pytest.raises(NoSpaceError):
        repository.push(source)
    intents = {key.removeprefix("intents/") for key, _ in store.list("intents/")}
    outcomes = {key.removeprefix("outcomes/") for key, _ in store.list("outcomes/")}
    assert len(intents) == 2
    assert intents == outcomes


def test_a_collector_that_gave_up_wins() -> None:
    store = FaultyStore()
    repository, _, source = prepare(store)

    def give_up(key: str) -> None:
        if key.startswith("pages/"):
            push = key.split("/")[1]
            store.inner.put_if_absent(f"outcomes/{push}", Outcome(push, None, "late").encode())

    store.before_put = give_up
    with pytest.raises(InUseError, match=r"disk@two.*push again"):
        repository.push(source)
    store.before_put = None
    assert [item.snapshot for item in repository.list()] == ["one"]
    assert not repository.push(source).already_there


def test_the_order_of_a_push() -> None:
    store = FaultyStore()
    repository, _, source = prepare(store)
    order: list[str] = []
    store.before_put = lambda key: order.append(key.split("/")[0])
    store.before_size = lambda key: order.append("look for " + key.split("/")[0])
    repository.push(source)
    assert order[:2] == ["intents", "look for tombstones"]
    assert set(order[2:-2]) == {"segments", "pages"}
    assert order[-2:] == ["outcomes", "snapshots"]


def test_the_commit_waits_for_every_acknowledgement() -> None:
    store = FaultyStore()
    repository, _, source = prepare(store)
    acknowledged = threading.Event()
    late: list[bool] = []

    def hold(key: str) -> None:
        if key.startswith("pages/") and key.endswith("0"):
            acknowledged.wait(0.3)
            acknowledged.set()
        if key.startswith("outcomes/"):
            late.append(acknowledged.is_set())

    store.before_put = hold
    repository.push(source)
    assert late == [True]


def test_a_parent_deleted_between_the_list_and_the_intent() -> None:
    store = FaultyStore()
    repository, volume, source = prepare(store)
    repository.push(source)
    volume.data[0] ^= 255
    third = volume.snapshot("three")
    two = repository.find("disk", "two")

    def delete(key: str) -> None:
        if key.startswith("intents/"):
            tombstone = Tombstone(two.push, "disk", "two", 1.0)
            store.inner.put_if_absent(f"tombstones/{two.push}", tombstone.encode())

    store.before_put = delete
    report = repository.push(third)
    assert report.parent == "one"
    assert "disk@two" in report.warnings[0]
    assert restored(repository, third) == third.content
    store.before_put = None
    # The push that named the dead parent pins nothing any more.
    intents = {key.removeprefix("intents/") for key, _ in store.list("intents/")}
    outcomes = {key.removeprefix("outcomes/") for key, _ in store.list("outcomes/")}
    assert intents == outcomes


def test_a_damaged_parent_is_done_without() -> None:
    for kind in ("pages/", "outcomes/"):
        store = FaultyStore()
        repository, _, source = prepare(store)
        for key, size in list(store.list(kind)):
            store.inner.put(key, bytes(size))
        report = repository.push(source)
        # Of a damaged page all is read again, of a damaged outcome the whole volume.
        assert report.parent == ("one" if kind == "pages/" else None)
        assert (report.repaired > 0) == (kind == "pages/")
        assert len(report.warnings) == 1
        assert restored(repository, source) == source.content


def test_the_same_snapshot_pushed_twice_at_once() -> None:
    store = FaultyStore()
    repository, _, source = prepare(store)

    def push(_: int) -> bool:
        try:
            repository.push(source)
        except InUseError:
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(push, range(3)))
    assert any(results)
    assert restored(repository, source) == source.content
    repository.delete("disk", "two")
    assert [item.snapshot for item in repository.list()] == ["one"]


def test_one_of_many_inits_wins() -> None:
    store = MemoryObjectStore()

    def make(_: int) -> str | None:
        try:
            return init_in_store(store, CHUNK).config.repository_id
        except ExistsError:
            return None

    with ThreadPoolExecutor(4) as pool:
        made = [item for item in pool.map(make, range(4)) if item]
    assert len(made) == 1
    assert [key for key, _ in store.list("")] == ["config"]


class OverwritingStore(FaultyStore):
    """A store that takes no notice of If-None-Match."""

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        self.put(key, data)
        return True


class UnconditionalStore(FaultyStore):
    """A store that refuses requests with If-None-Match."""

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        raise InvalidError("forced: not implemented")


@pytest.mark.parametrize("kind", [OverwritingStore, UnconditionalStore])
def test_a_store_without_conditional_put_is_for_a_single_writer(kind: type[FaultyStore]) -> None:
    store = kind()
    repository, volume, source = prepare(store)
    assert not repository.config.conditional_put
    assert repository.notice and "only one command" in repository.notice
    with pytest.raises(ExistsError):
        init_in_store(store, CHUNK)
    repository.push(source)
    for snapshot in volume.taken:
        assert restored(repository, snapshot) == snapshot.content
    repository.delete("disk", "one")
    assert [item.snapshot for item in repository.list()] == ["two"]


def test_interrupted() -> None:
    store = FaultyStore()
    repository, _, source = prepare(store)
    threads = threading.active_count()

    def interrupt(offset: int) -> None:
        if offset >= PAGE:
            raise KeyboardInterrupt

    source.on_read = interrupt
    with pytest.raises(KeyboardInterrupt):
        repository.push(source)
    assert threading.active_count() == threads
    assert store.stopped
    assert [item.snapshot for item in repository.list()] == ["one"]


def test_interrupted_in_progress() -> None:
    store = FaultyStore()
    repository, volume, _ = prepare(store)
    threads = threading.active_count()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for work in (
        lambda: repository.restore("disk", "one", ModelSink(2 * PAGE), interrupt),
        lambda: repository.verify(deep=True, progress=interrupt),
        lambda: repository.push(volume.taken[1], interrupt),
    ):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert threading.active_count() == threads


def test_a_source_or_sink_that_fails() -> None:
    repository, _, source = prepare(FaultyStore())

    def broken(offset: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    source.on_read = broken
    with pytest.raises(StorageError, match=r"disk@two.*Input/output error"):
        repository.push(source)

    class FullSink(ModelSink):
        def write(self, offset: int, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(NoSpaceError, match="no space left"):
        repository.restore("disk", "one", FullSink(2 * PAGE))

    class UnkeptSink(ModelSink):
        def complete(self, offset: int, length: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(StorageError, match=r"cannot keep what was written.*check the disk"):
        repository.restore("disk", "one", UnkeptSink(2 * PAGE))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing can be uploaded, reading stops."""
    monkeypatch.setattr(packing, "READ_WINDOW", 1 << 20)
    monkeypatch.setattr(packing, "UNIT", 64 << 10)
    store = FaultyStore()
    repository = init_in_store(store, CHUNK)
    volume = ModelVolume("disk", 2 * PAGE)
    volume.data[:] = random.Random(1).randbytes(2 * PAGE)
    source = volume.snapshot("one")
    go = threading.Event()
    seen: list[int] = []
    under_way = threading.Semaphore(packing.IN_FLIGHT)

    def hold(key: str) -> None:
        if key.startswith("segments/"):
            assert under_way.acquire(blocking=False), "too many uploads at a time"
            if not go.wait(0.3):
                seen.append(source.bytes_read)
            go.set()
            under_way.release()

    store.before_put = hold
    repository.push(source)
    assert seen
    segments = (packing.IN_FLIGHT + 1) * packing.SEGMENT_TARGET
    # What is in segments, what was read and not yet packed, and what workers are reading.
    assert max(seen) <= segments + (2 << 20)
    assert restored(repository, source) == source.content
