"""Verify finds what is damaged, where, and all snapshots that it harms; a plain model compares."""

from __future__ import annotations

import os
import random
from collections import defaultdict

import pytest

from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store
from snapshots.repository.layout import pages_key, segment_key
from snapshots.repository.reading import read_page
from snapshots.repository.roots import find_root
from tests.snapshots.repository.model import ModelVolume
from tests.snapshots.repository.test_repository import CHUNK, PAGE, restored

ROUNDS = int(os.environ.get("NBDSERVE_VERIFY_ROUNDS", "6"))

Place = tuple[str, int]  # of a chunk or a page: key and offset

CHUNKS = [*range(12), 1023, *range(1024, 1030), *range(2048, 2052)]


def fill(
    repository: Repository, rng: random.Random, names: int, volume: str = "disk"
) -> ModelVolume:
    """A volume of three pages with many snapshots, some of which go back to an older content."""
    disk = ModelVolume(volume, 2 * PAGE + 5 * CHUNK)
    for number in range(names):
        if number and rng.random() < 0.2:
            disk.data[:] = rng.choice(disk.taken).content
        for chunk in rng.sample(CHUNKS, rng.choice([0, 1, 1, 4])):
            if rng.random() < 0.2:
                disk.data[chunk * CHUNK : (chunk + 1) * CHUNK] = bytes(CHUNK)
            else:
                disk.data[chunk * CHUNK : chunk * CHUNK + 900] = rng.randbytes(900)
        source = disk.snapshot(f"s{number}")
        if rng.random() < 0.3:
            source.older = source.older[rng.randrange(number + 1) :]  # another parent
        repository.push(source)
    return disk


def needs_of(repository: Repository) -> dict[str, dict[Place, int]]:
    """What each snapshot refers to, chunks and pages; with their lengths."""
    needs: dict[str, dict[Place, int]] = {}
    for summary in repository.list():
        found = needs.setdefault(summary.label, {})
        for ref in find_root(repository.store, repository.config, summary.push).table:
            found[pages_key(ref.push, ref.number), ref.offset] = ref.length
            for entry in read_page(repository.store, CHUNK, ref):
                for piece in entry.pieces() if entry is not None else ():
                    found[segment_key(piece.push, piece.segment), piece.offset] = piece.length
    return needs


def damage(
    repository: Repository, rng: random.Random, needs: dict[str, dict[Place, int]]
) -> tuple[set[Place], set[str]]:
    """Damage some segments; returns the chunks that cannot be read, and the objects removed."""
    lengths = {place: length for found in needs.values() for place, length in found.items()}
    chunks = [place for place in lengths if place[0].startswith("segments/")]
    bad: set[Place] = set()
    removed: set[str] = set()
    for key, offset in rng.sample(chunks, min(len(chunks), rng.randrange(1, 5))):
        data = repository.store.get(key, 1 << 20) if key not in removed else b""
        how = rng.randrange(3)
        if how == 0 or not data or (key, offset) in bad:
            removed.add(key)
            repository.store.delete(key)
            bad |= {place for place in chunks if place[0] == key}
        elif how == 1:
            cut = offset + rng.randrange(lengths[key, offset])
            repository.store.put(key, data[:cut])
            bad |= {place for place in chunks if place[0] == key and sum_of(place, lengths) > cut}
        else:
            at = offset + rng.randrange(lengths[key, offset])
            if at < len(data):
                flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                repository.store.put(key, flipped)
            bad.add((key, offset))
    return bad, removed


def sum_of(place: Place, lengths: dict[Place, int]) -> int:
    return place[1] + lengths[place]


def expected(
    needs: dict[str, dict[Place, int]], bad: set[Place], removed: set[str]
) -> dict[str, tuple[list[int], list[str]]]:
    """By key: the offsets, none where all is gone, and the snapshots."""
    offsets: defaultdict[str, set[int]] = defaultdict(set)
    harmed: defaultdict[str, set[str]] = defaultdict(set)
    for label, places in needs.items():
        for key, offset in places.keys() & bad:
            harmed[key].add(label)
            if key not in removed:
                offsets[key].add(offset)
    return {key: (sorted(offsets[key]), sorted(labels)) for key, labels in harmed.items()}


