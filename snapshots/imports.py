"""Volumes that another process fills before they exist: restores.

An import's layer is condemned from the beginning, so when daemon and filler both die the next start
removes it; the commit makes a manifest list it, which saves it. The volume's name is taken
meanwhile.
"""

from __future__ import annotations

import secrets
import time

from backends.errors import NotFoundError
from backends.layers import LayerStore
from snapshots.layer import apply_layer
from snapshots.manifest import Manifest
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import OwnerMap
from snapshots.transfer import Import, SinkDescription


class Imports:
    """The imports under way, by the name of the volume; the caller holds the commits."""

    def __init__(self, store: LayerStore, manifests: ManifestStore) -> None:
        self._store = store
        self._manifests = manifests
        self._under_way: dict[str, Import] = {}

    def __contains__(self, volume: str) -> bool:
        return volume in self._under_way

    async def begin(self, volume: str, size: int) -> Import:
        """Make an empty layer to be filled for a volume of ``size`` bytes."""
        layer = secrets.token_hex(8)
        await self._manifests.condemn_unless_committed(layer)
        await self._store.create_layer(layer)
        identity = secrets.token_hex(16)
        imported = Import(SinkDescription(volume, size, layer), time.time(), identity)
        self._under_way[volume] = imported
        return imported

    async def commit(self, imported: Import) -> Manifest:
        """Check that the layer can be read, and make it the volume."""
        sink = imported.sink
        if self._under_way.get(sink.volume) is not imported:
            raise NotFoundError(f"the import of volume {sink.volume} was given up already")
        holds = OwnerMap(sink.size >> BLOCK_SHIFT)
        try:
            await apply_layer(self._store, sink.layer, holds)
        finally:
            holds.close()
        manifest = Manifest(
            id=imported.id,
            name=sink.volume,
            size=sink.size,
            created=imported.created,
            generation=1,
            head=sink.layer,
            parents={sink.layer: ""},
        )
        await self._manifests.commit([manifest])
        del self._under_way[sink.volume]
        self._manifests.provisional.discard(sink.layer)
        return manifest

    def discard(self, imported: Import) -> None:
        """Give up an import, unless it was committed; its layer goes with the condemned ones."""
        if self._under_way.get(imported.sink.volume) is imported:
            del self._under_way[imported.sink.volume]
            self._manifests.provisional.discard(imported.sink.layer)

    def discard_all(self) -> None:
        """Give up every import."""
        for imported in list(self._under_way.values()):
            self.discard(imported)
