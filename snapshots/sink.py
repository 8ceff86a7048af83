"""An import's layer, filled by another process than the daemon.

``write`` may be called from many threads for places that do not overlap; it takes whole blocks.
``finish`` makes the data durable and writes the journal that says which blocks there are: only
then can the import be committed.
"""

from __future__ import annotations

import threading

from backends.errors import InvalidError
from backends.layers import DataFile, LayerStore
from snapshots.extent_log import JOURNAL, encode_log
from snapshots.head import JOURNAL_STEP
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.owner_map import DATA, OwnerMap
from snapshots.transfer import SinkDescription


class LayerSink:
    """A layer being filled; made by ``open_sink``, ended by ``close``."""

    def __init__(self, store: LayerStore, description: SinkDescription, data: DataFile) -> None:
        self.size = description.size
        self._store = store
        self._layer = description.layer
        self._data = data
        self._holds = OwnerMap(description.size >> BLOCK_SHIFT)
        self._lock = threading.Lock()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put whole blocks at ``offset``; what is never written reads as zeroes. OSError."""
        end = offset + len(data)
        if offset % BLOCK_SIZE or len(data) % BLOCK_SIZE or offset < 0 or end > self.size:
            raise InvalidError(f"range {offset} to {end} is not whole blocks of the volume")
        self._data.write(offset, data)
        with self._lock:
            self._holds.set(offset >> BLOCK_SHIFT, end >> BLOCK_SHIFT, DATA)

    async def finish(self) -> None:
        """Make the layer complete and durable."""
        self._data.sync()
        runs = self._holds.runs(0, self._holds.blocks)
        content, _ = encode_log(self._layer, JOURNAL, runs, sealed=False)
        await self._store.create_log(self._layer, JOURNAL, content + bytes(JOURNAL_STEP))

    def close(self) -> None:
        """Release descriptors and memory, finished or not."""
        self._data.close()
        self._holds.close()


async def open_sink(store: LayerStore, description: SinkDescription) -> LayerSink:
    """Open the layer of an import for filling."""
    data = await store.open_data(description.layer, writable=True)
    return LayerSink(store, description, data)
