"""Object Lock: whatever is pushed when, all of a snapshot is retained for as long as promised."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.directory_objects import DirectoryObjectStore
from backends.errors import CorruptError, InvalidError, NotFoundError
from backends.locking import Retention
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import ObjectLock, Repository, init_in_store, open_in_store
from snapshots.repository.layout import outcome_key, pages_key, segment_key
from snapshots.repository.reading import read_page
from snapshots.repository.records import Config
from snapshots.repository.repository import check_object_lock
from snapshots.repository.roots import find_root
from snapshots.repository.secret import key_file
from tests.snapshots.repository.model import ModelVolume

DAY = 86400
KIB = 1024
MONTH = ObjectLock("COMPLIANCE", 30 * DAY)


class LockedObjects(MemoryObjectStore):
    """A bucket with Object Lock: knows until when the version of each key is retained."""

    def __init__(self) -> None:
        super().__init__()
        self.retained: dict[str, float] = {}
        self.extended: Counter[str] = Counter()
        self.retention: Retention | None = None
        self.on_extend: Callable[[str], None] = lambda key: None

    def put(self, key: str, data: bytes | bytearray) -> None:
        super().put(key, data)
        self._retain(key)

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        done = super().put_if_absent(key, data)
        if done:
            self._retain(key)
        return done

    def _retain(self, key: str) -> None:
        if self.retention is not None:
            self.retained[key] = time.time() + self.retention.seconds

    def require_lock(self) -> None:
        pass

    def hold(self, retention: Retention) -> None:
        self.retention = retention

    def extend(self, key: str, until: float) -> None:
        self.on_extend(key)
        self._find(key)
        self.extended[key] += 1
        self.retained[key] = max(self.retained[key], until)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What ``time.time`` says."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def needed_by(repository: Repository, push: str) -> set[str]:
    """The keys without which a snapshot cannot be restored."""
    store, config = repository.store, repository.config
    keys = {"config", outcome_key(push), *(key for key, _ in store.list("keys/"))}
    for ref in find_root(store, config, push).table:
        keys.add(pages_key(ref.push, ref.number))
        page = read_page(store, config.chunk_size, ref)
        keys |= {segment_key(entry.push, entry.segment) for entry in page if entry}
    return keys


def change(volume: ModelVolume, rng: random.Random) -> None:
    for _ in range(rng.randrange(4)):
        place = rng.randrange(len(volume.data) // (4 * KIB)) * 4 * KIB
        volume.data[place : place + 4 * KIB] = rng.randbytes(4 * KIB)


@pytest.mark.parametrize("seed", range(2))
def test_every_snapshot_is_retained_as_long_as_promised(clock: list[float], seed: int) -> None:
    """Pushes at odd times, slow ones, deletions and collections in between."""
    rng = random.Random(seed)
    lock = ObjectLock("COMPLIANCE", rng.choice([1, 3, 30]) * DAY)
    objects = LockedObjects()
    repository = init_in_store(objects, 4 * KIB, object_lock=lock)
    volume = ModelVolume("disk", 256 * KIB)
    put = objects.put
    slowness = 0.0

    def slow_put(key: str, data: bytes | bytearray) -> None:
        clock[0] += slowness * rng.random()
        put(key, data)

    objects.put = slow_put  # type: ignore[method-assign]
    for number in range(25):
        clock[0] += rng.choice([0.001, 0.04, 0.3, 1.1]) * lock.seconds * rng.random()
        slowness = rng.choice([0, 0, 0.3]) * lock.seconds
        change(volume, rng)
        report = repository.push(volume.snapshot(f"s{number}"))
        for key in needed_by(repository, report.push):
            assert objects.retained[key] >= clock[0] + lock.seconds, key
        slowness = 0
        if number % 5 == 4:
            repository.delete("disk", f"s{number - rng.randrange(1, 4)}")
            repository.collect()


def test_daily_pushes_extend_rarely(clock: list[float]) -> None:
    objects = LockedObjects()
    repository = init_in_store(objects, 4 * KIB, object_lock=MONTH)
    volume = ModelVolume("disk", 256 * KIB)
    rng = random.Random(1)
    volume.data[:] = rng.randbytes(len(volume.data))
    first = ""
    for day in range(50):
        change(volume, rng)
        report = repository.push(volume.snapshot(f"d{day}"))
        first = first or report.push
        clock[0] += DAY
    assert 2 <= objects.extended[segment_key(first, 0)] <= 3  # every 15 days
    assert objects.extended["config"] == 50


def test_what_is_extended_after_a_pause_is_the_whole_snapshot(clock: list[float]) -> None:
    objects = LockedObjects()
    repository = init_in_store(objects, 4 * KIB, object_lock=MONTH)
    volume = ModelVolume("disk", 256 * KIB)
    volume.data[:] = random.Random(1).randbytes(len(volume.data))
    repository.push(volume.snapshot("one"))
    clock[0] += 365 * DAY
    again = repository.push(volume.taken[0])  # acknowledged anew
    assert again.already_there
    for key in needed_by(repository, again.push):
        assert objects.retained[key] >= clock[0] + MONTH.seconds
    unchanged = repository.push(volume.snapshot("two"))
    assert unchanged.changed == 0
    for key in needed_by(repository, unchanged.push):
        assert objects.retained[key] >= clock[0] + MONTH.seconds


def test_who_slept_after_the_commit_extends_again(clock: list[float]) -> None:
    objects = LockedObjects()
    repository = init_in_store(objects, 4 * KIB, object_lock=MONTH)
    volume = ModelVolume("disk", 256 * KIB)
    volume.data[:] = random.Random(1).randbytes(len(volume.data))
    put = objects.put

    def sleepy(key: str, data: bytes | bytearray) -> None:
        put(key, data)
        if key.startswith("snapshots/"):
            clock[0] += 100 * DAY

    objects.put = sleepy  # type: ignore[method-assign]
    report = repository.push(volume.snapshot("one"))
    for key in needed_by(repository, report.push):
        assert objects.retained[key] >= clock[0] + MONTH.seconds


def test_a_parent_of_which_something_is_gone_is_done_without(clock: list[float]) -> None:
    objects = LockedObjects()
    repository = init_in_store(objects, 4 * KIB, object_lock=MONTH)
    volume = ModelVolume("disk", 256 * KIB)
    volume.data[:] = random.Random(1).randbytes(len(volume.data))
    first = repository.push(volume.snapshot("one"))
    clock[0] += 20 * DAY
    objects.delete(segment_key(first.push, 0))
    volume.data[:4] = b"news"
    second = repository.push(volume.snapshot("two"))
    assert second.parent is None
    assert "could not serve as the parent" in second.warnings[0]
    for key in needed_by(repository, second.push):
        assert objects.retained[key] >= clock[0] + MONTH.seconds


def test_a_push_whose_objects_cannot_be_extended_fails(clock: list[float]) -> None:
    objects = LockedObjects()
    repository = init_in_store(objects, 4 * KIB, object_lock=MONTH)
    volume = ModelVolume("disk", 256 * KIB)
    volume.data[:] = random.Random(1).randbytes(len(volume.data))

    def refuse(key: str) -> None:
        raise NotFoundError(f"forced: {key} was deleted")

    objects.on_extend = refuse
    with pytest.raises(NotFoundError, match="forced"):
        repository.push(volume.snapshot("one"))
    assert repository.list() == []
    objects.on_extend = lambda key: None
    assert not repository.push(volume.taken[0]).already_there


def test_a_repository_that_is_opened_again_is_still_locked(clock: list[float]) -> None:
    """Encrypted, too: its keys are needed by every snapshot."""
    objects = LockedObjects()
    secret = key_file(b"ab" * 32, "a key file")
    init_in_store(objects, 4 * KIB, secret, ObjectLock("GOVERNANCE", DAY))
    objects.retention = None
    repository = open_in_store(objects, secret)
    assert objects.retention == Retention("GOVERNANCE", 1.5 * DAY)
    assert repository.config.object_lock == ObjectLock("GOVERNANCE", DAY)
    clock[0] += 10 * DAY
    volume = ModelVolume("disk", 256 * KIB)
    volume.data[:] = random.Random(1).randbytes(len(volume.data))
    report = repository.push(volume.snapshot("one"))
    needed = needed_by(repository, report.push)
    assert any(key.startswith("keys/") for key in needed)
    for key in needed:
        assert objects.retained[key] >= clock[0] + DAY


def test_a_copy_elsewhere_is_read_and_not_pushed_to(tmp_path: Path) -> None:
    objects = LockedObjects()
    repository = init_in_store(objects, 4 * KIB, object_lock=MONTH)
    volume = ModelVolume("disk", 256 * KIB)
    volume.data[:5] = b"12345"
    repository.push(volume.snapshot("one"))
    copy = DirectoryObjectStore(tmp_path / "copy", create=True)
    for key, size in objects.list(""):
        copy.put(key, objects.get(key, size))
    copied = open_in_store(copy)
    assert copied.verify(deep=True).damaged == []
    with pytest.raises(InvalidError, match=r"no Object Lock"):
        copied.push(volume.snapshot("two"))
    assert [item.snapshot for item in copied.list()] == ["one"]
    with pytest.raises(InvalidError, match=r"no Object Lock"):
        init_in_store(DirectoryObjectStore(tmp_path / "new", create=True), object_lock=MONTH)


def test_locks_that_are_none() -> None:
    for wrong in (("NONE", DAY), ("COMPLIANCE", DAY - 1), ("COMPLIANCE", 24001 * DAY)):
        with pytest.raises(InvalidError):
            check_object_lock(ObjectLock(*wrong))
    for fields in ({"mode": "NONE"}, {"seconds": 5}, {"seconds": 1 << 60}):
        lock: Any = ObjectLock("COMPLIANCE", DAY)._replace(**fields)
        config = Config("00" * 16, 4 * KIB, True, 1.0, ("object-lock",), object_lock=lock)
        with pytest.raises(CorruptError):
            Config.decode(config.encode(), "here")
