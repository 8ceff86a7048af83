"""The log of what a layer that is being filled has: by a restore, or lazily, bit by bit."""

from __future__ import annotations

from backends.errors import CorruptError
from backends.layers import LayerStore
from snapshots.extent_log import FETCHED, read_log
from snapshots.owner_map import OwnerMap


async def read_fetched(store: LayerStore, layer: str, holds: OwnerMap) -> None:
    """Read it into ``holds``; one that is damaged says nothing: then all is fetched again."""
    content = await store.read_log(layer, FETCHED)
    if content is None:
        return
    try:
        read_log(content, layer, FETCHED, holds, store.describe(layer, FETCHED))
    except CorruptError:
        holds.set(0, holds.blocks, 0)
