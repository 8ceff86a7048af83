"""A repository: what the command line does with one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from backends.errors import ExistsError, InvalidError, NotFoundError, StorageError
from backends.object_urls import open_object_store
from backends.objects import ObjectStore
from snapshots.names import check_name
from snapshots.repository.holdings import describe_object, list_snapshots, read_outcome
from snapshots.repository.interfaces import Progress, Sink, Source
from snapshots.repository.layout import (
    CONFIG_KEY,
    DEFAULT_CHUNK_SIZE,
    MAX_CHUNK_SIZE,
    MIN_CHUNK_SIZE,
    PROBES,
    RECORD_LIMIT,
    new_push_id,
    pointer_key,
    tombstone_key,
)
from snapshots.repository.push import PushReport, push_snapshot
from snapshots.repository.records import Config, Summary, Tombstone
from snapshots.repository.restore import RestoreReport, restore_root
from snapshots.repository.verify import VerifyReport, verify_snapshots

Summaries = list[Summary]  # Repository has a method of that name


class Repository:
    """An open repository. Methods block, and raise StorageErrors whose line is for the user."""

    def __init__(self, store: ObjectStore, config: Config) -> None:
        self.store = store
        self.config = config

    @property
    def notice(self) -> str | None:
        """One line for the user when the store cannot keep two writers apart, else None."""
        if self.config.conditional_put:
            return None
        return (
            f"{self.store.name} does not refuse a second PUT with If-None-Match: only one command "
            "at a time may write to this repository"
        )

    def list(self, volume: str | None = None) -> Summaries:
        """The snapshots, of one volume or of all, by volume and then oldest first."""
        return list_snapshots(self.store, self.config, volume)

    def find(self, volume: str, snapshot: str) -> Summary:
        """The snapshot of that name; NotFoundError when there is none."""
        return self._find_all(volume, snapshot)[-1]

    def push(self, source: Source, progress: Progress | None = None) -> PushReport:
        """Store a snapshot, uploading only what its newest parent here does not have."""
        return push_snapshot(self.store, self.config, source, progress)

    def restore(
        self, volume: str, snapshot: str, sink: Sink, progress: Progress | None = None
    ) -> RestoreReport:
        """Write a snapshot into ``sink``, every chunk verified before it is written."""
        summary = self.find(volume, snapshot)
        outcome, _ = read_outcome(self.store, self.config, summary.push)
        if outcome.root is None:
            raise NotFoundError(f"{summary.label} in {self.store.name} was never committed")
        return restore_root(self.store, self.config, outcome.root, sink, progress)

    def delete(self, volume: str, snapshot: str) -> Summary:
        """Delete a snapshot; others keep all that they share with it. Frees no space yet."""
        found = self._find_all(volume, snapshot)
        for summary in found:
            tombstone = Tombstone(summary.push, volume, snapshot, time.time())
            # Refused when another command deletes it too: it is deleted all the same.
            put = self.store.put_if_absent if self.config.conditional_put else self.store.put
            put(tombstone_key(summary.push), tombstone.encode())
            self.store.delete(pointer_key(volume, snapshot, summary.push))
        return found[-1]

    def verify(
        self,
        volume: str | None = None,
        snapshot: str | None = None,
        *,
        deep: bool = False,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Look for damage in all, in one volume's snapshots, or in one of them."""
        return verify_snapshots(self.store, self.config, volume, snapshot, deep, progress)

    def _find_all(self, volume: str, snapshot: str) -> Summaries:
        """All of that name: two hosts that pushed at the same instant may have made two."""
        check_name("volume", volume)
        check_name("snapshot", snapshot)
        found = [item for item in self.list(volume) if item.snapshot == snapshot]
        if not found:
            raise NotFoundError(
                f"there is no {volume}@{snapshot} in {self.store.name}; 'nbdserve repo list' shows "
                "what there is"
            )
        return found


def init_repository(url: str, chunk_size: int = DEFAULT_CHUNK_SIZE) -> Repository:
    """Make a repository at ``url``; ``chunk_size`` in bytes, a power of two.

    Raises ExistsError when there is one. See :attr:`Repository.notice` afterwards.
    """
    check_chunk_size(chunk_size)
    return init_in_store(open_object_store(url, create=True), chunk_size)


def open_repository(url: str) -> Repository:
    """Open the repository at ``url``; NotFoundError when there is none."""
    return open_in_store(open_object_store(url))


def init_in_store(store: ObjectStore, chunk_size: int = DEFAULT_CHUNK_SIZE) -> Repository:
    """Make a repository in an open store."""
    check_chunk_size(chunk_size)
    taken = ExistsError(f"{store.name} holds a repository: use it, or choose another place")
    if store.size(CONFIG_KEY) is not None:
        raise taken
    conditional = _refuses_second_put(store)
    config = Config(new_push_id(), chunk_size, conditional, time.time())
    put: Callable[[str, bytes], bool | None] = store.put_if_absent if conditional else store.put
    if put(CONFIG_KEY, config.encode()) is False:
        raise taken
    return Repository(store, config)


def open_in_store(store: ObjectStore) -> Repository:
    """Open the repository in an open store."""
    try:
        record = store.get(CONFIG_KEY, RECORD_LIMIT)
    except NotFoundError:
        next(store.list(CONFIG_KEY), None)  # says so when there is no such bucket
        raise NotFoundError(
            f"there is no repository in {store.name}: make one with 'nbdserve repo init'"
        ) from None
    return Repository(store, Config.decode(record, describe_object(store, CONFIG_KEY)))


def check_chunk_size(chunk_size: int) -> int:
    """Return ``chunk_size`` (bytes) when a repository may have it, else InvalidError."""
    if not MIN_CHUNK_SIZE <= chunk_size <= MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise InvalidError(
            f"chunk size {chunk_size} is not allowed: use a power of two from 4K to 4M"
        )
    return chunk_size


def _refuses_second_put(store: ObjectStore) -> bool:
    """Probe whether a conditional PUT of a key that exists is refused, as the commit needs."""
    key = f"{PROBES}{secrets.token_hex(16)}"
    try:
        first = store.put_if_absent(key, b"first")
        second = store.put_if_absent(key, b"second")
        return first and not second and store.get(key, RECORD_LIMIT) == b"first"
    except InvalidError:  # the endpoint does not know such a request
        return False
    finally:
        _remove_probe(store, key)


def _remove_probe(store: ObjectStore, key: str) -> None:
    try:
        store.delete(key)
    except StorageError:
        return  # a probe left behind harms nothing, and the first error says more
