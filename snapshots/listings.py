"""What the catalogue tells of volumes and snapshots."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from backends.errors import StorageError
from backends.layers import LayerStore
from snapshots.extent_log import JOURNAL
from snapshots.hydration import Hydration, HydrationInfo
from snapshots.manifest import Manifest, Snapshot
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SHIFT
from snapshots.open_views import OpenViews

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VolumeInfo:
    """A volume as listed; sizes in bytes, ``created`` in seconds since 1970.

    ``mapped`` is what the volume holds data for, ``own`` the disk space of layers that only it
    uses, ``shared`` that of layers that other volumes use too; None: its files cannot be read.
    ``hydration`` says how far a volume is that was restored lazily, and is not whole yet.
    ``reserved`` is what it can write however full the disk gets (reservations.py). ``journal`` is
    the size of the head's journal, space reserved in it included.
    """

    name: str
    id: str
    size: int
    created: float
    layers: int
    snapshots: int
    mapped: int | None
    own: int | None
    shared: int | None
    clients: int
    hydration: HydrationInfo | None = None
    reserved: int = 0
    journal: int | None = None


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot as listed; sizes in bytes, ``created`` in seconds since 1970."""

    volume: str
    name: str
    id: str
    size: int
    created: float
    layers: int
    labels: dict[str, str]
    clients: int


@dataclass(frozen=True)
class WorkerInfo:
    """A process that serves volumes, and how many it has open; ``pid`` None while it is started."""

    pid: int | None
    volumes: int


class Listings:
    """Puts the facts together; the caller holds the catalogue's commits."""

    def __init__(
        self,
        store: LayerStore,
        manifests: ManifestStore,
        views: OpenViews,
        hydration: Hydration,
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._views = views
        self._hydration = hydration
        self._mapped: dict[str, int] = {}

    def forget(self, volume: str) -> None:
        """What the volume of this id holds is about to change while it is open, or is gone."""
        self._mapped.pop(volume, None)

    def workers(self) -> list[WorkerInfo]:
        """The processes in which volumes are open."""
        return [WorkerInfo(host.pid, self._views.volumes_on(host)) for host in self._views.hosts]

    async def volume(self, manifest: Manifest) -> VolumeInfo:
        """One volume; OSError, StorageError."""
        own = shared = 0
        for layer in manifest.parents:
            allocated = await self._store.allocated(layer)
            if len(self._manifests.uses(layer)) > 1:
                shared += allocated
            else:
                own += allocated
        mapped = await self._count_mapped(manifest)
        journal = await self._store.log_size(manifest.head, JOURNAL)
        return self._describe(manifest, mapped, own, shared, journal)

    async def volume_if_readable(self, manifest: Manifest) -> VolumeInfo:
        """The same; of one whose files cannot be read, what its manifest says, and a warning."""
        try:
            return await self.volume(manifest)
        except (OSError, StorageError) as error:
            _log.warning("volume %s cannot be examined: %s", manifest.name, error)
            return self._describe(manifest, None, None, None)

    def _describe(
        self,
        manifest: Manifest,
        mapped: int | None,
        own: int | None,
        shared: int | None,
        journal: int | None = None,
    ) -> VolumeInfo:
        return VolumeInfo(
            name=manifest.name,
            id=manifest.id,
            size=manifest.size,
            created=manifest.created,
            layers=len(manifest.stack(manifest.head)),
            snapshots=len(manifest.snapshots),
            mapped=mapped,
            own=own,
            shared=shared,
            clients=self._views.clients(manifest.id),
            hydration=self._hydration.info(manifest),
            reserved=manifest.reserve,
            journal=journal,
        )

    async def _count_mapped(self, manifest: Manifest) -> int:
        known = self._mapped.get(manifest.id)
        if known is not None and self._views.get(manifest.id) is None:
            return known
        view = await self._views.acquire_volume(manifest)
        try:
            blocks = await view.host.count_owned(view.key)
        finally:
            await self._views.release(view)
        self._mapped[manifest.id] = blocks << BLOCK_SHIFT
        return blocks << BLOCK_SHIFT

    def snapshot(self, manifest: Manifest, snapshot: Snapshot) -> SnapshotInfo:
        """One snapshot."""
        return SnapshotInfo(
            volume=manifest.name,
            name=snapshot.name,
            id=snapshot.id,
            size=snapshot.size,
            created=snapshot.created,
            layers=len(manifest.stack(snapshot.layer)),
            labels=dict(snapshot.labels),
            clients=self._views.clients(snapshot.id),
        )
