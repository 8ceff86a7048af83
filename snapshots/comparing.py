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
    async with views.looking_at(manifest, newer) as view:
        touched = await touched_by(store, layers, blocks)
        try:
            return changed_extents(touched, view.owners)
        finally:
            touched.close()


async def compare_with_now(views: OpenViews, manifest: Manifest, older: Snapshot) -> list[Extent]:
    """What may differ in the volume as it is from ``older``, in order."""
    layers = layers_between(manifest.parents, older.layer, manifest.head)
    blocks = max(older.size, manifest.size) >> BLOCK_SHIFT
    view = await views.acquire_volume(manifest)
    try:
        changed = await view.host.list_changed(view.key, layers, blocks)
        return [Extent(offset, length, zero) for offset, length, zero in changed]
    finally:
        await views.release(view)
