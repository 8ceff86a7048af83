"""Open layers, shared by every view that reads them, and the maps of what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from backends.errors import CorruptError, NotFoundError
from backends.layers import DataFile, LayerStore
from snapshots.examining import Nothing
from snapshots.extent_log import INDEX, JOURNAL, MERGE, Extents, LogState, encode_log, read_log
from snapshots.lazy import LAZY, LazyLayer, read_lazy, unpack_lazy
from snapshots.lazy_data import LazyDataFile, open_lazy_data
from snapshots.names import BLOCK_SHIFT, MAX_VOLUME_SIZE
from snapshots.owner_map import DATA, ZERO, OwnerMap

_THREAD_FROM = 1 << 16


@dataclass
class OpenLayer:
    """A layer's data, open; ``users`` counts the views and heads that hold it."""

    name: str
    data: DataFile
    users: int = 0


@dataclass
class LayerPool:
    """Every layer that is open in this process, once.

    ``fetch`` asks for chunks of a lazy layer that are not here: see lazy_data.py.
    """

    store: LayerStore
    writable: bool
    fetch: Callable[[str, int, int], None] | None = None
    _open: dict[str, OpenLayer] = field(default_factory=dict)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def acquire(self, name: str) -> OpenLayer:
        """Open a layer, or share it when it is open."""
        async with self._lock:
            layer = self._open.get(name)
            if layer is None:
                layer = OpenLayer(name, await self._open_data(name))
                self._open[name] = layer
            layer.users += 1
            return layer

    async def _open_data(self, name: str) -> DataFile:
        data = await self.store.open_data(name, writable=self.writable)
        try:
            lazy = await read_lazy(self.store, name)
            if lazy is None:
                return data
            return await open_lazy_data(self.store, name, lazy, data, self.fetch)
        except BaseException:
            data.close()
            raise

    def lazy(self, name: str) -> LazyDataFile | None:
        """The data of an open layer that was not whole when it was opened."""
        found = self._open.get(name)
        return found.data if found and isinstance(found.data, LazyDataFile) else None

    def replace_data(self, name: str, data: DataFile) -> None:
        """Close ``data`` with an open layer, instead of what was around it."""
        self._open[name].data = data

    def release(self, layer: OpenLayer) -> None:
        """Undo one ``acquire``; the last one closes the data."""
        layer.users -= 1
        if layer.users == 0:
            del self._open[layer.name]
            layer.data.close()

    def names(self) -> set[str]:
        """The layers that are open."""
        return set(self._open)


async def apply_layer(
    store: LayerStore, layer: str, into: Extents, data: int = DATA, zero: int = ZERO
) -> LogState:
    """Apply what ``layer`` holds to ``into``: its index when it is sealed, else its journal.

    Of one that is not whole it is what the layer claims.
    """
    # An index that appears while we look takes the journal's place: so look for it again.
    for log in (INDEX, JOURNAL, INDEX):
        content = await store.read_log(layer, log)
        if content is not None:
            return await _apply(store, content, layer, log, into, data, zero)
    content = await store.read_log(layer, LAZY)
    if content is not None:
        return _apply_claims(unpack_lazy(content, store.describe(layer, LAZY)), into, data)
    raise NotFoundError(f"{store.describe(layer, JOURNAL)} is missing: the layer cannot be read")


def _apply_claims(lazy: LazyLayer, into: Extents, data: int) -> LogState:
    """What a layer that is not whole claims, as if an index said it."""
    if lazy.blocks > into.blocks:
        raise CorruptError(f"{lazy.source} is longer than the volume")
    for first, end in lazy.claims:
        into.set(first, end, data)
    return LogState(0, 0, False, 0)


async def apply_merge(
    store: LayerStore, layer: str, into: Extents, data: int = DATA, zero: int = ZERO
) -> LogState | None:
    """Apply the merge log of ``layer``, the extents that it took over so far; None: no such log."""
    content = await store.read_log(layer, MERGE)
    if content is None:
        return None
    return await _apply(store, content, layer, MERGE, into, data, zero)


async def clear_away(store: LayerStore, layer: str) -> str | None:
    """Remove a layer that no volume lists, or set it aside; where it is kept then. OSError.

    Without data that a log lists, it is what an interrupted snapshot left, and goes. With such
    data it may belong to a volume whose manifest was lost: it is kept out of the way.
    """
    if await _holds_listed_data(store, layer):
        return await store.set_aside_layer(layer)
    await store.delete_layer(layer)
    return None


async def _holds_listed_data(store: LayerStore, layer: str) -> bool:
    """Whether it has data, and a log that lists some or cannot be read.

    Data that no log lists could not be read again, whatever else came back: the next head of a
    snapshot that was not committed has it, when the process is killed behind the gate.
    """
    if not await store.holds_data(layer):
        return False
    nothing = Nothing(MAX_VOLUME_SIZE >> BLOCK_SHIFT)
    try:
        held = await apply_layer(store, layer, nothing)
        merged = await apply_merge(store, layer, nothing)
    except (CorruptError, NotFoundError):
        return True
    return bool(held.data_ends or (merged is not None and merged.data_ends))


async def check_no_merge(store: LayerStore, layer: str, blocks: int) -> None:
    """CorruptError when ``layer`` took over blocks in a merge of which there is no record.

    They are nowhere else any more, and nothing says between which layers they lie.
    """
    state = await apply_merge(store, layer, Nothing(blocks))
    if state is not None and state.sequence:
        raise CorruptError(f"{store.describe(layer, MERGE)}: the record of this merge is lost")


async def _apply(
    store: LayerStore, content: bytes, layer: str, log: str, into: Extents, data: int, zero: int
) -> LogState:
    where = store.describe(layer, log)
    if len(content) < _THREAD_FROM:
        return read_log(content, layer, log, into, where, data, zero)
    return await asyncio.to_thread(read_log, content, layer, log, into, where, data, zero)


async def write_index(store: LayerStore, layer: str, holds: OwnerMap) -> None:
    """Give ``layer`` its compact, sealed index of what ``holds`` says; its journal goes."""
    content, _ = await asyncio.to_thread(
        encode_log, layer, INDEX, holds.runs(0, holds.blocks), sealed=True
    )
    await store.create_log(layer, INDEX, content)
    await store.delete_log(layer, JOURNAL)


async def seal_journal(store: LayerStore, layer: str, holds: OwnerMap) -> None:
    """Turn a sealed layer's journal into its index; ``holds``, empty, gets what it says is zero."""
    state = await apply_layer(store, layer, holds)
    if state.ragged:
        raise CorruptError(f"{store.describe(layer, JOURNAL)}: unsynced sectors in a sealed layer")
    await write_index(store, layer, holds)
    # Without the many runs of data, which nobody wants to go through on the event loop.
    await asyncio.to_thread(holds.replace, 0, holds.blocks, DATA, 0)
