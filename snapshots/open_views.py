"""The volumes and snapshots that are open, each once, and the layers under them.

A view is built when its first user comes and closed when the last one leaves: then its owner map's
memory is free again, and what is on disk is the truth anyway. ``stacks`` is held while a view
is built or closed and while a merge changes what views must know, so none is built from half
of a change.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from backends.errors import StorageError
from backends.layers import LayerStore
from snapshots.handle import Handle
from snapshots.head import Head, create_head, open_head
from snapshots.layer import LayerPool, apply_merge
from snapshots.manifest import Manifest, Merge, Snapshot
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import OwnerMap
from snapshots.threads import Threads
from snapshots.view import View, load_stack
from snapshots.volume import Volume

_log = logging.getLogger(__name__)


@dataclass
class OpenView:
    """A view, who uses it, and for whom."""

    view: View
    users: int = 0
    handles: set[Handle] = field(default_factory=set)
    empty: asyncio.Event = field(default_factory=asyncio.Event)


class OpenViews:
    """Views by the id of their volume or snapshot (see the module's text)."""

    def __init__(self, store: LayerStore, manifests: ManifestStore) -> None:
        self.stacks = asyncio.Lock()
        self.threads = Threads()
        self.pool = LayerPool(store, writable=True)
        self._store = store
        self._manifests = manifests
        self._open: dict[str, OpenView] = {}
        # What is cached of a volume that failed may not be what is on disk, opened again or not.
        self._failures: dict[str, str] = {}

    def get(self, key: str) -> OpenView | None:
        """The open view of a volume's or snapshot's id."""
        return self._open.get(key)

    def ids(self) -> list[str]:
        """The ids of what is open."""
        return list(self._open)

    def views(self) -> list[View]:
        """Every view that is open."""
        return [found.view for found in self._open.values()]

    def clients(self, key: str) -> int:
        """How many handles of a view are open."""
        found = self._open.get(key)
        return 0 if found is None else len(found.handles)

    async def acquire_volume(self, manifest: Manifest) -> Volume:
        """Open a volume, or share it; pair of ``release``."""
        async with self.stacks:
            found = self._open.get(manifest.id)
            if found is None:
                found = OpenView(await self._build_volume(manifest))
                self._open[manifest.id] = found
            found.users += 1
            assert isinstance(found.view, Volume)
            return found.view

    async def acquire_snapshot(self, manifest: Manifest, snapshot: Snapshot) -> View:
        """Open a snapshot, or share it; pair of ``release``."""
        async with self.stacks:
            found = self._open.get(snapshot.id)
            if found is None:
                found = OpenView(await self.build_snapshot(manifest, snapshot))
                self._open[snapshot.id] = found
            found.users += 1
            return found.view

    async def release(self, key: str) -> None:
        """Undo one ``acquire``; the last one flushes and closes the view."""
        found = self._open[key]
        found.users -= 1
        if found.users == 0:
            await _flush(found.view)
            async with self.stacks:
                if found.users == 0 and self._open.get(key) is found:
                    await _flush(found.view)
                    await self.close_view(found.view)
                    self._note_failure(key, found.view)
                    del self._open[key]

    def add_handle(self, key: str, handle: Handle) -> None:
        """Note a client; the caller has acquired the view for it."""
        self._open[key].handles.add(handle)
        self._open[key].empty.clear()

    async def close_handle(self, key: str, handle: Handle) -> None:
        """A client is gone; release what was acquired for it."""
        found = self._open[key]
        found.handles.discard(handle)
        if not found.handles:
            found.empty.set()
        await self.release(key)

    async def discard(self, key: str) -> None:
        """Close a view that nobody uses without flushing it."""
        async with self.stacks:
            found = self._open.get(key)
            if found is not None and found.users == 0:
                del self._open[key]
                await self.close_view(found.view)
                self._note_failure(key, found.view)

    def _note_failure(self, key: str, view: View) -> None:
        if isinstance(view, Volume) and view.failure:
            self._failures[key] = view.failure

    async def _build_volume(self, manifest: Manifest) -> Volume:
        owners = OwnerMap(manifest.size >> BLOCK_SHIFT)
        volume = Volume(manifest.name, manifest.size, owners, self.threads, self._store)
        try:
            stack = manifest.stack(manifest.head)
            await load_stack(volume, stack[:-1], self._manifests.merges, self._store, self.pool)
            volume.head = await self.open_head(volume, manifest.head)
            volume.failure = self._failures.get(manifest.id)
        except BaseException:
            await self.close_view(volume)
            raise
        return volume

    async def build_snapshot(self, manifest: Manifest, snapshot: Snapshot) -> View:
        """A view of a snapshot that the caller closes; ``stacks`` must be held."""
        owners = OwnerMap(snapshot.size >> BLOCK_SHIFT)
        view = View(f"{manifest.name}@{snapshot.name}", snapshot.size, owners, self.threads)
        try:
            stack = manifest.stack(snapshot.layer)
            await load_stack(view, stack, self._manifests.merges, self._store, self.pool)
        except BaseException:
            await self.close_view(view)
            raise
        return view

    async def open_head(self, volume: Volume, layer: str) -> Head:
        """Open a layer as a head on top of ``volume``'s stack."""
        slot = volume.push_layer(await self.pool.acquire(layer))
        opened = volume.stack[-1][1]
        blocks = volume.size >> BLOCK_SHIFT
        return await open_head(self._store, opened, slot, volume.owners, blocks)

    async def add_head(self, volume: Volume, layer: str) -> Head:
        """Create a layer and open it as the next head; what fails leaves nothing behind."""
        try:
            await create_head(self._store, layer)
            return await self.open_head(volume, layer)
        except BaseException:
            if volume.slot_of(layer) is not None:
                self.pool.release(volume.drop_layer(layer))
            await self._store.delete_layer(layer)
            raise

    async def remove_head(self, volume: Volume, head: Head) -> None:
        """Take back a head that never came to be the volume's."""
        head.close()
        self.pool.release(volume.drop_layer(head.layer.name))
        await self._store.delete_layer(head.layer.name)

    async def close_view(self, view: View) -> None:
        """Close a view that no client can reach any more."""
        if isinstance(view, Volume):
            await view.quiesce()
            if hasattr(view, "head"):
                view.head.close()
        await view.reads_before_now()
        for _, layer in view.stack:
            self.pool.release(layer)
        view.stack.clear()
        view.owners.close()

    async def follow_merge(self, merge: Merge) -> None:
        """Make open views know everything that the merge log of a merge says; holds ``stacks``."""
        for view in self.views():
            target = view.slot_of(merge.target)
            source = view.slot_of(merge.source)
            if target is None or source is None:
                continue
            done = OwnerMap(view.size >> BLOCK_SHIFT)
            try:
                await apply_merge(self._store, merge.target, done)
                for first, last in done.owned_runs(0, done.blocks):
                    view.owners.replace(first, last, source, target)
            finally:
                done.close()

    async def close(self) -> None:
        """Flush and close every view."""
        for key, found in list(self._open.items()):
            await _flush(found.view)
            async with self.stacks:
                if self._open.pop(key, None) is not None:
                    await self.close_view(found.view)
        self.threads.close()


async def _flush(view: View) -> None:
    try:
        await view.flush()
    except (OSError, StorageError) as error:
        _log.error("volume %s: what was not flushed before is lost: %s", view.name, error)
