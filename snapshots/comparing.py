"""Which blocks of a volume changed between two snapshots, or since one."""

from __future__ import annotations

from dataclasses import dataclass

from backends.layers import LayerStore
from snapshots.difference import Extent, changed_extents, layers_between, touched_by
from snapshots.manifest import Manifest, Snapshot
from snapshots.names import BLOCK_SHIFT
from snapshots.open_views import OpenViews


@dataclass(frozen=True)
class State:
    """A side of a comparison, ``size`` in bytes; but for that, None of the volume as it is now."""

    snapshot: str | None
    id: str | None
    created: float | None
    size: int


@dataclass(frozen=True)
class Comparison:
    """What may differ in ``newer`` from ``older``, in order; none beyond the newer one's size.

    Where the newer one is longer and nothing is said, it reads as zeros.
    """

    volume: str
    older: State
    newer: State
    extents: list[Extent]


async def compare_snapshots(
    store: LayerStore, views: OpenViews, manifest: Manifest, older: Snapshot, newer: Snapshot
) -> Comparison:
    """What may differ between two snapshots."""
    blocks = max(older.size, newer.size) >> BLOCK_SHIFT
    layers = layers_between(manifest.parents, older.layer, newer.layer)
    async with views.looking_at(manifest, newer) as view:
        touched = await touched_by(store, layers, blocks)
        try:
            extents = changed_extents(touched, view.owners)
        finally:
            touched.close()
    return Comparison(manifest.name, _state(older), _state(newer), extents)


async def compare_with_now(views: OpenViews, manifest: Manifest, older: Snapshot) -> Comparison:
    """What may differ in the volume as it is from a snapshot."""
    layers = layers_between(manifest.parents, older.layer, manifest.head)
    blocks = max(older.size, manifest.size) >> BLOCK_SHIFT
    now = State(None, None, None, manifest.size)
    view = await views.acquire_volume(manifest)
    try:
        changed = await view.host.list_changed(view.key, layers, blocks)
        extents = [Extent(offset, length, zero) for offset, length, zero in changed]
    finally:
        await views.release(view)
    return Comparison(manifest.name, _state(older), now, extents)


def _state(snapshot: Snapshot) -> State:
    return State(snapshot.name, snapshot.id, snapshot.created, snapshot.size)
