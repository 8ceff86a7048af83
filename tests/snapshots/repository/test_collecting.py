"""Collection: what is dead goes, what is needed stays, and doubt keeps everything."""

from __future__ import annotations

import random

import pytest

from backends.errors import CorruptError, NotFoundError, StorageError, UnavailableError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, collecting, init_in_store, repacking
from snapshots.repository.layout import new_push_id
from snapshots.repository.records import Intent, Outcome, Plan
from tests.snapshots.repository.model import FaultyStore, ModelVolume
from tests.snapshots.repository.test_repository import CHUNK, PAGE, restored, stored_bytes


def keys(repository: Repository, prefix: str = "") -> set[str]:
    return {key for key, _ in repository.store.list(prefix)}


@pytest.fixture(autouse=True)
def hardly_any_repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves is the next collection's, which is not the matter here."""
    for module in (collecting, repacking):
        monkeypatch.setattr(module, "SPARSE", 0.25)


@pytest.fixture
def volume() -> ModelVolume:
    """Eight snapshots; each overwrites some of the one before."""
    volume = ModelVolume("disk", PAGE + CHUNK)
    rng = random.Random(1)
    volume.data[: 20 * CHUNK] = rng.randbytes(20 * CHUNK)
    for number in range(8):
        volume.data[number * CHUNK : (number + 2) * CHUNK] = rng.randbytes(2 * CHUNK)
        volume.snapshot(f"s{number}")
    return volume


def all_restore(repository: Repository, volume: ModelVolume, names: set[str]) -> None:
    assert {item.snapshot for item in repository.list()} == names
    for source in volume.taken:
        if source.snapshot in names:
            assert restored(repository, source) == source.content
    assert repository.verify(deep=True).damaged == []


