"""An encrypted repository for tests, and a look at what is really in the bucket."""

from __future__ import annotations

import random

from backends.memory_objects import MemoryObjectStore
from backends.objects import ObjectStore
from snapshots.repository import Repository, init_in_store
from snapshots.repository.secret import Secret, key_file, passphrase
from tests.snapshots.repository.model import ModelVolume
from tests.snapshots.repository.test_repository import CHUNK, PAGE

TEXT = "correct horse, battery stäple"
SECRET = passphrase(TEXT, "here")
OTHER = passphrase("another one", "here")
HEX = "5a" * 32
FILE = key_file(HEX.encode() + b"\n", "here")


def bucket(store: ObjectStore) -> dict[str, bytes]:
    """Everything that is in a store, by key."""
    return {key: store.get(key, size) for key, size in list(store.list(""))}


def fill_repository(
    store: ObjectStore, secret: Secret | None = SECRET
) -> tuple[Repository, ModelVolume]:
    """A repository with three snapshots that share data, one of another volume, one deleted."""
    repository = init_in_store(store, CHUNK, secret)
    volume = ModelVolume("disk", 2 * PAGE)
    rng = random.Random(1)
    volume.data[: 7 * CHUNK] = rng.randbytes(7 * CHUNK)
    volume.data[PAGE : PAGE + 2 * CHUNK] = b"compressible...." * (CHUNK // 8)
    repository.push(volume.snapshot("one"))
    volume.data[CHUNK : 3 * CHUNK] = rng.randbytes(2 * CHUNK)
    repository.push(volume.snapshot("two"))
    volume.data[PAGE + CHUNK] ^= 1
    repository.push(volume.snapshot("three"))
    other = ModelVolume("other", PAGE)
    repository.push(other.snapshot("gone"))
    repository.delete("other", "gone")
    return repository, volume


def filled_bucket() -> tuple[MemoryObjectStore, ModelVolume]:
    store = MemoryObjectStore()
    _, volume = fill_repository(store)
    return store, volume
