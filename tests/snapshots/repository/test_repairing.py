"""What verify found damaged is stored anew by the next push, as far as the volume has it."""

from __future__ import annotations

import os
import random

import pytest

from backends.errors import UnavailableError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store
from snapshots.repository.layout import NOTES, segment_key
from snapshots.repository.notes import read_damage
from tests.snapshots.repository.encrypted import SECRET
from tests.snapshots.repository.model import ModelVolume
from tests.snapshots.repository.test_collecting import keys
from tests.snapshots.repository.test_repository import CHUNK, PAGE, restored
from tests.snapshots.repository.test_verify import damage, fill, needs_of

ROUNDS = int(os.environ.get("NBDSERVE_VERIFY_ROUNDS", "5"))


def next_push(repository: Repository, disk: ModelVolume, name: str) -> tuple[int, list[str]]:
    """Push the newest content against the newest snapshot."""
    disk.data[:] = disk.taken[-1].content
    source = disk.snapshot(name)
    report = repository.push(source)
    assert restored(repository, source) == source.content
    # The rest of a segment may be damaged, its index for example.
    found = repository.verify("disk", name, deep=True).damaged
    assert [one for one in found if one.snapshots] == []
    return report.repaired, report.warnings


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_next_push_is_whole(seed: int) -> None:
    rng = random.Random(seed)
    repository = init_in_store(MemoryObjectStore(), CHUNK, SECRET if seed % 4 == 3 else None)
    disk = fill(repository, rng, rng.randrange(1, 7))
    fill(repository, rng, 1, "other")
    needs = needs_of(repository)
    damage(repository, rng, needs)
    if seed % 2:
        pages = sorted({key for key, _ in needs[f"disk@s{len(disk.taken) - 1}"] if "pages" in key})
        for key in pages[:1]:
            repository.store.delete(key)
    found = repository.verify(deep=True)
    harmed = {name for one in found.damaged for name in one.snapshots}
    assert found.noted == len([one for one in found.damaged if one.snapshots])
    repaired, warnings = next_push(repository, disk, "next")
    newest = disk.taken[-2].snapshot
    if f"disk@{newest}" not in harmed:
        assert (repaired, warnings) == (0, [])
    # It is whole by itself, so the one after it has nothing to repair. The others are as they were.
    assert next_push(repository, disk, "last") == (0, [])
    again = repository.verify(deep=True)
    assert {name for one in again.damaged for name in one.snapshots} == harmed
    for source in disk.taken:
        if f"disk@{source.snapshot}" not in harmed:
            assert restored(repository, source) == source.content
    # Notes go with the last snapshot that needs the object.
    for label in harmed:
        repository.delete(*label.split("@"))
    repository.collect()
    there = keys(repository, "segments/") | keys(repository, "pages/")
    assert {key.removeprefix(NOTES) for key in keys(repository, NOTES)} <= there
    # Of an object that is damaged only where nothing needs it a verify knows better.
    assert not any(one.snapshots for one in repository.verify(deep=True).damaged)
    assert keys(repository, NOTES) == set()
    assert restored(repository, disk.taken[-1]) == disk.taken[-1].content


@pytest.fixture
def disk() -> ModelVolume:
    disk = ModelVolume("disk", PAGE)
    disk.data[: 20 * CHUNK] = random.Random(1).randbytes(20 * CHUNK)
    disk.snapshot("one")
    return disk


def lose_chunk(repository: Repository, disk: ModelVolume, chunk: int) -> str:
    """Damage a chunk of the first four, which are the first segment; tell verify."""
    key = segment_key(repository.find("disk", "one").push, 0)
    data = bytearray(repository.store.get(key, 1 << 20))
    data[32 + chunk * CHUNK] ^= 1
    repository.store.put(key, data)
    assert repository.verify(deep=True).noted == 1
    return key


def test_only_what_is_damaged_is_stored_anew(disk: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.taken[0])
    lose_chunk(repository, disk, 3)
    disk.data[5 * CHUNK] ^= 1
    report = repository.push(disk.snapshot("two"))
    assert (report.repaired, report.changed, report.read) == (CHUNK, CHUNK + 4096, 2 * CHUNK)
    assert report.warnings == []
    disk.data[3 * CHUNK : 4 * CHUNK] = bytes(CHUNK)
    assert repository.push(disk.snapshot("three")).repaired == 0
    assert restored(repository, disk.taken[2]) == disk.taken[2].content


def test_what_was_overwritten_since_needs_no_repair(disk: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.taken[0])
    lose_chunk(repository, disk, 3)
    disk.data[3 * CHUNK : 4 * CHUNK] = bytes(CHUNK)
    assert next_push(repository, disk, "other")[1] == []
    disk.data[3 * CHUNK : 4 * CHUNK] = bytes(CHUNK)
    source = disk.snapshot("two")
    assert repository.push(source).warnings == []
    assert restored(repository, source) == source.content


def test_a_disk_that_has_something_else_is_told_of(disk: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.taken[0])
    lose_chunk(repository, disk, 3)
    two = disk.snapshot("two")
    content = bytearray(two.content)
    content[3 * CHUNK + 5] ^= 1
    two.content = bytes(content)
    two.changed_extents = lambda since: []  # type: ignore[method-assign]
    report = repository.push(two)
    assert len(report.warnings) == 1
    assert f"offset {3 * CHUNK}," in report.warnings[0]
    assert restored(repository, two) == two.content


def test_notes_are_hints(disk: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.taken[0])
    key = lose_chunk(repository, disk, 3)
    note = NOTES + key
    good = repository.store.get(note, 1 << 16)
    known = read_damage(repository.store, "disk")
    assert (known.regions, list(known.segments.values())) == ({0}, [frozenset({32 + 3 * CHUNK})])
    assert not read_damage(repository.store, "other").segments
    for bad in (b"", good[:-1], good[:20] + b"?" + good[21:], bytes(100)):
        repository.store.put(note, bad)
        assert not read_damage(repository.store, "disk").segments
    # Under a key that it is not about it says nothing either.
    repository.store.put(note, good)
    repository.store.put(NOTES + segment_key("00" * 16, 7), good)
    repository.store.put(NOTES + "nonsense", good)
    assert len(read_damage(repository.store, "disk").segments) == 1
    # What another verify has found beside it stays noted.
    lose_chunk(repository, disk, 1)
    repository.verify("disk", "one", deep=True)
    (offsets,) = read_damage(repository.store, "disk").segments.values()
    assert offsets == {32 + 3 * CHUNK, 32 + CHUNK}
    # An object that was put back is sound: a deep verify of everything forgets the notes.
    data = bytearray(repository.store.get(key, 1 << 20))
    for chunk in (1, 3):
        data[32 + chunk * CHUNK] ^= 1
    repository.store.put(key, data)
    repository.verify()
    repository.verify("disk", "one", deep=True)
    assert keys(repository, NOTES)
    assert repository.verify(deep=True).damaged == []
    assert keys(repository, NOTES) == {NOTES + "nonsense"}


def test_a_store_that_cannot_be_written_to(disk: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.taken[0])
    repository.store.delete(segment_key(repository.find("disk", "one").push, 0))

    def refuse(key: str, data: bytes | bytearray) -> None:
        raise UnavailableError("forced: read-only credentials")

    repository.store.put = refuse  # type: ignore[method-assign]
    report = repository.verify()
    assert (len(report.damaged), report.noted, len(report.warnings)) == (1, 0, 1)
    assert "read-only" in report.warnings[0]