def test_what_only_deleted_snapshots_need_is_freed(volume: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    for source in volume.taken:
        repository.push(source)
    names = {source.snapshot for source in volume.taken}
    before = stored_bytes(repository)
    assert repository.collect().live == 8
    assert 0 < before - stored_bytes(repository) < 10_000  # the intents
    for name in ("s3", "s0", "s7", "s5", "s4"):
        repository.delete("disk", name)
        names.remove(name)
        all_restore(repository, volume, names)
        before = stored_bytes(repository)
        dry = repository.collect(dry_run=True)
        assert stored_bytes(repository) == before
        report = repository.collect()
        assert (dry.objects, dry.freed) == (report.objects, report.freed)
        assert before - stored_bytes(repository) == report.freed > 0
        assert repository.collect().objects == 0
        all_restore(repository, volume, names)
    for name in sorted(names):
        repository.delete("disk", name)
    repository.collect()
    assert all(key == "config" or key.startswith("tombstones/") for key in keys(repository))
    assert repository.push(volume.taken[-1]).parent is None
    all_restore(repository, volume, {"s7"})


def test_the_snapshot_left_has_what_a_single_push_would_have(volume: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    for source in volume.taken:
        repository.push(source)
    for source in volume.taken[:-1]:
        repository.delete("disk", source.snapshot)
    repository.collect()
    data = {key for key in keys(repository) if key.startswith(("segments/", "pages/"))}
    assert {key.split("/")[1] for key in data} <= {
        key.split("/")[1] for key in data if key.startswith("segments/")
    }
    all_restore(repository, volume, {"s7"})


def test_a_push_under_way_keeps_what_it_pins_until_it_is_given_up(volume: ModelVolume) -> None:
    store = FaultyStore()
    repository = init_in_store(store, CHUNK)
    repository.push(volume.taken[0])
    store.puts, store.fail_at = 0, 3
    with pytest.raises(UnavailableError):
        repository.push(volume.taken[1])
    store.fail_at = None
    parent = repository.delete("disk", "s0").push
    report = repository.collect()
    assert (report.live, report.under_way, report.given_up) == (0, 1, 0)
    assert keys(repository, f"segments/{parent}/") and keys(repository, f"outcomes/{parent}")
    report = repository.collect(give_up_after=0)
    assert (report.live, report.under_way, report.given_up) == (0, 0, 1)
    assert not keys(repository, "segments/") | keys(repository, "pages/")
    assert not keys(repository, "intents/")
    assert len(keys(repository, "outcomes/")) == 1  # ABORTED: it stays for ever


def test_what_a_zombie_writes_is_found_again(volume: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    aborted, deleted = new_push_id(), repository.push(volume.taken[0]).push
    repository.store.put(f"outcomes/{aborted}", Outcome(aborted, None, "late").encode())
    outcome = repository.store.get(f"outcomes/{deleted}", 1 << 20)
    pointer = next(iter(keys(repository, "snapshots/")))
    repository.delete("disk", "s0")
    repository.collect()
    for push in (aborted, deleted):
        repository.store.put(f"segments/{push}/00000005", b"late")
        repository.store.put(f"pages/{push}/00000000", b"late")
        repository.store.put(f"intents/{push}", b"late")
    repository.store.put(f"outcomes/{deleted}", outcome)
    repository.store.put(pointer, b"late")
    assert repository.list() == []
    assert repository.collect().objects == 8
    assert keys(repository) == {"config", f"outcomes/{aborted}", f"tombstones/{deleted}"}


def test_nothing_of_others_is_touched(volume: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    for source in volume.taken[:2]:
        repository.push(source)
    push = repository.delete("disk", "s0").push
    strangers = {
        "readme", "segments/readme", f"segments/{push}/readme", f"segments/{'ab' * 16}/00000000",
        f"pages/{push}/000000000", f"snapshots/{push}", f"intents/{push}.old", "plans/readme",
        f"segments/{push}/00000000/more",
    }  # fmt: skip
    for key in strangers:
        repository.store.put(key, b"not ours")
    repository.collect()
    assert strangers <= keys(repository)
    all_restore(repository, volume, {"s1"})


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (kind, how)
        for kind in ("outcomes", "pages", "intents")
        for how in ("flipped", "cut short", "gone")
        if how != "gone" or kind == "pages"  # else there is no live snapshot, or no push under way
    ],
)
def test_doubt_keeps_everything(volume: ModelVolume, kind: str, how: str) -> None:
    store = FaultyStore()
    repository = init_in_store(store, CHUNK)
    for source in volume.taken[:3]:
        repository.push(source)
    store.puts, store.fail_at = 0, 3
    with pytest.raises(UnavailableError):
        repository.push(volume.taken[3])
    store.fail_at = None
    ended = {key.replace("outcomes", "intents") for key in keys(repository, "outcomes/")}
    pending = keys(repository, "intents/") - ended
    live = repository.find("disk", "s2").push
    repository.delete("disk", "s0")
    key = pending.pop() if kind == "intents" else next(
        key for key in sorted(keys(repository)) if key.startswith(f"{kind}/{live}")
    )  # fmt: skip
    record = bytearray(repository.store.get(key, 1 << 20))
    if how == "gone":
        repository.store.delete(key)
    else:
        record[-1] ^= 1
        repository.store.put(key, record if how == "flipped" else record[:-1])
    before = keys(repository)
    for dry_run in (True, False):
        with pytest.raises(CorruptError, match=rf"nothing was collected.*{key}"):
            repository.collect(dry_run=dry_run)
    assert keys(repository) == before
    if kind == "intents":
        assert repository.collect(give_up_after=0).given_up == 1
    else:
        repository.delete("disk", "s2")
        with pytest.raises(CorruptError):  # the push under way pins it
            repository.collect()
        assert repository.collect(give_up_after=0).freed > 0
    all_restore(repository, volume, {"s1", "s2"} if kind == "intents" else {"s1"})


def test_a_killed_collector_is_finished_by_the_next(volume: ModelVolume) -> None:
    class Stopping(FaultyStore):
        left = 1 << 30

        def delete(self, key: str) -> None:
            if self.left <= 0:
                raise self.error
            self.left -= 1
            super().delete(key)

    for left in (0, 5, 17):
        store = Stopping()
        repository = init_in_store(store, CHUNK)
        for source in volume.taken:
            repository.push(source)
        for name in ("s2", "s3", "s6"):
            repository.delete("disk", name)
        store.left = left
        try:
            repository.collect()
        except StorageError:
            assert len(keys(repository, "plans/")) == 1
        store.left = 1 << 30
        # Whatever happened since: the old plan is carried out, and harms nothing.
        repository.push(volume.taken[3])
        report = repository.collect()
        assert report.finished_plans <= 1
        assert not keys(repository, "plans/")
        assert repository.collect().objects == 0
        all_restore(repository, volume, {f"s{n}" for n in (0, 1, 3, 4, 5, 7)})


def test_a_damaged_plan_is_dropped_and_a_hostile_one_not_followed(volume: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(volume.taken[0])
    repository.store.put(f"plans/{new_push_id()}", b"damaged")
    for key in ("config", "tombstones/" + "0" * 32, "../config", ""):
        plan = Plan(new_push_id(), (key,))
        repository.store.put(f"plans/{plan.plan}", plan.encode())
    assert repository.collect().finished_plans == 5
    assert not keys(repository, "plans/")
    all_restore(repository, volume, {"s0"})


def test_an_intent_remembers_what_it_pins() -> None:
    ids = [new_push_id() for _ in range(5)]
    intent = Intent(ids[0], tuple(ids[1:3]), "disk", "s", "id", 1.0, tuple(ids[3:]))
    assert Intent.decode(intent.encode(), "here") == intent
    assert intent.pins == tuple(ids[1:])


def test_a_store_that_is_gone_frees_nothing(volume: ModelVolume) -> None:
    class Unmounted(FaultyStore):
        def delete(self, key: str) -> None:
            raise NotFoundError("forced: is the disk mounted?")

    store = Unmounted()
    repository = init_in_store(store, CHUNK)
    push = repository.push(volume.taken[0]).push
    store.inner.put(f"tombstones/{push}", b"")
    with pytest.raises(NotFoundError, match="mounted"):
        repository.collect()
    assert len(keys(repository, "plans/")) == 1
