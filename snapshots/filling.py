"""A lazy layer being filled, by the process that fetches (lazy.py has what is on disk).

``put`` writes a chunk into the layer's data, where it can be read at once; ``sync`` makes durable
what was put before, and then says so in the ``fetched`` log: data, fdatasync, log, fdatasync. What
a crash loses in between is fetched again, into the same place: a lazy layer never changes.

All methods but ``open_filling`` block; ``put`` may be called from many threads, for chunks that
differ.
"""

from __future__ import annotations

import threading

from backends.layers import DataFile, LayerStore, LogFile
from snapshots.extent_log import (
    FETCHED,
    SECTOR,
    Run,
    encode_extents,
    encode_log,
)
from snapshots.fetched_log import read_fetched
from snapshots.lazy import LazyLayer
from snapshots.lazy_data import whole_chunks
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.owner_map import DATA, ZERO, OwnerMap
from snapshots.punching import gaps

# Room in the log that is reserved at a time.
_STEP = 64 << 10
_ZERO_BLOCK = bytes(BLOCK_SIZE)


class Filling:
    """See the module's text; made by ``open_filling``."""

    def __init__(
        self,
        name: str,
        lazy: LazyLayer,
        data: DataFile,
        log: LogFile,
        here: OwnerMap,
        sequence: int,
    ) -> None:
        self._name = name
        self._lazy = lazy
        self._data = data
        self._log = log
        self._sequence = sequence
        self._here = here
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._pending: list[Run] = []
        self.unsynced = 0
        """Bytes that were put and not synced."""
        self.missing = sum(end - first for first, end in lazy.chunk_runs()) - here.count_owned()
        """Claimed chunks that are not here."""
        self.done = _count(here, DATA) * lazy.chunk_size
        """Bytes of chunks that are here and hold data, in whole chunks."""

    def is_here(self, chunk: int) -> bool:
        """Whether a chunk was put, durably or not."""
        return self._here.raw[chunk] != 0

    def lacks(self, first: int, end: int) -> bool:
        """Whether any of these chunks is not here."""
        return self._here.raw.find(b"\0", first, end) >= 0

    def runs(self) -> list[tuple[int, int]]:
        """Runs of chunks (first, end) that are here."""
        with self._lock:
            return list(self._here.owned_runs(0, self._here.blocks))

    def put(self, chunk: int, plain: bytes) -> None:
        """A chunk holds this; nobody can see a part of it. OSError."""
        start = chunk * self._lazy.chunk_blocks
        runs: list[Run] = []
        for position in range(0, len(plain), BLOCK_SIZE):
            kind = ZERO if plain.startswith(_ZERO_BLOCK, position) else DATA
            block = start + (position >> BLOCK_SHIFT)
            if runs and runs[-1][2] == kind:
                runs[-1] = (runs[-1][0], block + 1, kind)
            else:
                runs.append((block, block + 1, kind))
        view = memoryview(plain)
        for first, end, kind in runs:
            if kind == DATA:
                at = (first - start) << BLOCK_SHIFT
                length = (end - first) << BLOCK_SHIFT
                self._data.write(first << BLOCK_SHIFT, view[at : at + length])
        data = any(kind == DATA for _, _, kind in runs)
        with self._lock:
            if not self._here.raw[chunk]:
                self._here.set(chunk, chunk + 1, DATA if data else ZERO)
                self._pending += runs
                self.missing -= 1
                self.done += self._lazy.chunk_size if data else 0
                self.unsynced += self._lazy.chunk_size if data else 0

    def put_zeroes(self, first: int, end: int) -> None:
        """Those of these chunks that are not here are holes."""
        size = self._lazy.chunk_blocks
        with self._lock:
            for begin, stop in gaps(self._here, first, end):
                self._here.set(begin, stop, ZERO)
                blocks = (begin * size, min(stop * size, self._lazy.blocks), ZERO)
                self._pending.append(blocks)
                self.missing -= stop - begin

    def sync(self) -> list[tuple[int, int]]:
        """Make everything that was put before durable, and note that.

        Returns runs of chunks that are not here any more, since the disk failed to keep them: they
        are to be fetched again. OSError when the log cannot be written: then the data is here, but
        fetched again by the next process.
        """
        with self._syncing:
            with self._lock:
                pending, self._pending = self._pending, []
                self.unsynced = 0
            if not pending:
                return []
            try:
                self._data.sync()
            except OSError:
                return self._forget(pending)
            try:
                self._record(pending)
            except OSError:
                with self._lock:
                    self._pending = pending + self._pending
                raise
        return []

    def _record(self, pending: list[Run]) -> None:
        runs = _joined(pending)
        sectors = b"".join(encode_extents(self._name, runs, self._sequence))
        # With the zeroes that end the log.
        self._log.reserve(max(len(sectors) + SECTOR, _STEP))
        self._log.append(sectors)
        self._sequence += len(sectors) // SECTOR
        self._log.sync()

    def _forget(self, pending: list[Run]) -> list[tuple[int, int]]:
        size = self._lazy.chunk_blocks
        chunks = {
            chunk for first, end, _ in pending for chunk in range(first // size, -(-end // size))
        }
        with self._lock:
            for chunk in chunks:
                kind = self._here.raw[chunk]
                if kind:
                    self._here.set(chunk, chunk + 1, 0)
                    self.missing += 1
                    self.done -= self._lazy.chunk_size if kind == DATA else 0
        return [(chunk, chunk + 1) for chunk in sorted(chunks)]

    def close(self) -> None:
        """Release descriptors and memory."""
        self._log.close()
        self._data.close()
        self._here.close()


async def open_filling(store: LayerStore, name: str, lazy: LazyLayer) -> Filling:
    """Go on filling a lazy layer where it stands. OSError, StorageError.

    A log that is damaged is begun anew: then everything is fetched again.
    """
    holds = OwnerMap(lazy.blocks)
    here = OwnerMap(lazy.chunks)
    try:
        await read_fetched(store, name, holds)
        whole_chunks(holds, lazy, here)
        data = await store.open_data(name, writable=True)
        try:
            # What a killed process logged was synced before; what it only wrote is written again.
            runs = holds.runs(0, holds.blocks)
            content, sequence = encode_log(name, FETCHED, runs, sealed=False)
            await store.create_log(name, FETCHED, content + bytes(SECTOR))
            log = await store.open_log(name, FETCHED, len(content))
        except BaseException:
            data.close()
            raise
    except BaseException:
        here.close()
        raise
    finally:
        holds.close()
    return Filling(name, lazy, data, log, here, sequence)


def _count(here: OwnerMap, kind: int) -> int:
    spans = here.touched_spans(0, here.blocks)
    return sum(here.raw[start:end].count(kind) for start, end in spans)


def _joined(runs: list[Run]) -> list[Run]:
    """Disjoint runs in order, those that touch and are of one kind as one."""
    joined: list[Run] = []
    for run in sorted(runs):
        if joined and joined[-1][1] == run[0] and joined[-1][2] == run[2]:
            joined[-1] = (joined[-1][0], run[1], run[2])
        else:
            joined.append(run)
    return joined
