"""The catalogue: every operation on the volumes and snapshots of one data directory.

One process owns a data directory and one ``Catalogue`` serves it, on one event loop. Operations
that commit a manifest take turns (``_commits``); clients' reads and writes never wait for that.
What an operation commits is durable when it returns; when it fails, the volume is as it was. One
that has begun goes on to its end even when the caller is cancelled: none is left half done.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from backends.errors import (
    CorruptError,
    ExistsError,
    InUseError,
    InvalidError,
    NotFoundError,
    StorageError,
    UnavailableError,
    one_line,
)
from backends.layers import LayerStore, Space
from snapshots.checking import Checker, CheckReport
from snapshots.comparing import Comparison, compare_snapshots, compare_with_now
from snapshots.contexts import base_of, context_names
from snapshots.fetcher import Fetcher
from snapshots.freeing import Freeing
from snapshots.handle import Lease
from snapshots.head import create_head
from snapshots.host import HostLostError, ViewHost
from snapshots.hydration import Hydration, HydrationInfo
from snapshots.imports import Imports, KeptRestore
from snapshots.lazy import LazyLayer, create_lazy
from snapshots.limits import Limits
from snapshots.listings import Listings, SnapshotInfo, VolumeInfo, WorkerInfo
from snapshots.manifest import MAX_LAYERS, Manifest, Snapshot
from snapshots.manifest_store import ManifestStore, UnreadableVolume
from snapshots.mapping import Maps, VolumeMap
from snapshots.merge import Pace
from snapshots.merging import Merging
from snapshots.names import check_name, check_volume_size
from snapshots.open_views import OpenViews
from snapshots.pins import Pins
from snapshots.reservations import Reservations, check_reserve
from snapshots.sealing import Sealing
from snapshots.space import SpaceAccount
from snapshots.space_watch import SpaceWarning
from snapshots.transfer import Import, Origin, Pin
from snapshots.upkeep import Upkeep
from snapshots.wiping import Deleted, Wipe, Wiping

_log = logging.getLogger(__name__)

_REVOKE_SECONDS = 30

Progress = Callable[[int, int], None]
P = ParamSpec("P")
T = TypeVar("T")


def _to_its_end(
    operation: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Run a coroutine function in a task of its own, which a cancelled caller does not stop."""

    @functools.wraps(operation)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.shield(asyncio.create_task(operation(*args, **kwargs)))

    return run


