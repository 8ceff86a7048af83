"""A host of views in this process (host.py has the rules)."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from backends.layers import LayerStore
from snapshots.cells import count_cells
from snapshots.difference import changed_extents, touched_by
from snapshots.extent_log import Run
from snapshots.handle import Handle
from snapshots.head import Head, open_head
from snapshots.host import HostLostError, LayerCells, MergeNames, Watcher
from snapshots.layer import LayerPool, apply_layer, apply_merge
from snapshots.manifest import Merge
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import REGION, OwnerMap
from snapshots.punching import gaps
from snapshots.threads import Threads
from snapshots.view import View, load_stack
from snapshots.volume import Volume

_log = logging.getLogger(__name__)


@dataclass
class _Writing:
    """A volume and what a snapshot under way has made of it."""

    volume: Volume
    next: Head | None = None
    sealed: tuple[Head, list[Run]] | None = None
    durable: bool = False
    thaw: Callable[[], None] | None = None


class LocalHost:
    """A ``ViewHost``: all its views share ``threads`` and, where they can, open layers."""

    available = True

    def __init__(self, store: LayerStore, threads: Threads) -> None:
        self.pid = os.getpid()
        self._store = store
        self._threads = threads
        self._pool = LayerPool(store, writable=True, fetch=self._fetch)
        self._views: dict[str, View] = {}
        self._volumes: dict[str, _Writing] = {}
        self._watcher: Watcher | None = None

    async def start(self, watcher: Watcher) -> None:
        self._watcher = watcher

    async def close(self) -> None:
        pass

    def kill(self) -> None:
        raise AssertionError("this process answers as long as it runs")

    def view(self, key: str) -> View:
        """An open view; HostLostError when the catalogue speaks of one from another life."""
        try:
            return self._views[key]
        except KeyError:
            raise HostLostError(f"{key} was closed with its worker; open it again") from None

    def _writing(self, key: str) -> _Writing:
        try:
            return self._volumes[key]
        except KeyError:
            raise HostLostError(f"{key} was closed with its worker; open it again") from None

    def lease(
        self,
        key: str,
        name: str,
        size: int,
        read_only: bool,
        bases: Mapping[str, str],
        revoke: Callable[[], None],
    ) -> Handle:
        return self.handle(key, name, bases, revoke)

    def handle(
        self, key: str, name: str, bases: Mapping[str, str], revoke: Callable[[], None]
    ) -> Handle:
        """A client's part of an open view; bases that are closed by now are None."""
        found = {context: self._views.get(base) for context, base in bases.items()}
        return Handle(key, name, self.view(key), revoke, found)

    # Views

    async def open_volume(
        self,
        key: str,
        name: str,
        size: int,
        stack: Sequence[str],
        merges: Sequence[MergeNames],
        failure: str | None,
    ) -> None:
        owners = OwnerMap(size >> BLOCK_SHIFT)
        volume = Volume(name, size, owners, self._threads, self._store, key)
        volume.on_failure = functools.partial(self._failed, key)
        try:
            await load_stack(volume, list(stack[:-1]), _merges(merges), self._store, self._pool)
            volume.head = await self._open_head(volume, stack[-1])
            volume.failure = failure or volume.head.damage
            if volume.head.damage:
                _log.error("volume %s is read-only: %s", name, volume.head.damage)
            volume.reclaim()
        except BaseException:
            await self._close(volume)
            raise
        self._views[key] = volume
        self._volumes[key] = _Writing(volume)

    async def open_snapshot(
        self, key: str, name: str, size: int, stack: Sequence[str], merges: Sequence[MergeNames]
    ) -> None:
        view = View(name, size, OwnerMap(size >> BLOCK_SHIFT), self._threads)
        try:
            await load_stack(view, list(stack), _merges(merges), self._store, self._pool)
        except BaseException:
            await self._close(view)
            raise
        self._views[key] = view

    async def close_view(self, key: str) -> None:
        await self._close(self.view(key))
        del self._views[key]
        self._volumes.pop(key, None)

    async def _close(self, view: View) -> None:
        view.closed = True
        view.stop_waiting()
        if isinstance(view, Volume):
            await view.quiesce()
            if hasattr(view, "head"):
                await view.mark_journal()
                view.head.close()
        await view.reads_before_now()
        for _, layer in view.stack:
            self._pool.release(layer)
        view.stack.clear()
        view.owners.close()

    async def _open_head(self, volume: Volume, layer: str) -> Head:
        slot = volume.push_layer(await self._pool.acquire(layer))
        opened = volume.stack[-1][1]
        blocks = volume.size >> BLOCK_SHIFT
        return await open_head(self._store, opened, slot, volume.owners, blocks)

    def _failed(self, key: str, why: str) -> None:
        if self._watcher is not None:
            self._watcher.failed(key, why)

    def _fetch(self, layer: str, first: int, end: int) -> None:
        if self._watcher is not None:
            self._watcher.wanted(self, layer, first, end)

    async def flush(self, key: str) -> None:
        await self.view(key).flush()

    async def record(self, key: str) -> None:
        await self.view(key).record()

    async def free_hidden(self, key: str, layer: str | None) -> None:
        await self._writing(key).volume.hidden.free(layer)

    async def grow(self, key: str, size: int) -> None:
        self._writing(key).volume.grow(size)

    async def count_owned(self, key: str) -> int:
        return await asyncio.to_thread(self.view(key).owners.count_owned)

    async def count_cells(
        self, key: str, blocks: int, cell_blocks: int, since: str | None
    ) -> LayerCells:
        return await count_cells(self.view(key), blocks, cell_blocks, since)

    async def list_changed(
        self, key: str, layers: Sequence[str], blocks: int
    ) -> list[tuple[int, int, bool]]:
        volume = self._writing(key).volume
        await volume.settle()
        # Held, so that the journal does not grow while it is read.
        async with volume.head.lock:
            touched = await touched_by(self._store, layers, blocks)
            try:
                for first, last, _ in volume.head.pending:
                    touched.set(first, last, 1)
                extents = changed_extents(touched, volume.owners)
            finally:
                touched.close()
        return [(extent.offset, extent.length, extent.zero) for extent in extents]

    async def check_journal(self, key: str) -> None:
        volume = self._writing(key).volume
        # Held, so that the journal does not grow while it is read.
        async with volume.head.lock:
            failed = volume.failure is not None
            await volume.head.check_journal(self._store, volume.owners.blocks, failed)

    # Snapshots

    async def settle(self, key: str) -> None:
        await self._writing(key).volume.settle()

    async def add_head(self, key: str, layer: str) -> None:
        writing = self._writing(key)
        volume = writing.volume
        head = None
        try:
            head = await self._open_head(volume, layer)
            written = list(volume.owners.touched_spans(0, volume.owners.blocks))
            await asyncio.to_thread(head.make_ready, written)
        except BaseException:
            if head is not None:
                head.close()
            if volume.slot_of(layer) is not None:
                self._pool.release(volume.drop_layer(layer))
            raise
        writing.next = head

    async def drop_head(self, key: str) -> None:
        writing = self._writing(key)
        head, writing.next = writing.next, None
        if head is not None:
            head.close()
            self._pool.release(writing.volume.drop_layer(head.layer.name))

    async def freeze(self, keys: Sequence[str]) -> None:
        for key in keys:
            writing = self._writing(key)
            if writing.thaw is None:
                writing.thaw = writing.volume.freeze()

    async def thaw(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._thaw(self._writing(key))

    def _thaw(self, writing: _Writing) -> None:
        if writing.thaw is not None:
            writing.thaw()
            writing.thaw = None

    async def swap_heads(self, keys: Sequence[str]) -> None:
        # The gate: no await between the first swap and the last.
        for key in keys:
            writing = self._writing(key)
            assert writing.next is not None
            writing.volume.commit_begins()
            writing.sealed = writing.volume.swap_head(writing.next)
            writing.next = None
            writing.durable = False
            self._thaw(writing)

    async def finish_seal(self, key: str) -> None:
        writing = self._writing(key)
        assert writing.sealed is not None
        if not writing.durable:
            await writing.volume.finish_seal(*writing.sealed)
            writing.durable = True

    async def fail(self, key: str, why: str) -> None:
        self._writing(key).volume.fail(why)

    async def end_commit(self, key: str) -> None:
        writing = self._writing(key)
        writing.volume.commit_ended()
        if writing.sealed is not None:
            writing.sealed[0].close()
            writing.sealed = None

    # Merges

    async def recall(self, layer: str) -> None:
        lenders = [view for view in self._views.values() if view.stop_lending(layer)]
        await asyncio.gather(*(view.wait_for_loans() for view in lenders))

    async def move(self, source: str, target: str, runs: Sequence[Run]) -> None:
        waits = []
        for view in self._views.values():
            new, old = view.slot_of(target), view.slot_of(source)
            if new is not None and old is not None:
                for first, last, _ in runs:
                    view.owners.replace(first, last, old, new)
                waits.append(view.reads_before_now())
        await asyncio.gather(*waits)

    async def follow_merge(self, source: str, target: str) -> None:
        for view in list(self._views.values()):
            new, old = view.slot_of(target), view.slot_of(source)
            if new is None or old is None:
                continue
            done = OwnerMap(view.size >> BLOCK_SHIFT)
            try:
                await apply_merge(self._store, target, done)
                for first, last in done.owned_runs(0, done.blocks):
                    view.owners.replace(first, last, old, new)
            finally:
                done.close()

    async def drop_layer(self, layer: str) -> None:
        for view in list(self._views.values()):
            if view.slot_of(layer) is not None:
                await view.reads_before_now()
                self._pool.release(view.drop_layer(layer))

    # Lazy layers

    def fetched(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        data = self._pool.lazy(layer)
        if data is not None:
            data.fetched(runs)

    def lost_again(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        data = self._pool.lazy(layer)
        if data is not None:
            data.lost(runs)

    def refused(self, layer: str, first: int, end: int, why: str) -> None:
        data = self._pool.lazy(layer)
        if data is not None:
            data.refused(first, end, why)

    async def complete(self, layer: str) -> None:
        data = self._pool.lazy(layer)
        if data is None:
            return
        holds = OwnerMap(data.lazy.blocks)
        try:
            await apply_layer(self._store, layer, holds)
            # From here on nothing can fail: it is done for all views, or for none.
            data.fetched(list(data.lazy.chunk_runs()))
            self._pool.replace_data(layer, data.data)
            for view in list(self._views.values()):
                slot = view.slot_of(layer)
                if slot is not None:
                    view.replace_data(layer, data.data)
                    await _disown(view, slot, data.lazy.claims, holds)
        finally:
            holds.close()


async def _disown(
    view: View, slot: int, claims: Iterable[tuple[int, int]], holds: OwnerMap
) -> None:
    """Let blocks that a layer claimed and does not hold be nobody's: they read as zeroes."""
    for first, last in claims:
        for start in range(first, last, REGION):
            end = min(last, start + REGION)
            for begin, stop in gaps(holds, start, end):
                view.owners.replace(begin, stop, slot, 0)
            await asyncio.sleep(0)


def _merges(names: Sequence[MergeNames]) -> dict[str, Merge]:
    return {target: Merge(lower, upper, target) for lower, upper, target in names}