def found_by(
    repository: Repository, *names: str, deep: bool = True
) -> dict[str, tuple[list[int], list[str]]]:
    report = repository.verify(*names, deep=deep)
    assert all(one.key in one.problem and "\n" not in one.problem for one in report.damaged)
    assert len({one.key for one in report.damaged}) == len(report.damaged)
    return {one.key: (one.offsets, one.snapshots) for one in report.damaged if one.snapshots}


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_all_that_is_harmed_is_named(seed: int) -> None:
    rng = random.Random(seed)
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    fill(repository, rng, rng.randrange(1, 12))
    fill(repository, rng, 2, "other")
    needs = needs_of(repository)
    bad, removed = damage(repository, rng, needs)
    assert found_by(repository) == expected(needs, bad, removed)
    if not any(repository.store.size(key) is None for key in removed):
        return
    shallow = found_by(repository, deep=False)
    for key in removed & {place[0] for place in bad}:
        if any(key == place[0] for found in needs.values() for place in found):
            assert shallow[key] == expected(needs, bad, removed)[key]


@pytest.mark.parametrize("seed", range(ROUNDS // 2))
def test_one_snapshots_damage_names_the_others_that_share_it(seed: int) -> None:
    rng = random.Random(100 + seed)
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    fill(repository, rng, rng.randrange(2, 9))
    needs = needs_of(repository)
    bad, removed = damage(repository, rng, needs)
    for label, places in needs.items():
        volume, _, name = label.partition("@")
        of_it = expected(needs, bad & places.keys(), removed)
        assert found_by(repository, volume, name) == of_it
        assert repository.verify(volume, name, deep=True).snapshots == 1


@pytest.mark.parametrize("seed", range(ROUNDS // 3))
def test_pages_that_are_damaged(seed: int) -> None:
    rng = random.Random(seed)
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    fill(repository, rng, 8)
    needs = needs_of(repository)
    pages = sorted({place for found in needs.values() for place in found if "pages" in place[0]})
    key, offset = rng.choice(pages)
    good = repository.store.get(key, 1 << 20)
    at = offset + rng.randrange(24, 56)
    repository.store.put(key, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert found_by(repository, deep=False) == expected(needs, {(key, offset)}, set())
    repository.store.delete(key)
    gone = {place for place in pages if place[0] == key}
    assert found_by(repository, deep=False) == expected(needs, gone, {key})


def test_what_is_deleted_and_collected_meanwhile_is_no_damage() -> None:
    rng = random.Random(3)
    inner = MemoryObjectStore()
    repository = init_in_store(inner, CHUNK)
    disk = ModelVolume("disk", PAGE)
    for number in range(4):
        disk.data[: 6 * CHUNK] = rng.randbytes(6 * CHUNK)
        repository.push(disk.snapshot(f"s{number}"))
    reads = 0

    class Deleting(MemoryObjectStore):
        def get_range(self, key: str, offset: int, length: int) -> bytes:
            nonlocal reads
            reads += key.startswith("segments/")
            if reads == 1:
                reads += 1
                repository.delete("disk", "s2")
                repository.collect()
            return inner.get_range(key, offset, length)

    deleting = Deleting()
    deleting.list = inner.list  # type: ignore[method-assign]
    deleting.get = inner.get  # type: ignore[method-assign]
    deleting.size = inner.size  # type: ignore[method-assign]
    assert Repository(deleting, repository.config).verify(deep=True).damaged == []
    assert [summary.snapshot for summary in repository.list()] == ["s0", "s1", "s3"]
    # What is lost is told all the same.
    lost = next(key for key, _ in inner.list("segments/"))
    inner.delete(lost)
    assert list(found_by(repository)) == [lost]


def test_damage_that_comes_on_the_way_only_is_none() -> None:
    class Flaky(MemoryObjectStore):
        def get_range(self, key: str, offset: int, length: int) -> bytes:
            data = super().get_range(key, offset, length)
            if key.startswith("segments/") and key not in seen and length > CHUNK:
                seen.add(key)
                return data[:100] + bytes([data[100] ^ 1]) + data[101:]
            return data

    seen: set[str] = set()
    repository = init_in_store(Flaky(), CHUNK)
    source = ModelVolume("disk", PAGE)
    source.data[: 8 * CHUNK] = random.Random(1).randbytes(8 * CHUNK)
    taken = source.snapshot("one")
    repository.push(taken)
    assert repository.verify(deep=True).damaged == []
    assert seen
    assert restored(repository, taken) == taken.content