class Catalogue:
    """See the module's text; made by ``open``, ended by ``close``."""

    def __init__(
        self, store: LayerStore, hosts: Sequence[ViewHost] = (), fetcher: Fetcher | None = None
    ) -> None:
        self._store = store
        self._manifests = ManifestStore(store)
        self._views = OpenViews(store, self._manifests, hosts)
        self._commits = asyncio.Lock()
        self._pins = Pins(self._unpinned)
        lazy: set[str] = set()
        self._merging = Merging(
            store, self._manifests, self._views, self._commits, self._pins, lazy
        )
        self._hydration = Hydration(
            store, self._manifests, self._views, self._commits, fetcher, lazy
        )
        self._hydration.on_whole = self._is_whole
        self._sealing = Sealing(store, self._manifests, self._views, self._merging)
        self._listings = Listings(store, self._manifests, self._views, self._hydration)
        self._maps = Maps(store, self._manifests, self._views, self._turn)
        self._imports = Imports(store, self._manifests)
        self.space = SpaceAccount(store, self._manifests, self._imports.size)
        self._reservations = Reservations(store, self._manifests)
        self._freeing = Freeing(self._manifests, self._views, self._commits, self._merging)
        self._wiping = Wiping(
            store,
            self._manifests,
            self._commits,
            self._views.threads,
            lambda: self._merging.in_use() | self._hydration.ending,
            self._merging.settled,
            self._views.any_clients,
        )
        self._upkeep = Upkeep(
            store,
            self._manifests,
            self._views,
            self._merging,
            self._freeing,
            self.space,
            self._wiping,
            self._reservations,
            self._commits,
        )
        self._upkeep_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def open(
        cls, store: LayerStore, hosts: Sequence[ViewHost] = (), fetcher: Fetcher | None = None
    ) -> Catalogue:
        """Own the store and read its manifests; InUseError, CorruptError.

        Volumes are opened on ``hosts``, by default in this process. What lazy volumes lack comes
        through ``fetcher``, from ``hydrate`` on.
        """
        await store.lock()
        catalogue = cls(store, hosts, fetcher)
        try:
            await catalogue._manifests.load()
            await catalogue._imports.start()
            await catalogue._hydration.start()
            await catalogue._upkeep.start()
            await catalogue._views.start()
        except BaseException:
            await catalogue._views.stop()
            await store.unlock()
            raise
        catalogue._upkeep.resume()
        catalogue._upkeep_task = asyncio.create_task(catalogue._upkeep.run())
        return catalogue

    async def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._freeing.stop()
        await self._hydration.stop()
        await self._merging.stop()
        await self._wiping.stop()
        if self._upkeep_task is not None:
            self._upkeep_task.cancel()
            await asyncio.gather(self._upkeep_task, return_exceptions=True)
        async with self._commits:
            orderly = False
            try:
                await self._views.close()
                orderly = self._views.orderly
                await self._imports.leave_all()
                await self._merging.drop_condemned()
            finally:
                await self._store.unlock(orderly=orderly)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Hold ``_commits``; what still waits when the catalogue closes is refused."""
        async with self._commits:
            if self._closed:
                raise UnavailableError("nbdserve is shutting down")
            yield

    def set_pace(self, pace: Pace) -> None:
        """Let merges call ``pace`` after each chunk, with the seconds that it took."""
        self._merging.pace = pace

    # Lazy volumes

    def hydrate(self) -> None:
        """Fetch what lazy volumes lack, from now on."""
        self._hydration.resume()

    @_to_its_end
    async def restore_lazily(
        self,
        name: str,
        url: str,
        volume: str,
        snapshot: str,
        rate: int | None = None,
        *,
        force: bool = False,
    ) -> VolumeInfo:
        """Make a volume from a snapshot in a repository, whose data comes when it is read.

        And by and by: ``rate`` bounds how many bytes of that in a second; None does not, 0 is none.
        """
        async with self._turn():
            self._check_free(name)
        record = await self._hydration.find(url, volume, snapshot, rate)
        try:
            check_volume_size(record.size)
            async with self._turn():
                self._check_free(name)
                await self._check_space(name, record.size, force)
                return await self._create_lazy(name, record)
        except BaseException:
            # A volume that may be found at the next start needs the snapshot.
            if self._manifests.in_doubt is None:
                with contextlib.suppress(StorageError):
                    await self._hydration.give_up(record)
            raise

    @_to_its_end
    async def set_hydration_rate(self, name: str, rate: int | None) -> VolumeInfo:
        """Change that rate; does nothing when the volume is whole."""
        async with self._turn():
            manifest = self._manifests.get(name)
            await self._hydration.set_rate(manifest, rate)
            return await self._listings.volume_if_readable(manifest)

    def hydration(self, name: str) -> HydrationInfo | None:
        """How far a lazy volume is; None: it is whole. NotFoundError."""
        return self._hydration.info(self._manifests.get(name))

    def hydrations(self) -> dict[str, HydrationInfo]:
        """The same of all volumes that are not whole, by name."""
        found = {name: self.hydration(name) for name in self.volume_names()}
        return {name: info for name, info in found.items() if info is not None}

    def _is_whole(self, layer: str) -> None:
        for manifest in self._manifests.uses(layer):
            self._listings.forget(manifest.id)
        self._merging.resume()

    # Volumes

    def volume_names(self) -> list[str]:
        """The names of all volumes, in order."""
        return sorted(manifest.name for manifest in self._manifests.volumes.values())

    def volume_names_by_id(self) -> dict[str, str | None]:
        """The name of each volume by its id, of those too that cannot be read (None: unknown)."""
        lost = {volume.id: volume.name for volume in self._manifests.unreadable.values()}
        return {**lost, **{volume.id: volume.name for volume in self._manifests.volumes.values()}}

    def volume_id(self, name: str) -> str:
        """The id of a volume, also of one that cannot be read; NotFoundError."""
        for identifier, found in self.volume_names_by_id().items():
            if found == name:
                return identifier
        raise NotFoundError(f"volume {name} does not exist")

    def names_of(self, keys: Iterable[str]) -> dict[str, tuple[str, str | None]]:
        """The volume, and its snapshot if it is one, of each of these ids that there is."""
        wanted = set(keys)
        volumes = self._manifests.volumes
        found: dict[str, tuple[str, str | None]] = {
            key: (volumes[key].name, None) for key in wanted & volumes.keys()
        }
        wanted -= found.keys()
        if wanted:
            for manifest in volumes.values():
                for snapshot in manifest.snapshots:
                    if snapshot.id in wanted:
                        found[snapshot.id] = (manifest.name, snapshot.name)
        return found

    def export_keys(self, name: str) -> list[str]:
        """The ids of a volume and its snapshots; NotFoundError."""
        manifest = self._manifests.get(name)
        return [manifest.id, *(snapshot.id for snapshot in manifest.snapshots)]

    def volume_limits(self, name: str) -> Limits | None:
        """A volume's own limits; None: what the configuration says holds. NotFoundError."""
        return self._manifests.get(name).limits

    @_to_its_end
    async def set_limits(self, name: str, limits: Limits | None) -> None:
        """Give a volume limits of its own, or none of its own."""
        async with self._turn():
            manifest = self._manifests.get(name)
            if manifest.limits != limits:
                await self._manifests.commit([manifest.changed(limits=limits)])

    def merges(self) -> int:
        """How many merges are under way or put off."""
        return len(self._manifests.merges)

    def failures(self) -> dict[str, str]:
        """The volumes that refuse writes until the daemon is restarted, by name, and why."""
        found = self._views.failures()
        volumes = self._manifests.volumes
        return {volumes[key].name: why for key, why in found.items() if key in volumes}

    def volume_size(self, name: str) -> int:
        """Size of a volume in bytes; NotFoundError."""
        return self._manifests.get(name).size

    def volume_contexts(self, name: str) -> tuple[str, ...]:
        """The metadata contexts of a volume and its snapshots (contexts.py). NotFoundError."""
        return context_names(snapshot.name for snapshot in self._manifests.get(name).snapshots)

    async def list_volumes(self) -> list[VolumeInfo]:
        """All volumes that can be read, by name."""
        return (await self.survey_volumes())[0]

    @_to_its_end
    async def survey_volumes(self) -> tuple[list[VolumeInfo], list[UnreadableVolume]]:
        """All volumes by name: those that can be read, and those that cannot."""
        found: list[VolumeInfo] = []
        unreadable = list(self._manifests.unreadable.values())
        async with self._turn():
            for name in self.volume_names():
                manifest = self._manifests.get(name)
                try:
                    found.append(await self._listings.volume(manifest))
                except (OSError, CorruptError, NotFoundError) as error:
                    unreadable.append(UnreadableVolume(manifest.id, name, one_line(error)))
        return found, unreadable

    @_to_its_end
    async def show_volume(self, name: str) -> VolumeInfo:
        """One volume."""
        async with self._turn():
            return await self._listings.volume(self._manifests.get(name))

    @_to_its_end
    async def create_volume(
        self, name: str, size: int, *, reserve: int = 0, force: bool = False
    ) -> VolumeInfo:
        """Make a volume of ``size`` bytes that reads as zeroes; ``reserve``: see reservations.py.

        ``force``, here and below: although more is provisioned then than the policy allows.
        """
        check_volume_size(size)
        async with self._turn():
            self._check_free(name)
            await self._check_space(name, size, force)
            return await self._create(name, size, "", {}, reserve)

    @_to_its_end
    async def clone_volume(
        self,
        name: str,
        source: str,
        snapshot: str,
        size: int | None = None,
        *,
        reserve: int = 0,
        force: bool = False,
    ) -> VolumeInfo:
        """Make a volume that begins as a snapshot, sharing its layers; it may be larger."""
        async with self._turn():
            self._check_free(name)
            manifest = self._manifests.get(source)
            found = _find(manifest, snapshot)
            if size is None:
                size = found.size
            check_volume_size(size)
            if size < found.size:
                raise InvalidError(
                    f"size {size} is smaller than the snapshot's {found.size}: a clone cannot be"
                )
            self._check_layers(source, manifest.stack(found.layer))
            await self._check_space(name, size, force)
            return await self._create(name, size, found.layer, manifest.parents, reserve)

    @_to_its_end
    async def resize_volume(self, name: str, size: int, *, force: bool = False) -> VolumeInfo:
        """Make a volume larger; the new part reads as zeroes.

        Clients may use it at once; those that do not ask again see it on reconnecting.
        """
        check_volume_size(size)
        async with self._turn():
            manifest = self._manifests.get(name)
            if size < manifest.size:
                raise InvalidError(
                    f"volume {name} has {manifest.size} bytes and cannot be made smaller: data"
                    " behind the new end would be lost; create a smaller volume and copy"
                )
            if size > manifest.size:
                await self.space.check_provisioned(name, size - manifest.size, force)
                await self._manifests.commit([manifest.changed(size=size)])
                opened = self._views.get(manifest.id)
                if opened is not None:
                    with contextlib.suppress(HostLostError):
                        await opened.host.grow(opened.key, size)
            return await self._listings.volume_if_readable(self._manifests.get(name))

    @_to_its_end
    async def reserve_space(self, name: str, reserve: int) -> VolumeInfo:
        """Reserve so many bytes for a volume from now on (reservations.py); 0 is none."""
        async with self._turn():
            await self._reservations.change(self._manifests.get(name), reserve)
            return await self._listings.volume_if_readable(self._manifests.get(name))

    @_to_its_end
    async def rename_volume(self, old: str, new: str) -> VolumeInfo:
        """Give a volume another name; clients that have it open keep it."""
        async with self._turn():
            manifest = self._manifests.get(old)
            if old != new:
                self._check_free(new)
                await self._manifests.commit([manifest.changed(name=new)])
            return await self._listings.volume_if_readable(self._manifests.get(new))

    @_to_its_end
    async def delete_volume(
        self,
        name: str,
        with_snapshots: bool = False,
        *,
        wipe: bool = False,
        progress: Progress | None = None,
    ) -> Deleted:
        """Remove a volume; with its snapshots only when asked to. Or a half restored one.

        With ``wipe`` what no other volume uses is overwritten before it is given back (wiping.py);
        progress in bytes. The volume is gone as soon as that is committed; a wipe that is
        interrupted goes on later by itself. For a deleted volume whose wipe has failed it begins
        anew, or without ``wipe`` is given up.
        """
        async with self._turn():
            deleted = await self._delete_volume(name, with_snapshots, wipe)
        self._merging.resume()
        if wipe:
            deleted = replace(deleted, wiped=await self._wiping.wipe_now(name, progress))
        return deleted

    def wiping(self) -> list[Wipe]:
        """Deleted volumes that are being wiped, or cannot be."""
        return self._wiping.wipes()

    def warnings(self, space: Space) -> list[SpaceWarning]:
        """What an operator should know, ``space`` being what is there."""
        return self.space.warnings(space) + self._reservations.warnings() + self._wiping.warnings()

    # Snapshots

    @_to_its_end
    async def create_snapshots(
        self, targets: Sequence[tuple[str, str]], labels: Mapping[str, str] | None = None
    ) -> list[SnapshotInfo]:
        """Take a snapshot of each (volume, snapshot name), all at one instant, all or none."""
        if not targets:
            raise InvalidError("no snapshot was named")
        if len({volume for volume, _ in targets}) != len(targets):
            raise InvalidError("a volume is named twice: one snapshot each is possible at a time")
        async with self._turn():
            manifests = [self._manifests.get(volume) for volume, _ in targets]
            for manifest, (volume, name) in zip(manifests, targets, strict=True):
                check_name("snapshot", name)
                if manifest.find(name):
                    raise ExistsError(f"snapshot {volume}@{name} exists already")
                self._check_layers(volume, manifest.stack(manifest.head))
            await self.space.check_free("a snapshot")
            await self._reservations.prepare(manifests)
            created = time.time()
            snapshots = [
                Snapshot(
                    name,
                    secrets.token_hex(16),
                    manifest.size,
                    created,
                    manifest.head,
                    dict(labels or {}),
                )
                for manifest, (_, name) in zip(manifests, targets, strict=True)
            ]
            # Below a head that is sealed now, its own layer stands for nothing any more.
            mergeable = any(map(self._manifests.own_layer, manifests))
            await self._sealing.seal(manifests, snapshots)
            if mergeable:
                self._merging.resume()
            return [
                self._listings.snapshot(self._manifests.volumes[manifest.id], snapshot)
                for manifest, snapshot in zip(manifests, snapshots, strict=True)
            ]

    def list_snapshots(self, volume: str | None = None) -> list[SnapshotInfo]:
        """Snapshots of one volume or of all, the oldest of each volume first."""
        if volume is None:
            manifests = sorted(self._manifests.volumes.values(), key=lambda found: found.name)
        else:
            manifests = [self._manifests.get(volume)]
        return [
            self._listings.snapshot(manifest, snapshot)
            for manifest in manifests
            for snapshot in manifest.snapshots
        ]

    @_to_its_end
    async def delete_snapshot(
        self, volume: str, snapshot: str, progress: Progress | None = None
    ) -> None:
        """Remove a snapshot, then merge its layer with its neighbour; progress in bytes moved.

        The snapshot is gone as soon as that is committed; a merge that is interrupted, or that
        must wait for a pinned snapshot, goes on later by itself. Refused while a client has the
        snapshot open; one that only compares with it gets errors for that from now on.
        """
        async with self._turn():
            manifest = self._manifests.get(volume)
            found = _find(manifest, snapshot)
            if self._views.clients(found.id):
                raise InUseError(f"snapshot {volume}@{snapshot} is open; disconnect its clients")
            if self._pins.holds(found.id):
                raise InUseError(f"snapshot {volume}@{snapshot} is being pushed; try again later")
            rest = tuple(other for other in manifest.snapshots if other is not found)
            without = manifest.changed(snapshots=rest)
            await self._manifests.commit([without])
            # Before any of its layers is merged: whoever compares would miss changes.
            await self._views.withdraw(found.id)
            await self._merging.drop_condemned()
            self._hydration.prune()
        try:
            await self._merging.merge_now(progress)
        finally:
            await self._freeing.free(manifest.id)
            dropped = manifest.parents.keys() - without.parents.keys()
            if dropped:
                self._start(self._freeing.free_shared(dropped))

    @_to_its_end
    async def rollback(self, volume: str, snapshot: str, force: bool = False) -> VolumeInfo:
        """Make a volume what it was at a snapshot; what was written since is gone.

        Refused while clients have it open, unless forced, which disconnects them. Later snapshots
        stay.
        """
        async with self._turn():
            manifest = self._manifests.get(volume)
            found = _find(manifest, snapshot)
            self._check_layers(volume, manifest.stack(found.layer))
            clients = self._views.clients(manifest.id)
            if clients and not force:
                raise InUseError(
                    f"volume {volume} is open by {clients} client{'s' if clients > 1 else ''};"
                    " disconnect them, or force the rollback"
                )
            self._manifests.check()
            layer = secrets.token_hex(8)
            try:
                await create_head(self._store, layer)
                await self._disconnect(manifest)
                parents = {**manifest.parents, layer: found.layer}
                new = manifest.changed(head=layer, size=found.size, parents=parents)
                await self._manifests.commit([new])
            except BaseException:
                await self._take_back(layer)
                self._refuse_writes_in_doubt(manifest, "rollback")
                raise
            self._listings.forget(manifest.id)
            await self._merging.drop_condemned()
            self._hydration.prune()
            await self._reservations.keep()
            info = await self._listings.volume_if_readable(self._manifests.get(volume))
        self._merging.resume()
        return info

    @_to_its_end
    async def diff(self, volume: str, older: str, newer: str | None = None) -> Comparison:
        """What may differ between two snapshots, or between a snapshot and now (None)."""
        async with self._turn():
            manifest = self._manifests.get(volume)
            old = _find(manifest, older)
            if newer is None:
                return await compare_with_now(self._views, manifest, old)
            new = _find(manifest, newer)
            return await compare_snapshots(self._store, self._views, manifest, old, new)

    @_to_its_end
    async def map_volume(self, name: str, cells: int, label: str) -> VolumeMap:
        """Which layer holds which part of a volume, in at most ``cells`` (mapping.py).

        And what was written since the last snapshot that has ``label``. NotFoundError.
        """
        return await self._maps.map(name, cells, label)

    # Checking

    async def check_directory(
        self, volume: str | None, repair: bool = False, progress: Progress | None = None
    ) -> CheckReport:
        """Check one volume or everything (checking.py); progress in layers. NotFoundError."""
        checker = Checker(
            self._store, self._quiet, self._manifests, self._merging.in_use, self._check_head
        )
        return await checker.run(volume, repair, progress)

    @contextlib.asynccontextmanager
    async def _quiet(self) -> AsyncIterator[None]:
        async with self._turn(), self._views.stacks:
            yield

    async def _check_head(self, volume: str) -> bool:
        view = self._views.get(volume)
        if view is None:
            return False
        await view.host.check_journal(view.key)
        return True

    # Clients

    def list_workers(self) -> list[WorkerInfo]:
        """The processes that serve volumes."""
        return self._listings.workers()

    async def open_volume(
        self, name: str, revoke: Callable[[], None], contexts: Sequence[str] = ()
    ) -> Lease:
        """Open a volume for a client; ``revoke`` asks the client to close it. NotFoundError.

        ``contexts`` are the metadata contexts that the client is going to ask about.
        """
        return await self._opened(self._open_volume(name, revoke, contexts))

    async def open_snapshot(
        self,
        volume: str,
        snapshot: str,
        revoke: Callable[[], None],
        contexts: Sequence[str] = (),
    ) -> Lease:
        """Open a snapshot for a client, read-only, in the same way. NotFoundError."""
        return await self._opened(self._open_snapshot(volume, snapshot, revoke, contexts))

    async def _opened(self, opening: Coroutine[Any, Any, Lease]) -> Lease:
        """What ``opening`` opens; when the caller is cancelled, it is closed again."""
        task = asyncio.create_task(opening)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._close_unclaimed)
            raise

    def _close_unclaimed(self, opening: asyncio.Task[Lease]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._start(self.close_export(opening.result()))

    async def _open_volume(
        self, name: str, revoke: Callable[[], None], contexts: Sequence[str]
    ) -> Lease:
        async with self._turn():
            manifest = self._manifests.get(name)
            bases = _bases(manifest, contexts)
            view = await self._views.acquire_volume(manifest)
            self._listings.forget(manifest.id)
            lease = await self._views.add_lease(view, manifest, name, manifest.size, bases, revoke)
            await self._freeing.begin(manifest.id)
            return lease

    async def _open_snapshot(
        self, volume: str, snapshot: str, revoke: Callable[[], None], contexts: Sequence[str]
    ) -> Lease:
        async with self._turn():
            manifest = self._manifests.get(volume)
            found = _find(manifest, snapshot)
            bases = _bases(manifest, contexts)
            view = await self._views.acquire_snapshot(manifest, found)
            name = f"{volume}@{snapshot}"
            return await self._views.add_lease(view, manifest, name, found.size, bases, revoke)

    @_to_its_end
    async def close_export(self, lease: Lease) -> None:
        """A client is done with what it opened."""
        if not self._closed:  # else it was closed with everything else
            await self._views.end_lease(lease)

    # Other processes

    @_to_its_end
    async def pin(self, volume: str, snapshot: str) -> Pin:
        """Keep a snapshot's layers as they are until the pin is released, and describe them."""
        async with self._turn():
            manifest = self._manifests.get(volume)
            found = _find(manifest, snapshot)
            self._hydration.check_whole(manifest, found.layer, f"snapshot {volume}@{snapshot}")
            pin = self._pins.add(manifest, found)
        try:
            await self._merging.wait_for_pins()
        except BaseException:
            pin.release()
            raise
        self._pins.complete(pin, self._manifests.merges.values())
        return pin

    @_to_its_end
    async def begin_import(
        self, volume: str, size: int, origin: Origin | None = None, *, force: bool = False
    ) -> Import:
        """Make a layer for another process to fill, and keep the volume's name for it.

        One that was begun with the same ``origin`` and given up is gone on with.
        """
        check_volume_size(size)
        async with self._turn():
            self._check_name_free(volume)
            if volume not in self._imports.kept:
                await self._check_space(volume, size, force)
            return await self._imports.begin(volume, size, origin)

    def half_restored(self) -> list[KeptRestore]:
        """Restores that can be gone on with, by name."""
        return [kept for _, kept in sorted(self._imports.kept.items())]

    @_to_its_end
    async def commit_import(self, imported: Import) -> VolumeInfo:
        """Turn a filled layer into the volume."""
        async with self._turn():
            return await self._listings.volume_if_readable(await self._imports.commit(imported))

    @_to_its_end
    async def discard_import(self, imported: Import) -> None:
        """Give up an import; what can be gone on with is kept. One that was committed stays."""
        async with self._turn():
            await self._imports.leave(imported)
            await self._merging.drop_condemned()

    # Steps; the caller holds ``_commits``

    async def _create(
        self, name: str, size: int, below: str, parents: Mapping[str, str], reserve: int
    ) -> VolumeInfo:
        check_reserve(reserve, size)
        self._manifests.check()
        layer = secrets.token_hex(8)
        try:
            await create_head(self._store, layer)
            manifest = Manifest(
                _new_id(),
                name,
                size,
                time.time(),
                0,
                layer,
                {**parents, layer: below},
                reserve=reserve,
            ).changed()
            await self._reservations.prepare([manifest])
            await self._manifests.commit([manifest])
        except BaseException:
            await self._take_back(layer)
            raise
        return await self._listings.volume_if_readable(manifest)

    async def _delete_volume(self, name: str, with_snapshots: bool, wipe: bool) -> Deleted:
        if self._manifests.find(name) is None and await self._delete_rest(name, wipe):
            return Deleted(name)
        manifest = self._manifests.get(name)
        self._check_unused(manifest)
        if manifest.snapshots and not with_snapshots:
            count = len(manifest.snapshots)
            raise InUseError(
                f"volume {name} has {count} snapshot{'s' if count > 1 else ''}; delete them"
                " first, or ask for the volume to be deleted with its snapshots"
            )
        self._manifests.check()
        deleted = await self._describe_deletion(manifest) if wipe else Deleted(name)
        await self._views.discard(manifest.id)
        try:
            await self._manifests.remove(manifest, wipe=wipe)
        except BaseException:
            self._refuse_writes_in_doubt(manifest, "deletion")
            raise
        self._listings.forget(manifest.id)
        await self._merging.drop_condemned()
        self._hydration.prune()
        await self._reservations.keep()
        self._start(self._freeing.free_shared(manifest.parents))
        return deleted

    async def _delete_rest(self, name: str, wipe: bool) -> bool:
        """Delete what there is of a volume that is half restored, or half wiped."""
        kept = self._imports.kept.get(name)
        if kept is not None:
            if wipe:
                await self._manifests.wipe_condemned(kept.layer, name)
            self._imports.discard(name)
        elif not self._wiping.has(name):
            return False
        elif not wipe:
            await self._wiping.give_up(name)
        await self._merging.drop_condemned()
        return True

    async def _describe_deletion(self, manifest: Manifest) -> Deleted:
        """What a wipe of a volume leaves, because others use it."""
        others: set[str] = set()
        shared = 0
        for layer in manifest.parents:
            users = {user.name for user in self._manifests.uses(layer)} - {manifest.name}
            if users:
                others |= users
                shared += await self._store.allocated(layer)
        return Deleted(manifest.name, 0, shared, tuple(sorted(others)))

    async def _create_lazy(self, name: str, record: LazyLayer) -> VolumeInfo:
        self._manifests.check()
        layer, head = secrets.token_hex(8), secrets.token_hex(8)
        await self._manifests.condemn_unless_committed(layer)
        try:
            await create_lazy(self._store, layer, record)
            await create_head(self._store, head)
            parents = {head: layer, layer: ""}
            manifest = Manifest(
                _new_id(), name, record.size, time.time(), 0, head, parents
            ).changed()
            await self._manifests.commit([manifest])
        except BaseException:
            await self._take_back(head)
            self._manifests.provisional.discard(layer)
            await self._merging.drop_condemned()
            raise
        self._manifests.provisional.discard(layer)
        self._hydration.adopt(layer, record)
        return await self._listings.volume_if_readable(manifest)

    async def _take_back(self, layer: str) -> None:
        """Remove a new head that no manifest came to list; what is left the next start removes."""
        if self._manifests.in_doubt is None:
            with contextlib.suppress(OSError):
                await self._store.delete_layer(layer)

    def _refuse_writes_in_doubt(self, manifest: Manifest, operation: str) -> None:
        """What was written to a head that the next start may not find would be lost."""
        if self._manifests.in_doubt is not None:
            self._views.fail(manifest, f"nobody knows whether its {operation} was committed")

    async def _disconnect(self, manifest: Manifest) -> None:
        opened = self._views.get(manifest.id)
        if opened is not None and opened.leases:
            for lease in list(opened.leases):
                lease.revoke()
            try:
                await asyncio.wait_for(opened.empty.wait(), _REVOKE_SECONDS)
            except TimeoutError:
                raise InUseError(f"volume {manifest.name}: a client does not let go") from None
        await self._views.discard(manifest.id)

    # Checks

    def _check_free(self, name: str) -> None:
        self._check_name_free(name)
        self._imports.check_free(name)

    def _check_name_free(self, name: str) -> None:
        check_name("volume", name)
        self._manifests.check_readable(name)
        if self._manifests.find(name) is not None:
            raise ExistsError(f"volume {name} exists already")

    def _check_layers(self, volume: str, stack: list[str]) -> None:
        if len(stack) >= MAX_LAYERS:
            raise InvalidError(
                f"volume {volume} has {len(stack)} layers, the most there can be: delete snapshots,"
                " or push them to a repository and delete them here"
            )

    async def _check_space(self, volume: str, size: int, force: bool) -> None:
        """Whether the policy allows a new volume."""
        await self.space.check_free("a new volume")
        await self.space.check_provisioned(volume, size, force)

    def _check_unused(self, manifest: Manifest) -> None:
        for key in (manifest.id, *(snapshot.id for snapshot in manifest.snapshots)):
            clients = self._views.clients(key)
            if clients:
                raise InUseError(
                    f"volume {manifest.name} is open by {clients}"
                    f" client{'s' if clients > 1 else ''}; disconnect them first"
                )
            if self._pins.holds(key):
                raise InUseError(f"a snapshot of volume {manifest.name} is being pushed")

    # Background

    def _unpinned(self) -> None:
        if not self._closed:
            self._start(self._after_pin())

    async def _after_pin(self) -> None:
        """Do what the pin held up."""
        with contextlib.suppress(UnavailableError):  # closed meanwhile
            async with self._turn():
                await self._merging.drop_condemned()
        self._merging.resume()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _find(manifest: Manifest, name: str) -> Snapshot:
    found = manifest.find(name)
    if found is None:
        raise NotFoundError(f"snapshot {manifest.name}@{name} does not exist")
    return found


def _bases(manifest: Manifest, contexts: Sequence[str]) -> dict[str, Snapshot]:
    """The snapshots that metadata contexts compare with, by the contexts' names. NotFoundError."""
    names = {context: base_of(context) for context in contexts}
    return {context: _find(manifest, name) for context, name in names.items() if name is not None}


def _new_id() -> str:
    return secrets.token_hex(16)
