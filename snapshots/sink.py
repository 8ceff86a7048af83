"""An import's layer, filled by another process than the daemon.

``write`` may be called from many threads for places that do not overlap; it takes whole blocks.
``finish`` makes the data durable and writes the journal that says which blocks there are: only
then can the import be committed.

Of one that is **resumable** (imports.py), ``complete`` says of a range that all of it that is not
zero was written. Whenever STEP bytes were, they are made durable: data, fdatasync, then the
``fetched`` log, fdatasync. So whoever goes on after a crash asks ``holds``, and what is lost is at
most twice STEP and what was under way. Only one process at a time fills a layer: it has the claim
of it, a lock that is gone with the process.
"""

from __future__ import annotations

import threading

from backends.errors import InUseError, InvalidError
from backends.layers import DataFile, LayerClaim, LayerStore, LogFile
from snapshots.extent_log import (
    FETCHED,
    JOURNAL,
    SECTOR,
    Run,
    encode_extents,
    encode_log,
)
from snapshots.fetched_log import read_fetched
from snapshots.head import JOURNAL_STEP
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.owner_map import DATA, ZERO, OwnerMap
from snapshots.punching import gaps
from snapshots.transfer import SinkDescription

STEP = 32 << 20  # bytes
_ROOM = 64 << 10  # in the log, reserved at a time


class LayerSink:
    """A layer being filled; made by ``open_sink``, ended by ``close``."""

    def __init__(
        self,
        store: LayerStore,
        description: SinkDescription,
        data: DataFile,
        holds: OwnerMap,
        notes: _Notes | None = None,
    ) -> None:
        self.size = description.size
        self._store = store
        self._layer = description.layer
        self._data = data
        self._holds = holds
        self._notes = notes
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._pending: list[tuple[int, int]] = []
        self._unsynced = 0

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put whole blocks at ``offset``; what is never written reads as zeroes. OSError."""
        end = offset + len(data)
        if offset % BLOCK_SIZE or len(data) % BLOCK_SIZE or offset < 0 or end > self.size:
            raise InvalidError(f"range {offset} to {end} is not whole blocks of the volume")
        self._data.write(offset, data)
        with self._lock:
            self._holds.set(offset >> BLOCK_SHIFT, end >> BLOCK_SHIFT, DATA)

    def holds(self, offset: int, length: int) -> bool:
        """Whether all of a range is here, durably or by this process; whole blocks."""
        first, end = offset >> BLOCK_SHIFT, (offset + length) >> BLOCK_SHIFT
        return self._notes is not None and self._holds.raw.find(b"\0", first, end) < 0

    def complete(self, offset: int, length: int) -> None:
        """All of a range that is not zero was written. OSError."""
        if self._notes is None:
            return
        first, end = offset >> BLOCK_SHIFT, (offset + length) >> BLOCK_SHIFT
        with self._lock:
            for begin, stop in list(gaps(self._holds, first, end)):
                self._holds.set(begin, stop, ZERO)
            self._pending.append((first, end))
            self._unsynced += length
            due, late = self._unsynced >= STEP, self._unsynced >= 2 * STEP
        # One syncs while the others go on, until too much is waiting for it.
        if due and self._syncing.acquire(blocking=late):
            try:
                self._sync(self._notes)
            finally:
                self._syncing.release()

    def _sync(self, notes: _Notes) -> None:
        with self._lock:
            pending, self._pending, self._unsynced = self._pending, [], 0
            runs = [run for first, end in sorted(pending) for run in self._holds.runs(first, end)]
        if runs:
            self._data.sync()
            notes.add(runs)

    async def finish(self) -> None:
        """Make the layer complete and durable."""
        self._data.sync()
        # What was zero is of no interest any more.
        self._holds.replace(0, self._holds.blocks, ZERO, 0)
        runs = self._holds.runs(0, self._holds.blocks)
        content, _ = encode_log(self._layer, JOURNAL, runs, sealed=False)
        await self._store.create_log(self._layer, JOURNAL, content + bytes(JOURNAL_STEP))

    def close(self) -> None:
        """Release descriptors and memory, finished or not; what is complete is noted, if it can."""
        if self._notes is not None:
            self._notes.close()
        self._data.close()
        self._holds.close()


class _Notes:
    """The ``fetched`` log, and the claim of the layer."""

    def __init__(self, layer: str, log: LogFile, sequence: int, claim: LayerClaim) -> None:
        self._layer = layer
        self._log = log
        self._sequence = sequence
        self._claim = claim

    def add(self, runs: list[Run]) -> None:
        """These blocks are on the disk. OSError."""
        sectors = b"".join(encode_extents(self._layer, runs, self._sequence))
        # With the zeroes that end the log.
        self._log.reserve(max(len(sectors) + SECTOR, _ROOM))
        self._log.append(sectors)
        self._sequence += len(sectors) // SECTOR
        self._log.sync()

    def close(self) -> None:
        self._log.close()
        self._claim.release()


async def open_sink(store: LayerStore, description: SinkDescription) -> LayerSink:
    """Open the layer of an import for filling, where it stands. InUseError, OSError.

    A ``fetched`` log that is damaged is begun anew: then everything is written again.
    """
    layer = description.layer
    holds = OwnerMap(description.size >> BLOCK_SHIFT)
    notes = None
    try:
        if description.resumable:
            notes = await _open_notes(store, description, holds)
        data = await store.open_data(layer, writable=True)
    except BaseException:
        if notes is not None:
            notes.close()
        holds.close()
        raise
    return LayerSink(store, description, data, holds, notes)


async def _open_notes(store: LayerStore, description: SinkDescription, holds: OwnerMap) -> _Notes:
    layer = description.layer
    claim = await store.claim_layer(layer)
    if claim is None:
        raise InUseError(
            f"volume {description.volume} is still being restored by another process: end that one"
        )
    try:
        await read_fetched(store, layer, holds)
        runs = holds.runs(0, holds.blocks)
        content, sequence = encode_log(layer, FETCHED, runs, sealed=False)
        await store.create_log(layer, FETCHED, content + bytes(SECTOR))
        log = await store.open_log(layer, FETCHED, len(content))
    except BaseException:
        claim.release()
        raise
    return _Notes(layer, log, sequence, claim)
