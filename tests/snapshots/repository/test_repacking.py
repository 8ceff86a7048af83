"""Repacking: sparse segments go, and no reader or pusher in the middle notices."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from backends.errors import CorruptError, UnavailableError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store, packing
from snapshots.repository.layout import intent_key, new_push_id, tombstone_key
from snapshots.repository.records import Config, Intent
from tests.snapshots.repository.model import FaultyStore, ModelVolume
from tests.snapshots.repository.test_collecting import all_restore, keys
from tests.snapshots.repository.test_repository import CHUNK, PAGE, restored


@pytest.fixture(autouse=True)
def larger_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SEGMENT_TARGET", 1 << 20)


@pytest.fixture
def volume() -> ModelVolume:
    """One snapshot of 120 chunks; three more, in which all but every 15th is overwritten."""
    volume = ModelVolume("disk", PAGE + CHUNK)
    rng = random.Random(1)
    volume.data[: 120 * CHUNK] = rng.randbytes(120 * CHUNK)
    volume.snapshot("s0")
    for chunk in range(120):
        if chunk % 15:
            volume.data[chunk * CHUNK : (chunk + 1) * CHUNK] = rng.randbytes(CHUNK)
    for number in range(1, 4):
        volume.data[number * CHUNK : (number + 1) * CHUNK] = rng.randbytes(CHUNK)
        volume.snapshot(f"s{number}")
    return volume


def sparse(volume: ModelVolume, store: FaultyStore | None = None) -> tuple[Repository, str]:
    """A repository with s1 to s3, and the push of s0, of whose segment little is needed."""
    repository = init_in_store(store or FaultyStore(), CHUNK)
    for source in volume.taken:
        repository.push(source)
    return repository, repository.delete("disk", "s0").push


def test_what_is_left_of_a_sparse_segment_is_copied(volume: ModelVolume) -> None:
    repository, old = sparse(volume)
    stored = sum(size for _, size in repository.store.list("segments/"))
    report = repository.collect()
    assert report.repacked == 1
    assert report.to_be_freed > 110 * CHUNK
    assert 8 * CHUNK < report.written < 0.5 * report.to_be_freed
    assert keys(repository, f"segments/{old}/")
    assert len(keys(repository, "roots/")) == 3
    report = repository.collect()
    assert report.freed >= 110 * CHUNK
    assert report.repacked == 0
    assert not keys(repository, f"segments/{old}/")
    left = sum(size for _, size in repository.store.list("segments/"))
    assert stored - left > 100 * CHUNK
    all_restore(repository, volume, {"s1", "s2", "s3"})
    before = keys(repository)
    assert repository.collect().objects == 0
    assert keys(repository) == before
    # The next push takes the newest root for its parent's, and the roots go with their snapshots.
    volume.data[0] ^= 1
    assert repository.push(volume.snapshot("s4")).parent == "s3"
    for name in ("s1", "s3", "s2"):
        repository.delete("disk", name)
        repository.collect()
    all_restore(repository, volume, {"s4"})
    assert not keys(repository, "roots/")
    repository.delete("disk", "s4")
    for _ in range(2):
        repository.collect()
    assert {key.split("/")[0] for key in keys(repository)} == {"config", "tombstones"}


def test_it_is_not_done_for_little(volume: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    for source in volume.taken[:2]:
        repository.push(source)
    repository.delete("disk", "s1")
    before = keys(repository, "segments/")
    assert repository.collect().repacked == 0
    assert keys(repository, "segments/") < before
    all_restore(repository, volume, {"s0"})


def test_a_push_under_way_whose_parent_was_repacked_lets_others_collect(
    volume: ModelVolume,
) -> None:
    """The pages of the parent's old root are gone, for a good reason."""
    repository, _ = sparse(volume)
    assert repository.collect().repacked == 1
    repository.collect()
    parent = repository.find("disk", "s2").push
    intent = Intent(new_push_id(), (parent,), "disk", "s9", "id", time.time())
    repository.store.put(intent_key(intent.push), intent.encode())
    assert repository.collect().under_way == 1
    repository.delete("disk", "s3")
    repository.delete("disk", "s2")
    assert repository.collect().freed > 0
    all_restore(repository, volume, {"s1"})
    # What the push has pinned is all there, though it is deleted.
    repository.store.delete(tombstone_key(parent))
    all_restore(repository, volume, {"s1", "s2"})


