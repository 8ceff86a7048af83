"""Which merges run, and when: one at a time, never on layers that another process reads.

Every pair of layers that nothing tells apart any more is merged (merge.py has how), first those
that were begun before. A pin on a layer stops its merge after the chunk in hand; it goes on when
the pin is gone. So does, at the next start, a merge that a crash interrupted. Layers that are
``lazy``, not whole yet, are left alone.

``lock`` also covers turning a sealed layer's journal into its index: both write a layer's logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Set
from typing import Any

from backends.errors import StorageError
from backends.layers import LayerClaim, LayerStore
from snapshots.extent_log import INDEX
from snapshots.layer import seal_journal
from snapshots.manifest import Merge
from snapshots.manifest_store import ManifestStore
from snapshots.merge import Merger, Pace, plan_merge
from snapshots.names import BLOCK_SHIFT
from snapshots.open_views import OpenViews
from snapshots.owner_map import OwnerMap
from snapshots.pins import Pins
from snapshots.punching import punch_allocated

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


async def _at_once(seconds: float) -> None:
    pass


class Merging:
    """See the module's text; ``commits`` is held wherever manifests change.

    ``pace`` is called after each chunk, and may take its time.
    """

    def __init__(
        self,
        store: LayerStore,
        manifests: ManifestStore,
        views: OpenViews,
        commits: asyncio.Lock,
        pins: Pins,
        lazy: Set[str] = frozenset(),
    ) -> None:
        self.lock = asyncio.Lock()
        self.deferred = False
        self.pace: Pace = _at_once
        self._store = store
        self._manifests = manifests
        self._views = views
        self._commits = commits
        self._pins = pins
        self._lazy = lazy
        self._running: Merge | None = None
        self._claiming = asyncio.Lock()
        self._claimed: set[str] = set()
        self._ended = asyncio.Event()
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    def resume(self) -> None:
        """Merge in the background whatever can be merged."""
        if not self._stopping:
            self._start(self._merge_quietly())

    async def merge_now(self, progress: Progress | None = None) -> None:
        """Merge whatever can be merged; the first error is raised when the rest has been tried."""
        await asyncio.shield(self._start(self._merge_all(progress)))

    async def wait_for_pins(self) -> None:
        """Return when no merge runs on layers that are pinned now."""
        while self._running is not None and self._pins.touch(_pair(self._running)):
            await self._ended.wait()

    async def settled(self) -> None:
        """Return when what was merged, or is no use any more, is done with for now."""
        async with self.lock:
            pass

    async def drop_condemned(self) -> None:
        """Delete condemned layers as far as nothing uses them; the caller holds ``commits``.

        No error: what cannot be deleted now is deleted later, at the next start at the latest.
        """
        if self._manifests.in_doubt is None:
            try:
                await self._manifests.delete_condemned(self.in_use())
            except (OSError, StorageError) as error:
                _log.warning("layers of deleted snapshots stay for now: %s", error)

    async def nobody_reads(self, layer: str) -> bool:
        """Whether no other process reads, or fills, a layer that no snapshot has."""
        if layer in self._lazy:
            return False
        async with self._claiming:
            if layer in self._claimed:
                return True
            claim = await self._store.claim_layer(layer)
            if claim is None:
                return False
            claim.release()
            return True

    def in_use(self) -> set[str]:
        """Layers that pins, open views or merges use, listed in a manifest or not."""
        used = self._pins.layers() | self._views.layers()
        for merge in self._manifests.merges.values():
            used.update(_pair(merge))
        return used

    async def stop(self) -> None:
        """Stop after the chunk in hand."""
        self._stopping = True
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    # Merges

    async def _merge_quietly(self) -> None:
        try:
            await self._merge_all(None)
        except (OSError, StorageError) as error:
            _log.warning("merging the layers of deleted snapshots is put off: %s", error)

    async def _merge_all(self, progress: Progress | None) -> None:
        async with self.lock:
            self.deferred = False
            tried: set[tuple[str, str]] = set()
            failure: OSError | StorageError | None = None
            while not self._stopping:
                before = len(tried)
                try:
                    merge = await self._next(tried)
                    if merge is None:
                        break
                    await self._merge(merge, progress)
                except (OSError, StorageError) as error:
                    self.deferred = True
                    failure = failure or error
                    if len(tried) == before:
                        break  # it would fail the same way again
            if failure is not None:
                raise failure

    async def _next(self, tried: set[tuple[str, str]]) -> Merge | None:
        async with self._commits:
            self._manifests.check()
            if self._manifests.unreadable:
                return None  # any layer may be theirs
            for merge in list(self._manifests.merges.values()):
                if not self._manifests.uses(merge.source):
                    # Its volume was deleted or rolled back meanwhile.
                    await self._manifests.end_merge(merge)
                    await self.drop_condemned()
                elif self._free(merge.lower, merge.upper, tried):
                    tried.add(_pair(merge))
                    return merge
            busy = {layer for merge in self._manifests.merges.values() for layer in _pair(merge)}
            for lower, upper in self._manifests.mergeable():
                if lower not in busy and upper not in busy and self._free(lower, upper, tried):
                    tried.add((lower, upper))
                    merge = await plan_merge(self._store, lower, upper, self._blocks(lower))
                    await self._manifests.begin_merge(merge)
                    return merge
        return None

    def _free(self, lower: str, upper: str, tried: set[tuple[str, str]]) -> bool:
        pair = (lower, upper)
        return pair not in tried and not self._pins.touch(pair) and self._lazy.isdisjoint(pair)

    async def _merge(self, merge: Merge, progress: Progress | None) -> None:
        claims: list[LayerClaim] = []
        self._running = merge
        self._ended.clear()
        try:
            async with self._claiming:
                for layer in _pair(merge):
                    claim = await self._store.claim_layer(layer)
                    if claim is None:
                        # A backup that outlived the daemon it began under still reads there.
                        self.deferred = True
                        return
                    claims.append(claim)
                self._claimed.update(_pair(merge))
            blocks = self._blocks(merge.lower)
            merger = Merger(
                self._store, self._manifests, self._views, self._commits, merge, blocks, self.pace
            )
            if await merger.run(lambda: self._wanted(merge), progress):
                async with self._commits:
                    await self.drop_condemned()
        finally:
            for claim in claims:
                claim.release()
            self._claimed.clear()
            self._running = None
            self._ended.set()

    def _wanted(self, merge: Merge) -> bool:
        return not (
            self._stopping
            or self._pins.touch(_pair(merge))
            or not self._manifests.uses(merge.source)
        )

    def _blocks(self, layer: str) -> int:
        return max(manifest.largest() for manifest in self._manifests.uses(layer)) >> BLOCK_SHIFT

    # Indexes

    def index(self, layer: str) -> None:
        """Turn a sealed layer's journal into its index, in the background."""
        if not self._stopping:
            self._start(self._index(layer))

    async def _index(self, layer: str) -> None:
        async with self.lock:
            if not self._manifests.uses(layer) or layer in self._lazy:
                return
            holds = OwnerMap(self._blocks(layer))
            try:
                if await self._store.has_log(layer, INDEX):
                    return
                await seal_journal(self._store, layer, holds)
                await self._punch_zeroes(layer, holds)
            except (OSError, StorageError) as error:
                # The journal serves as well; it is tried again at the next start.
                if self._manifests.uses(layer):  # else the volume was deleted meanwhile
                    where = self._store.describe(layer, INDEX)
                    _log.warning("%s was not written: %s", where, error)
            finally:
                holds.close()

    async def _punch_zeroes(self, layer: str, holds: OwnerMap) -> None:
        """Give back what was trimmed in a head but not punched before the gate."""
        if not holds.count_owned():
            return
        opened = await self._views.pool.acquire(layer)
        try:

            def punch() -> None:
                for first, last, _ in holds.runs(0, holds.blocks):
                    punch_allocated(opened.data, first, last)

            with contextlib.suppress(OSError):
                await self._views.threads.sync(punch)
        finally:
            self._views.pool.release(opened)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _pair(merge: Merge) -> tuple[str, str]:
    return merge.lower, merge.upper
