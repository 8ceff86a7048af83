"""A pinned snapshot, read by another process than the daemon.

``open_source`` shares the layers with a lock of the file system, so they stay as they are even when
the daemon dies and a new one would merge them. Then everything is blocking and thread-safe: that
is how a backup reads.
"""

from __future__ import annotations

import asyncio

from backends.layers import LayerClaim, LayerStore
from snapshots.difference import layers_between, touched_by
from snapshots.layer import LayerPool
from snapshots.manifest import Merge
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import OwnerMap
from snapshots.threads import Threads
from snapshots.transfer import SourceDescription
from snapshots.view import View, load_stack


class SnapshotSource:
    """Read access to one snapshot; made by ``open_source``, ended by ``close``."""

    def __init__(
        self,
        store: LayerStore,
        description: SourceDescription,
        view: View,
        claims: list[LayerClaim],
    ) -> None:
        self.volume = description.volume
        self.snapshot = description.snapshot
        self.snapshot_id = description.snapshot_id
        self.created = description.created
        self.size = description.size
        self._store = store
        self._description = description
        self._view = view
        self._claims = claims

    def ancestors(self) -> list[str]:
        """Ids of the volume's other snapshots, newest first: ``changed_extents`` takes them."""
        return [other.id for other in self._description.others]

    def extents(self) -> list[tuple[int, int]]:
        """(offset, length) in bytes of everything that holds data, in order."""
        owners = self._view.owners
        return _in_bytes(owners, owners.blocks)

    def changed_extents(self, since: str) -> list[tuple[int, int]]:
        """(offset, length) in bytes of everything that may differ from the snapshot ``since``.

        From a thread that runs no event loop: it reads the layers' indexes.
        """
        found = self._description
        other = next(other for other in found.others if other.id == since)
        layers = layers_between(found.parents, other.layer, found.layer)
        blocks = self.size >> BLOCK_SHIFT
        touched = asyncio.run(
            touched_by(self._store, layers, max(blocks, other.size >> BLOCK_SHIFT))
        )
        try:
            return _in_bytes(touched, blocks)
        finally:
            touched.close()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; holes read as zeroes. OSError."""
        for start, part, file in self._view.parts(offset, buffer):
            if file is None:
                part[:] = bytes(len(part))
            else:
                file.read(start, part)

    def close(self) -> None:
        """Close the layers and stop sharing them."""
        for _, layer in self._view.stack:
            layer.data.close()
        self._view.stack.clear()
        self._view.owners.close()
        for claim in self._claims:
            claim.release()


async def open_source(store: LayerStore, description: SourceDescription) -> SnapshotSource:
    """Open a pinned snapshot; StorageError when its layers cannot be shared or read."""
    claims: list[LayerClaim] = []
    owners = OwnerMap(description.size >> BLOCK_SHIFT)
    name = f"{description.volume}@{description.snapshot}"
    view = View(name, description.size, owners, Threads())
    try:
        for layer in description.parents:
            claims.append(await store.pin_layer(layer))
        stack: list[str] = []
        top = description.layer
        while top:
            stack.insert(0, top)
            top = description.parents[top]
        merges = {merge["target"]: Merge(**merge) for merge in description.merges}
        await load_stack(view, stack, merges, store, LayerPool(store, writable=False))
    except BaseException:
        for _, opened in view.stack:
            opened.data.close()
        for claim in claims:
            claim.release()
        raise
    return SnapshotSource(store, description, view, claims)


def _in_bytes(owners: OwnerMap, blocks: int) -> list[tuple[int, int]]:
    return [
        (first << BLOCK_SHIFT, (last - first) << BLOCK_SHIFT)
        for first, last in owners.owned_runs(0, blocks)
    ]