def test_a_repository_of_an_older_program_is_not_repacked(volume: ModelVolume) -> None:
    repository, _ = sparse(volume)
    config = repository.config
    plain = Config(config.repository_id, CHUNK, True, config.created, ())
    assert Config.decode(plain.encode(), "config") == plain
    assert Repository(repository.store, plain).collect().repacked == 0
    assert not keys(repository, "roots/")
    all_restore(repository, volume, {"s1", "s2", "s3"})


class Interrupting(FaultyStore):
    """Runs something at a request for part of an object, once."""

    hook: Callable[[], object] | None = None
    at = 0

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        if self.hook is not None:
            if self.at == 0:
                hook, self.hook = self.hook, None
                hook()
            self.at -= 1
        return super().get_range(key, offset, length)


@pytest.mark.parametrize("at", range(6))
def test_a_reader_in_the_middle(volume: ModelVolume, at: int) -> None:
    store = Interrupting()
    repository, old = sparse(volume, store)
    source = volume.taken[2]

    def collect_all() -> None:
        repository.collect()
        repository.collect()
        assert not keys(repository, f"segments/{old}/")

    store.at, store.hook = at, collect_all
    assert restored(repository, source) == source.content
    assert store.hook is None


@pytest.mark.parametrize("at", range(3))
def test_a_push_in_the_middle_pins_the_old_root(volume: ModelVolume, at: int) -> None:
    store = Interrupting()
    repository, old = sparse(volume, store)
    for chunk in range(0, 120, 2):
        volume.data[chunk * CHUNK] ^= 1
    source = volume.snapshot("s4")
    seen = []

    def collect_all(offset: int) -> None:
        if not seen and offset >= at * 16 * CHUNK:
            seen.append(offset)
            repository.collect()
            repository.collect()
            assert keys(repository, f"segments/{old}/")

    source.on_read = collect_all
    assert repository.push(source).parent == "s3"
    assert seen
    all_restore(repository, volume, {"s1", "s2", "s3", "s4"})
    for _ in range(3):
        repository.collect()
    all_restore(repository, volume, {"s1", "s2", "s3", "s4"})


def test_a_damaged_chunk_stays_where_it_is(volume: ModelVolume) -> None:
    repository, old = sparse(volume)
    key = next(iter(keys(repository, f"segments/{old}/")))
    data = bytearray(repository.store.get(key, 1 << 22))
    data[32 + 15 * CHUNK + 5] ^= 1
    repository.store.put(key, data)
    for _ in range(3):
        repository.collect()
    assert keys(repository, key)
    assert [damage.key for damage in repository.verify(deep=True).damaged] == [key]
    with pytest.raises(CorruptError, match=key):
        restored(repository, volume.taken[1])


def test_killed_at_any_put(volume: ModelVolume) -> None:
    repository, _ = sparse(volume)
    store = repository.store
    assert isinstance(store, FaultyStore)
    store.puts = 0
    repository.collect()
    puts = store.puts
    assert puts >= 7  # the plan, intent, segment, pages, three roots, outcome
    for put in range(1, puts + 1):
        store = FaultyStore()
        repository, old = sparse(volume, store)
        store.puts, store.fail_at, store.takes_effect = 0, put, bool(put % 2)
        with suppress(UnavailableError):
            repository.collect()
        store.fail_at = None
        assert restored(repository, volume.taken[1]) == volume.taken[1].content
        for _ in range(4):
            repository.collect(give_up_after=0)
        assert not keys(repository, f"segments/{old}/")
        assert not keys(repository, "intents/")
        assert restored(repository, volume.taken[3]) == volume.taken[3].content
