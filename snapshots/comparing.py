"""Which blocks of a volume changed between two snapshots, or since one."""

from __future__ import annotations

from backends.layers import LayerStore
from snapshots.difference import Extent, changed_extents, layers_between, touched_by
from snapshots.manifest import Manifest, Snapshot
from snapshots.names import BLOCK_SHIFT
from snapshots.open_views import OpenViews


async def compare_snapshots(
    store: LayerStore, views: OpenViews, manifest: Manifest, older: Snapshot, newer: Snapshot
) -> list[Extent]:
    """What may differ in ``newer`` from ``older``, in order."""
    blocks = max(older.size, newer.size) >> BLOCK_SHIFT
    layers = layers_between(manifest.parents, older.layer, newer.layer)
    view = await views.acquire_snapshot(manifest, newer)
    try:
        touched = await touched_by(store, layers, blocks)
        try:
            return changed_extents(touched, view.owners)
        finally:
            touched.close()
    finally:
        await views.release(newer.id)


async def compare_with_now(
    store: LayerStore, views: OpenViews, manifest: Manifest, older: Snapshot
) -> list[Extent]:
    """What may differ in the volume as it is from ``older``, in order."""
    volume = await views.acquire_volume(manifest)
    try:
        layers = layers_between(manifest.parents, older.layer, manifest.head)
        blocks = max(older.size, volume.size) >> BLOCK_SHIFT
        await volume.settle()
        # Held, so that the journal does not grow while it is read.
        async with volume.head.lock:
            touched = await touched_by(store, layers, blocks)
            try:
                for first, last, _ in volume.head.pending:
                    touched.set(first, last, 1)
                return changed_extents(touched, volume.owners)
            finally:
                touched.close()
    finally:
        await views.release(manifest.id)
