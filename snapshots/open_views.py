"""The book of what is open: which view, on which host, under which layers, for whom.

A view is opened when its first user comes and closed when the last one leaves: then its owner map's
memory is free again, and what is on disk is the truth anyway. ``stacks`` is held while a view is
opened or closed and while a merge changes what views must know, so none is built from half of a
change.

All views of one volume, its snapshots' included, are on one host while any is open; a volume that
opens goes to the host with the fewest. When a host is lost its views leave the book at once; who
used them finds out at the next call, and what is opened then is opened anew. Nobody knows whether
a sync had failed just before: what is cached of the volume's head is read from the disk again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.errors import StorageError, UnavailableError
from backends.layers import LayerStore
from snapshots.extent_log import Run
from snapshots.handle import Lease
from snapshots.head import create_head
from snapshots.host import HostLostError, MergeNames, ViewHost
from snapshots.layer import LayerPool
from snapshots.local_host import LocalHost
from snapshots.manifest import Manifest, Merge, Snapshot
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import OwnerMap
from snapshots.threads import Threads
from snapshots.view import View, load_stack

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class OpenView:
    """A view by its key, who uses it, and for whom; ``layers`` are those it may touch.

    ``yielding`` of its users let it be closed under them: they only look on, or wait until space
    has been given back below the head; ``frees`` says that there may be more of that.
    """

    key: str
    volume: str
    name: str
    host: ViewHost
    layers: set[str]
    ready: bool = False
    lost: bool = False
    users: int = 0
    yielding: int = 0
    frees: bool = False
    leases: set[Lease] = field(default_factory=set)
    empty: asyncio.Event = field(default_factory=asyncio.Event)


class OpenViews:
    """Views by the id of their volume or snapshot (see the module's text).

    ``pool`` and ``threads`` are this process's own: for merges, indexes and the host in it.
    """

    def __init__(
        self, store: LayerStore, manifests: ManifestStore, hosts: Sequence[ViewHost] = ()
    ) -> None:
        self.stacks = asyncio.Lock()
        self.threads = Threads()
        self.pool = LayerPool(store, writable=True)
        self.hosts = list(hosts) or [LocalHost(store, self.threads)]
        self._store = store
        self._manifests = manifests
        self._open: dict[str, OpenView] = {}
        self._leases: dict[Lease, tuple[OpenView, ...]] = {}
        # What is cached of a volume that failed may not be what is on disk, opened again or not.
        self._failures: dict[str, str] = {}
        self._lost_volumes: set[str] = set()
        self.orderly = True
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_wanted: Callable[[str, int, int], None] = lambda layer, first, end: None

    async def start(self) -> None:
        """Start the hosts."""
        for host in self.hosts:
            await host.start(self)

    # What hosts tell

    def lost(self, host: ViewHost) -> None:
        """The host's process has ended; nothing of its views is left."""
        gone = [view for view in self._open.values() if view.host is host]
        for view in gone:
            view.lost = True
            del self._open[view.key]
            if view.key == view.volume:
                self._lost_volumes.add(view.volume)
                # The next process that owns the store has to drop all that is cached as well.
                self.orderly = False
        if gone:
            names = ", ".join(sorted(view.name for view in gone))
            _log.error("closed with their worker: %s; what was not flushed may be lost", names)

    def wanted(self, host: ViewHost, layer: str, first: int, end: int) -> None:
        """Chunks of a lazy layer are wanted, or which are here (host.py)."""
        self.on_wanted(layer, first, end)

    def failed(self, key: str, why: str) -> None:
        """A volume stays read-only, however often it is opened again."""
        self._failures[key] = why

    def failures(self) -> Mapping[str, str]:
        """The ids of the volumes that are read-only after a failure, and why."""
        return self._failures

    def fail(self, manifest: Manifest, why: str) -> None:
        """Let a volume that is not open be read-only whenever it is opened from now on."""
        _log.error("volume %s is read-only from now on: %s", manifest.name, why)
        self.failed(manifest.id, why)

    # Looking up

    def get(self, key: str) -> OpenView | None:
        """The open view of a volume's or snapshot's id."""
        return self._open.get(key)

    def clients(self, key: str) -> int:
        """How many leases of a view are out."""
        found = self._open.get(key)
        return 0 if found is None else len(found.leases)

    def layers(self) -> set[str]:
        """Every layer that is open in some process of ours."""
        return self.pool.names().union(*(view.layers for view in self._open.values()))

    def open_volumes(self) -> list[str]:
        """The ids of the volumes that are open and can be called."""
        return [view.key for view in self._open.values() if view.key == view.volume and view.ready]

    def any_clients(self) -> bool:
        """Whether any lease is out."""
        return bool(self._leases)

    def volumes_on(self, host: ViewHost) -> int:
        """How many volumes have views on a host."""
        return len({view.volume for view in self._open.values() if view.host is host})

    # Opening and closing

    async def acquire_volume(self, manifest: Manifest) -> OpenView:
        """Open a volume, or share it; pair of ``release``."""
        async with self.stacks:
            found = self._open.get(manifest.id)
            if found is None:
                if manifest.id in self._lost_volumes:
                    await self._store.drop_cache(manifest.head)
                    self._lost_volumes.discard(manifest.id)
                stack = manifest.stack(manifest.head)
                found = self._enter(manifest.id, manifest.id, manifest.name, stack)
                await self._opened(
                    found,
                    found.host.open_volume(
                        manifest.id,
                        manifest.name,
                        manifest.size,
                        stack,
                        self._merges(stack),
                        self._failures.get(manifest.id),
                    ),
                )
            found.users += 1
            return found

    async def acquire_snapshot(self, manifest: Manifest, snapshot: Snapshot) -> OpenView:
        """Open a snapshot, or share it; pair of ``release``."""
        async with self.stacks:
            found = self._open.get(snapshot.id)
            if found is None:
                stack = manifest.stack(snapshot.layer)
                name = f"{manifest.name}@{snapshot.name}"
                found = self._enter(snapshot.id, manifest.id, name, stack)
                await self._opened(
                    found,
                    found.host.open_snapshot(
                        snapshot.id, name, snapshot.size, stack, self._merges(stack)
                    ),
                )
            found.users += 1
            return found

    def _enter(self, key: str, volume: str, name: str, stack: list[str]) -> OpenView:
        """Write a view into the book that is about to be opened: its layers are in use."""
        view = OpenView(key, volume, name, self._place(volume), set(stack))
        self._open[key] = view
        return view

    def _place(self, volume: str) -> ViewHost:
        views: dict[ViewHost, int] = {host: 0 for host in self.hosts if host.available}
        for view in self._open.values():
            if view.volume == volume:
                return view.host
            if view.host in views:
                views[view.host] += 1
        if not views:
            raise UnavailableError("the workers that serve volumes have all ended; try again")
        return min(views, key=lambda host: views[host])

    async def _opened(self, view: OpenView, opening: Coroutine[Any, Any, None]) -> None:
        try:
            await opening
            if view.lost:
                raise HostLostError(f"{view.name}: its worker has ended; try again")
        except BaseException:
            self._forget(view)
            raise
        view.ready = True

    def _merges(self, stack: list[str]) -> list[MergeNames]:
        """The merges under way that a stack must know of."""
        return [
            (merge.lower, merge.upper, merge.target)
            for merge in self._manifests.merges.values()
            if merge.upper in stack or merge.target in stack
        ]

    async def release(self, view: OpenView) -> None:
        """Undo one ``acquire``; the last one flushes and closes the view.

        Or it is closed a little later, when what its head hides has been given back.
        """
        view.users -= 1
        if view.users == 0:
            await self._flush(view)
            if view.frees and view.users == 0 and self._open.get(view.key) is view:
                view.frees = False
                self._free(view, None)
                return
            async with self.stacks:
                if view.users == 0 and self._open.get(view.key) is view:
                    await self._flush(view)
                    await self._close(view)

    async def acquire_to_look_on(self, manifest: Manifest) -> OpenView:
        """Open a volume, or share it, for calls that fail when it is closed meanwhile.

        HostLostError says that it was. Pair of ``release_looked_on``.
        """
        view = await self.acquire_volume(manifest)
        view.yielding += 1
        return view

    async def release_looked_on(self, view: OpenView) -> None:
        """Undo one ``acquire_to_look_on``."""
        view.yielding -= 1
        await self.release(view)

    async def discard(self, key: str) -> None:
        """Close a view that nobody reads or writes without flushing it."""
        async with self.stacks:
            view = self._open.get(key)
            if view is not None and view.users == view.yielding:
                await self._close(view)

    async def free_hidden(self, manifest: Manifest, layer: str) -> asyncio.Task[None]:
        """Give back what the head hides in its own ``layer`` (hidden.py); ends when that is done.

        The caller holds the commits, under which this takes effect.
        """
        view = await self.acquire_volume(manifest)
        view.users -= 1
        view.frees = True
        freeing = self._free(view, layer)
        await asyncio.sleep(0)  # the host is told while no snapshot can be taken
        return freeing

    def _free(self, view: OpenView, layer: str | None) -> asyncio.Task[None]:
        """Use the view until its host has given space back."""
        view.users += 1
        view.yielding += 1
        task = asyncio.get_running_loop().create_task(self._wait_until_freed(view, layer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _wait_until_freed(self, view: OpenView, layer: str | None) -> None:
        try:
            with contextlib.suppress(HostLostError):
                await view.host.free_hidden(view.key, layer)
        finally:
            view.yielding -= 1
            await self.release(view)

    async def withdraw(self, key: str) -> None:
        """Close a snapshot's view under those who compare with it: they get errors from now on."""
        async with self.stacks:
            view = self._open.get(key)
            if view is not None:
                assert not view.leases, "a client reads it"
                await self._close(view)

    async def _flush(self, view: OpenView) -> None:
        if self._open.get(view.key) is not view:
            return  # lost, or withdrawn
        try:
            await view.host.flush(view.key)
        except HostLostError:
            pass  # ``lost`` has said so
        except (OSError, StorageError) as error:
            _log.error("volume %s: what was not flushed before is lost: %s", view.name, error)

    async def _close(self, view: OpenView) -> None:
        """Close a view; ``stacks`` is held."""
        if not view.lost:
            with contextlib.suppress(HostLostError):
                await view.host.close_view(view.key)
        self._forget(view)

    def _forget(self, view: OpenView) -> None:
        if self._open.get(view.key) is view:
            del self._open[view.key]

    async def record_all(self) -> None:
        """Let every volume record which blocks it took; errors are its clients'."""

        async def record(host: ViewHost) -> None:
            for view in list(self._open.values()):
                if view.host is host and view.ready and not view.lost:
                    with contextlib.suppress(OSError, StorageError):
                        await host.record(view.key)

        await asyncio.gather(*map(record, self.hosts))

    async def close(self) -> None:
        """Flush and close every view, then the hosts."""
        for view in list(self._open.values()):
            await self._flush(view)
            async with self.stacks:
                await self._close(view)
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await self.stop()

    async def stop(self) -> None:
        """End the hosts, whatever is open."""
        await asyncio.gather(*(host.close() for host in self.hosts))
        self.threads.close()

    @contextlib.asynccontextmanager
    async def looking_at(self, manifest: Manifest, snapshot: Snapshot) -> AsyncIterator[View]:
        """A view of a snapshot in this process, for the caller alone, who holds the commits."""
        owners = OwnerMap(snapshot.size >> BLOCK_SHIFT)
        view = View(f"{manifest.name}@{snapshot.name}", snapshot.size, owners, self.threads)
        try:
            async with self.stacks:
                stack = manifest.stack(snapshot.layer)
                await load_stack(view, stack, self._manifests.merges, self._store, self.pool)
            yield view
        finally:
            for _, layer in view.stack:
                self.pool.release(layer)
            owners.close()

    # Clients

    async def add_lease(
        self,
        view: OpenView,
        manifest: Manifest,
        name: str,
        size: int,
        bases: Mapping[str, Snapshot],
        revoke: Callable[[], None],
    ) -> Lease:
        """Let a client have a view that the caller has acquired for it, or release it.

        ``bases`` are the snapshots that its metadata contexts compare with, by the contexts' names:
        their views are open until the lease ends.
        """
        opened: dict[str, OpenView] = {}
        try:
            for context, snapshot in bases.items():
                opened[context] = await self.acquire_snapshot(manifest, snapshot)
            if any(each.lost or each.host is not view.host for each in (view, *opened.values())):
                raise HostLostError(f"{name}: its worker has ended; try again")
            keys = {context: base.key for context, base in opened.items()}
            read_only = view.key != view.volume
            lease = view.host.lease(view.key, name, size, read_only, keys, revoke)
        except BaseException:
            for each in (*opened.values(), view):
                await self.release(each)
            raise
        view.leases.add(lease)
        view.empty.clear()
        self._leases[lease] = (view, *opened.values())
        return lease

    async def end_lease(self, lease: Lease) -> None:
        """A client is gone; release what was acquired for it."""
        view, *bases = self._leases.pop(lease)
        view.leases.discard(lease)
        if not view.leases:
            view.empty.set()
        for each in (*bases, view):
            await self.release(each)

    # Snapshots

    async def add_head(self, view: OpenView, layer: str) -> None:
        """Create a layer and open it as the next head; what fails leaves nothing behind."""
        view.layers.add(layer)
        try:
            await create_head(self._store, layer)
            await view.host.add_head(view.key, layer)
        except BaseException:
            await self._take_back(view, layer)
            raise

    async def remove_head(self, view: OpenView, layer: str) -> None:
        """Take back a head that never came to be the volume's, or whose host was lost."""
        if not view.lost:
            with contextlib.suppress(HostLostError):
                await view.host.drop_head(view.key)
        await self._take_back(view, layer)

    async def _take_back(self, view: OpenView, layer: str) -> None:
        view.layers.discard(layer)
        with contextlib.suppress(OSError):  # what is left the next start removes
            await self._store.delete_layer(layer)

    # Merges

    async def recall(self, merge: Merge) -> None:
        """Let nothing of a merge's source be lent; begun while ``stacks`` is held.

        Returns when all that was lent is back; UnavailableError.
        """
        hosts = self._hosts_of(merge.source)
        await _all_but_lost(host.recall(merge.source) for host in hosts)

    async def move(self, merge: Merge, runs: Sequence[Run]) -> None:
        """Blocks moved from a merge's source to its target, says its log already.

        Begun while ``stacks`` is held; returns when nothing reads them in the source any more.
        """
        hosts = self._hosts_of(merge.source)
        await _all_but_lost(host.move(merge.source, merge.target, runs) for host in hosts)

    async def follow_merge(self, merge: Merge) -> None:
        """Let open views know everything that a merge's log says; holds ``stacks``."""
        hosts = self._hosts_of(merge.source)
        await _all_but_lost(host.follow_merge(merge.source, merge.target) for host in hosts)

    async def drop_layer(self, layer: str) -> None:
        """Take a layer that owns no block any more out of all stacks; holds ``stacks``."""
        await _all_but_lost(host.drop_layer(layer) for host in self._hosts_of(layer))
        for view in self._open.values():
            view.layers.discard(layer)

    # Lazy layers

    def fetched(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        """Runs of chunks of a lazy layer are here."""
        for host in self._hosts_of(layer):
            host.fetched(layer, runs)

    def lost_again(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        """They were, but the disk failed to keep them."""
        for host in self._hosts_of(layer):
            host.lost_again(layer, runs)

    def refused(self, layer: str, first: int, end: int, why: str) -> None:
        """What of these chunks is not here does not come for now."""
        for host in self._hosts_of(layer):
            host.refused(layer, first, end, why)

    async def complete(self, layer: str) -> None:
        """A lazy layer has its index now; holds ``stacks``."""
        await _all_but_lost(host.complete(layer) for host in self._hosts_of(layer))

    def _hosts_of(self, layer: str) -> list[ViewHost]:
        """The hosts that have views with a layer."""
        views = [view for view in self._open.values() if layer in view.layers]
        return [host for host in self.hosts if any(view.host is host for view in views)]


async def _all_but_lost(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for calls to several hosts; one that was lost has no views left to be told."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, HostLostError):
            raise result
