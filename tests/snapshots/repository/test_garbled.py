"""Replies that are garbled on their way: nothing is taken for damage, and nothing is lost."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from backends.errors import CorruptError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store, open_in_store, packing
from snapshots.repository.layout import intent_key, new_push_id
from snapshots.repository.records import Intent
from tests.snapshots.repository.model import ModelSink, ModelSource, ModelVolume
from tests.snapshots.repository.test_repository import CHUNK, PAGE


class GarblingStore(MemoryObjectStore):
    """Garbles every reading of an object the first time, and one key of a listing."""

    def __init__(self) -> None:
        super().__init__()
        self.garbles = False
        self.read: set[tuple[object, ...]] = set()
        self.lists: Counter[str] = Counter()
        self.listing: tuple[str, int, int, str] | None = None  # prefix, which, key, character
        self.lock = threading.Lock()

    def get(self, key: str, limit: int) -> bytes:
        return self.garble(super().get(key, limit), key)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        return self.garble(super().get_range(key, offset, length), key, offset, length)

    def garble(self, data: bytes, *what: object) -> bytes:
        with self.lock:
            first = what not in self.read
            self.read.add(what)
        if not first or not self.garbles:
            return data
        place = random.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        found = list(super().list(prefix))
        number = self.lists[prefix]
        self.lists[prefix] += 1
        if self.listing is not None and self.listing[:2] == (prefix, number) and found:
            key, size = found[self.listing[2] % len(found)]
            place = len(prefix) + 3
            key = key[:place] + self.listing[3] + key[place + 1 :]
            found[self.listing[2] % len(found)] = (key, size)
        yield from found


def check(repository: Repository, sources: list[ModelSource]) -> None:
    assert {item.snapshot for item in repository.list()} == {item.snapshot for item in sources}
    for source in sources:
        sink = ModelSink(source.size)
        repository.restore("disk", source.snapshot, sink)
        assert sink.data == source.content


class Made(NamedTuple):
    """A repository, its objects by key."""

    objects: dict[str, bytes]
    volume: ModelVolume

    def store(self) -> GarblingStore:
        copy = GarblingStore()
        for key, data in self.objects.items():
            copy.put(key, data)
        return copy


@pytest.fixture(scope="module")
def repacked() -> Made:
    """Four snapshots, of which the first is deleted and what was left of it repacked."""
    store = MemoryObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SEGMENT_TARGET", 1 << 20)
        volume = repack(init_in_store(store, CHUNK))
    return Made({key: store.get(key, 1 << 30) for key, _ in store.list("")}, volume)


def repack(repository: Repository) -> ModelVolume:
    volume = ModelVolume("disk", PAGE + CHUNK)
    rng = random.Random(1)
    volume.data[: 120 * CHUNK] = rng.randbytes(120 * CHUNK)
    repository.push(volume.snapshot("s0"))
    for chunk in range(120):
        if chunk % 15:
            volume.data[chunk * CHUNK : (chunk + 1) * CHUNK] = rng.randbytes(CHUNK)
    for number in range(1, 4):
        volume.data[number * CHUNK : (number + 1) * CHUNK] = rng.randbytes(CHUNK)
        repository.push(volume.snapshot(f"s{number}"))
    repository.delete("disk", "s0")
    assert repository.collect().repacked == 1
    repository.collect()
    return volume


def test_what_is_read_is_read_again(repacked: Made) -> None:
    store, volume = repacked.store(), repacked.volume
    store.garbles = True

    def fresh() -> Repository:
        store.read.clear()
        return open_in_store(store)

    check(fresh(), volume.taken[1:])
    assert fresh().verify(deep=True).damaged == []
    assert fresh().list_protected() == set()
    volume.data[0] ^= 1
    pushed = volume.snapshot("s4")
    report = fresh().push(pushed)
    assert report.parent == "s3"
    assert report.warnings == []
    fresh().delete("disk", "s2")
    fresh().collect()
    store.garbles = False
    check(fresh(), [volume.taken[1], volume.taken[3], pushed])
    volume.taken.remove(pushed)


def test_what_the_store_damaged_is_damaged(repacked: Made) -> None:
    store = repacked.store()
    repository = open_in_store(store)
    (segment, *_) = (key for key, _ in store.list("segments/"))
    data = bytearray(store.get(segment, 1 << 30))
    data[100] ^= 1
    store.put(segment, bytes(data))
    assert [damage.key for damage in repository.verify(deep=True).damaged] == [segment]
    with pytest.raises(CorruptError, match=segment):
        repository.restore("disk", "s3", ModelSink(PAGE + CHUNK))


@pytest.mark.parametrize("character", ["0", "z"])
@pytest.mark.parametrize(
    ("prefix", "which"),
    [
        *(("intents/", which) for which in range(2)),
        *(("outcomes/", which) for which in range(3)),
        *(("tombstones/", which) for which in range(2)),
        *(("roots/", which) for which in range(2)),
        ("segments/", 0),
        ("pages/", 0),
        ("snapshots/", 0),
    ],
)
def test_a_garbled_listing_loses_nothing(
    prefix: str, which: int, character: str, repacked: Made
) -> None:
    """Neither live snapshots nor what a push under way has pinned."""
    original, volume = repacked.store(), repacked.volume
    repository = open_in_store(original)
    pinned = repository.find("disk", "s2").push
    intent = Intent(new_push_id(), (pinned,), "disk", "s9", "id", 2e9)
    original.put(intent_key(intent.push), intent.encode())
    repository.delete("disk", "s2")
    objects = {key: original.get(key, 1 << 30) for key, _ in original.list("")}
    for number in range(4):
        store = Made(objects, volume).store()
        store.listing = (prefix, which, number, character)
        repository = open_in_store(store)
        repository.collect()
        store.listing = None
        check(repository, [volume.taken[1], volume.taken[3]])
        assert repository.verify(deep=True).damaged == []
        # The push that pinned it may go on, for nothing of it is gone.
        store.delete(f"tombstones/{pinned}")
        check(repository, volume.taken[1:])


@pytest.mark.parametrize("prefix", ["outcomes/", "tombstones/", "snapshots/"])
@pytest.mark.parametrize("character", ["0", "z", "/"])
def test_a_garbled_listing_shows_what_there_is(prefix: str, character: str) -> None:
    store = GarblingStore()
    repository = init_in_store(store, CHUNK)
    volume = ModelVolume("disk", PAGE)
    for number in range(4):
        volume.data[number] = 1
        repository.push(volume.snapshot(f"s{number}"))
    repository.delete("disk", "s0")
    repository.delete("disk", "s2")
    for number in range(4):
        store.lists.clear()
        store.listing = (prefix, 0, number, character)
        assert [item.snapshot for item in repository.list()] == ["s1", "s3"]


def test_a_stranger_among_the_intents_keeps_nobody_from_collecting() -> None:
    store = MemoryObjectStore()
    repository = init_in_store(store, CHUNK)
    volume = ModelVolume("disk", PAGE)
    volume.data[0] = 1
    repository.push(volume.snapshot("s0"))
    repository.delete("disk", "s0")
    for stranger in ("intents/readme.txt", "outcomes/0", "roots/x/y"):
        store.put(stranger, b"hello")
    assert repository.collect().objects > 0
    assert store.get("intents/readme.txt", 10) == b"hello"
    assert not list(store.list("segments/"))
