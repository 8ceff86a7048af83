"""The snapshot that a lazy layer's content comes from: found, pinned, opened, let go."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from backends.errors import CorruptError, NotFoundError, StorageError
from backends.objects import ObjectStore
from snapshots.lazy import LazyLayer
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.repository.chunk_reader import ChunkReader
from snapshots.repository.layout import PAGE_ENTRIES, outcome_key, tombstone_key
from snapshots.repository.pinning import pin_snapshot, renew_pin, unpin
from snapshots.repository.records import Root
from snapshots.repository.repository import Repository, open_repository
from snapshots.repository.roots import find_root

_log = logging.getLogger(__name__)

Open = Callable[[str], Repository]


class SnapshotOrigin:
    """One lazy layer's snapshot; all methods block, from any thread.

    ``pinned`` is told of a pin that takes the place of the one that the layer's record names.
    """

    def __init__(
        self,
        lazy: LazyLayer,
        pinned: Callable[[str], None] = lambda pin: None,
        opened: Open = open_repository,
    ) -> None:
        self.lazy = lazy
        self.pinned = pinned
        self._open = opened
        self._repository: Repository | None = None
        self._reader: ChunkReader | None = None
        self._root: Root | None = None
        self._lock = threading.Lock()
        self._stopping = False

    def reader(self) -> ChunkReader:
        with self._lock:
            if self._reader is None:
                repository = self._connected()
                root = _read_root(repository, self.lazy.push)
                self._reader = ChunkReader(repository.store, repository.config, root)
                self._root = root
            return self._reader

    def adopt(self, repository: Repository, root: Root) -> None:
        """Take over what is open and read already."""
        self._repository, self._root = repository, root
        self._reader = ChunkReader(repository.store, repository.config, root)

    def _connected(self) -> Repository:
        if self._repository is None:
            repository = self._open(self.lazy.url)
            config = repository.config
            if (config.repository_id, config.chunk_size) != (
                self.lazy.repository,
                self.lazy.chunk_size,
            ):
                raise NotFoundError(
                    f"{self.lazy.url} holds another repository than the one that"
                    f" {self.lazy.volume}@{self.lazy.snapshot} was restored from"
                )
            self._repository = repository
            if self._stopping:
                repository.store.stop_retrying()
        return self._repository

    def renew(self) -> None:
        self.reader()
        old = self.lazy.pin
        assert self._root is not None
        with self._lock:
            repository = self._connected()
        store, config = repository.store, repository.config
        new = renew_pin(store, config, self._root.summary, old)
        if new == old:
            return
        self.lazy = self.lazy.changed(pin=new)
        self.pinned(new)
        given_up = old and store.size(outcome_key(old)) is not None
        if given_up and store.size(tombstone_key(self.lazy.push)) is not None:
            _log.error(
                "%s was deleted, and collected, it may be, before all of it was fetched",
                self.lazy.source,
            )
        if old:
            unpin(store, config, old)

    def let_go(self) -> None:
        """Nothing more is read: the snapshot may be collected once it is deleted. StorageError."""
        if self.lazy.pin:
            with self._lock:
                repository = self._connected()
            unpin(repository.store, repository.config, self.lazy.pin)

    def stop_retrying(self) -> None:
        self._stopping = True
        if self._repository is not None:
            self._repository.store.stop_retrying()


def find_origin(
    url: str, volume: str, snapshot: str, rate: int | None, opened: Open = open_repository
) -> SnapshotOrigin:
    """Find a snapshot, and pin it. StorageError.

    Its chunks are what ``SnapshotOrigin.reader`` reads; the layer's record is its ``lazy``.
    """
    repository = opened(url)
    store, config = repository.store, repository.config
    summary = repository.find(volume, snapshot)
    if summary.size % BLOCK_SIZE:
        raise StorageError(f"{summary.label} has {summary.size} bytes, which are not whole blocks")
    pin = pin_snapshot(store, config, summary)
    try:
        root = _read_root(repository, summary.push)
        lazy = LazyLayer(
            url=url,
            repository=config.repository_id,
            volume=volume,
            snapshot=snapshot,
            push=summary.push,
            pin=pin,
            size=summary.size,
            chunk_size=config.chunk_size,
            data=sum(ref.chunks for ref in root.table) * config.chunk_size,
            claims=_claims((ref.page for ref in root.table), config.chunk_size, summary.size),
            rate=rate,
        )
    except BaseException:
        if pin:
            unpin(store, config, pin)
        raise
    origin = SnapshotOrigin(lazy, opened=opened)
    origin.adopt(repository, root)
    return origin


def _read_root(repository: Repository, push: str) -> Root:
    store: ObjectStore = repository.store
    try:
        return find_root(store, repository.config, push)
    except NotFoundError as error:
        raise CorruptError(f"{error}: the snapshot was deleted and collected") from error


def _claims(pages: Iterable[int], chunk_size: int, size: int) -> tuple[tuple[int, int], ...]:
    """The blocks of all pages, as runs."""
    blocks = PAGE_ENTRIES * chunk_size >> BLOCK_SHIFT
    runs: list[tuple[int, int]] = []
    for page in pages:
        first, end = page * blocks, min((page + 1) * blocks, size >> BLOCK_SHIFT)
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((first, end))
    return tuple(runs)
