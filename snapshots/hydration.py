"""Lazy layers in a data directory: made, fetched for, made whole, let go (lazy.py has the states).

``lazy`` has every layer that is not whole. Such a layer is never merged, and no other process
reads it: a push of a snapshot that stands on one is refused. Everything else (snapshots, clones,
rollback, growing, deletion) treats it as the immutable layer that it is.

The fetcher is only asked to begin by a process that goes on (``resume``): a command without a
daemon makes lazy volumes, and leaves the rest to the daemon.

When all that a layer claims is here, its index is written while nothing is opened or closed, and
every host with a view of it lets what turned out to be holes be nobody's. Then the pin in the
repository is given up and the record goes; where the store does not answer, that is tried again, at
the next start, too. A layer that is deleted before it is whole takes its record along: its pin is
given up if the store answers, else by the repository's collector, some day.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from backends.errors import InUseError, InvalidError, NotFoundError, StorageError, one_line
from backends.layers import LayerStore
from snapshots.extent_log import FETCHED, INDEX, encode_log, read_log
from snapshots.fetcher import Fetcher
from snapshots.lazy import LAZY, LazyLayer, read_lazy, unpack_lazy
from snapshots.manifest import Manifest
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SHIFT
from snapshots.open_views import OpenViews
from snapshots.owner_map import DATA, ZERO, OwnerMap
from snapshots.reserve import with_reserve

_log = logging.getLogger(__name__)

_MOST_RATE = 1 << 50
_TRY_AGAIN = 10.0  # seconds until something that failed is tried again


@dataclass(frozen=True)
class HydrationInfo:
    """How far a volume that was restored lazily is. Sizes in bytes.

    ``fetched`` of ``total`` are here. ``rate`` is the bound of the background a second, None: none.
    ``problem`` is what hinders it now.
    """

    source: str
    fetched: int
    total: int
    rate: int | None
    problem: str | None


class Hydration:
    """See the module's text; ``lazy`` is shared with who must leave such layers alone."""

    def __init__(
        self,
        store: LayerStore,
        manifests: ManifestStore,
        views: OpenViews,
        commits: asyncio.Lock,
        fetcher: Fetcher | None,
        lazy: set[str],
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._views = views
        self._commits = commits
        self._fetcher = fetcher
        self._names = lazy
        self._records: dict[str, LazyLayer] = {}
        self._done: dict[str, int] = {}
        self._problems: dict[str, str] = {}
        self._released: dict[str, LazyLayer] = {}
        # What the fetcher may still write to, of no volume any more.
        self.ending: set[str] = set()
        self._running = False
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_whole: Callable[[str], None] = lambda layer: None

    # Start and end

    async def start(self) -> None:
        """Find the lazy layers; the manifests have been read, nothing is open yet."""
        heads = {manifest.head for manifest in self._manifests.volumes.values()}
        for layer in sorted(self._manifests.live_layers() - heads):
            if not await self._store.has_log(layer, LAZY):
                continue
            if not await self._store.has_log(layer, INDEX):
                self._names.add(layer)
            try:
                await self._load(layer)
            except (OSError, StorageError) as error:
                # Whoever opens a volume that stands on it is told the same.
                _log.error("a volume that was restored lazily cannot be read: %s", one_line(error))
        if self._fetcher is not None:
            await self._fetcher.start(self)
        self._views.on_wanted = self.wanted

    async def _load(self, layer: str) -> None:
        record = await read_lazy(self._store, layer)
        if record is not None:
            self._records[layer] = record
            self._done[layer] = await self._count(layer, record)
            return
        content = await self._store.read_log(layer, LAZY)
        if content is not None:
            self._released[layer] = unpack_lazy(content, self._store.describe(layer, LAZY))

    async def _count(self, layer: str, record: LazyLayer) -> int:
        """About how many bytes are here, until the fetcher tells."""
        holds = OwnerMap(record.blocks)
        try:
            await self._read_log(layer, holds)
            runs = holds.runs(0, holds.blocks)
            return sum(end - first for first, end, kind in runs if kind == DATA) << BLOCK_SHIFT
        except StorageError:
            return 0
        finally:
            holds.close()

    def resume(self) -> None:
        """Fetch from now on; a second call does nothing."""
        if self._running:
            return
        self._running = True
        if self._fetcher is not None:
            for layer, record in self._records.items():
                self._fetcher.begin(layer, record)
        for layer in list(self._released):
            self._start(self._release(layer))

    async def stop(self) -> None:
        """Fetch no more."""
        self._running = False
        self._stopping.set()
        if self._fetcher is not None:
            await self._fetcher.close()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    # Looking up

    def lacking(self, manifest: Manifest, top: str) -> LazyLayer | None:
        """The record of a layer of a stack that is not whole; None: all are."""
        return next(
            (self._records[name] for name in manifest.stack(top) if name in self._records), None
        )

    def info(self, manifest: Manifest) -> HydrationInfo | None:
        """How far a volume is; None: it is whole."""
        layer = next((name for name in manifest.parents if name in self._records), None)
        if layer is None:
            return None
        record = self._records[layer]
        done = min(self._done.get(layer, 0), record.data)
        problem = self._problems.get(layer)
        return HydrationInfo(record.source, done, record.data, record.rate, problem)

    def check_whole(self, manifest: Manifest, top: str, what: str) -> None:
        """InUseError when part of a stack is in a repository only."""
        record = self.lacking(manifest, top)
        if record is not None:
            raise InUseError(
                f"{what} cannot be pushed yet: a part of it is only in {record.source}; wait with"
                f" 'nbdserve volume hydrate {manifest.name} --wait'"
            )

    # Restoring

    async def find(self, url: str, volume: str, snapshot: str, rate: int | None) -> LazyLayer:
        """Find and pin what is to be restored. StorageError."""
        _check_rate(rate)
        if self._fetcher is None:
            raise InvalidError("nothing can be restored lazily here")
        return await self._fetcher.find(url, volume, snapshot, rate)

    async def give_up(self, record: LazyLayer) -> None:
        """Let go of what was found."""
        if self._fetcher is not None:
            await self._fetcher.let_go(record)

    def adopt(self, layer: str, record: LazyLayer) -> None:
        """A volume stands on this layer now."""
        self._names.add(layer)
        self._records[layer] = record
        self._done[layer] = 0
        if self._running and self._fetcher is not None:
            self._fetcher.begin(layer, record)

    async def set_rate(self, manifest: Manifest, rate: int | None) -> None:
        """Change how fast the background is, durably; nothing to do when the volume is whole."""
        _check_rate(rate)
        layer = next((name for name in manifest.parents if name in self._records), None)
        if layer is None:
            return
        await self._record(layer, self._records[layer].changed(rate=rate))
        if self._fetcher is not None:
            self._fetcher.set_rate(layer, rate)

    async def _record(self, layer: str, record: LazyLayer) -> None:
        content = record.pack()
        await with_reserve(self._store, lambda: self._store.create_log(layer, LAZY, content))
        self._records[layer] = record

    def prune(self) -> None:
        """Let go of layers that no volume lists any more."""
        gone = self._records.keys() - self._manifests.live_layers()
        for layer in gone:
            record = self._records.pop(layer)
            self._forget(layer)
            if self._fetcher is not None:
                self.ending.add(layer)
                self._start(self._end_quietly(self._fetcher, layer, record))

    def _forget(self, layer: str) -> None:
        self._names.discard(layer)
        self._done.pop(layer, None)
        self._problems.pop(layer, None)

    async def _end_quietly(self, fetcher: Fetcher, layer: str, record: LazyLayer) -> None:
        try:
            try:
                await fetcher.end(layer)
            finally:
                self.ending.discard(layer)
            await fetcher.let_go(record)
        except StorageError as error:
            _log.warning(
                "%s stays pinned until its repository's collector gives up on it: %s",
                record.source,
                error,
            )

    # What hosts want

    def wanted(self, layer: str, first: int, end: int) -> None:
        """A host wants chunks of a layer, or to know which are here."""
        if self._fetcher is None or layer not in self._records:
            return
        if not self._running and first < end:
            self._views.refused(layer, first, end, "no daemon runs that would fetch it")
        else:
            self._fetcher.want(layer, first, end)

    # What the fetcher tells

    def fetched(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        self._views.fetched(layer, runs)

    def lost_again(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        self._views.lost_again(layer, runs)

    def refused(self, layer: str, first: int, end: int, why: str) -> None:
        self._views.refused(layer, first, end, why)

    def progress(self, layer: str, done: int, problem: str | None) -> None:
        record = self._records.get(layer)
        if record is None:
            return
        self._done[layer] = done
        if problem != self._problems.get(layer):
            if problem is None:
                del self._problems[layer]
                _log.warning("%s can be fetched again", record.source)
            else:
                self._problems[layer] = problem
                _log.warning("%s: %s", record.source, problem)

    def pinned(self, layer: str, pin: str) -> None:
        if layer in self._records:
            self._start(self._note_pin(layer, pin))

    async def _note_pin(self, layer: str, pin: str) -> None:
        async with self._commits:
            if layer in self._records:
                try:
                    await self._record(layer, self._records[layer].changed(pin=pin))
                except (OSError, StorageError) as error:
                    _log.warning("%s: %s", self._store.describe(layer, LAZY), one_line(error))

    def whole(self, layer: str) -> None:
        if layer in self._records:
            self._start(self._complete(layer))

    # Making whole

    async def _complete(self, layer: str) -> None:
        """Turn a layer of which all is here into an ordinary one."""
        assert self._fetcher is not None
        await self._fetcher.end(layer)
        try:
            await self._write_index(layer)
        except (OSError, StorageError) as error:
            if layer not in self._records:
                return  # its volume was deleted meanwhile
            self._problems[layer] = one_line(error)
            _log.warning("%s: %s", self._store.describe(layer, INDEX), one_line(error))
            await self._pause(_TRY_AGAIN)
            if layer in self._records and not self._stopping.is_set():
                # It says again that all is here, or finds that something is not.
                self._fetcher.begin(layer, self._records[layer])
        if layer in self._released:
            await self._release(layer)

    async def _write_index(self, layer: str) -> None:
        record = self._records.get(layer)
        if record is None:
            return  # its volume was deleted meanwhile
        holds = OwnerMap(record.blocks)
        try:
            await self._read_log(layer, holds)
            await asyncio.to_thread(_check_complete, holds, record)
            await asyncio.to_thread(holds.replace, 0, holds.blocks, ZERO, 0)
            runs = holds.runs(0, holds.blocks)
            content, _ = await asyncio.to_thread(encode_log, layer, INDEX, runs, sealed=True)
        finally:
            holds.close()
        async with self._commits:
            if layer not in self._records:
                return  # its volume was deleted meanwhile
            async with self._views.stacks:
                await with_reserve(
                    self._store, lambda: self._store.create_log(layer, INDEX, content)
                )
                await self._views.complete(layer)
                self._released[layer] = self._records.pop(layer)
                self._forget(layer)
            _log.info("all of %s is here", record.source)
            self.on_whole(layer)

    async def _read_log(self, layer: str, holds: OwnerMap) -> None:
        content = await self._store.read_log(layer, FETCHED)
        where = self._store.describe(layer, FETCHED)
        if content is None:
            raise NotFoundError(f"{where} is missing")
        await asyncio.to_thread(read_log, content, layer, FETCHED, holds, where)

    async def _release(self, layer: str) -> None:
        """Give up the pin of a layer that is whole, then remove what says that it was not."""
        record = self._released[layer]
        while self._fetcher is not None:
            try:
                await self._fetcher.let_go(record)
                break
            except StorageError as error:
                _log.warning("%s stays pinned for now: %s", record.source, error)
                await self._pause(_TRY_AGAIN)
            if self._stopping.is_set():
                return
        async with self._commits:
            if self._manifests.uses(layer):
                try:
                    await self._store.delete_log(layer, FETCHED)
                    await self._store.delete_log(layer, LAZY)
                except OSError as error:
                    _log.warning("%s: %s", self._store.describe(layer, LAZY), one_line(error))
            del self._released[layer]

    async def _pause(self, seconds: float) -> None:
        """For so long, or until it all stops."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_rate(rate: int | None) -> None:
    if rate is not None and not 0 <= rate < _MOST_RATE:
        raise InvalidError(f"rate {rate} is not a number of bytes a second; write for example 50M")


def _check_complete(holds: OwnerMap, record: LazyLayer) -> None:
    for first, end in record.claims:
        if holds.raw.find(b"\0", first, end) >= 0:
            raise StorageError(f"{record.source} was said to be here, and is not")
