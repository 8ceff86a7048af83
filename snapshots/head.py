"""The head: the one writable layer of a volume, and its journal.

What a head has taken since its last sync is **pending**: runs of blocks, in the order of their
coming, later ones over earlier ones; the owner map tells what each block is by now, the head's
(data) or nobody's (zero). ``capture``
turns them into extents for the journal, and ``persist`` makes them durable:

1. fdatasync of the data,
2. append the extents to the journal,
3. fdatasync of the journal.

The other order would, after a power cut, show zeroes or older bytes where the journal claims data.

**Room.** A write that takes new blocks must be sure that its journal record will fit, however full
the disk gets. Space for the journal is reserved ahead of its end; ``room(RESERVED)`` is how many
runs may be pending for a write, ``room(0)`` for what must go on when the disk is full (TRIM,
WRITE_ZEROES): a part of the reservation is theirs alone.
"""

from __future__ import annotations

import asyncio
import errno

from backends.layers import LayerStore, LogFile
from snapshots.extent_log import (
    EXTENTS_PER_SECTOR,
    JOURNAL,
    SECTOR,
    LogState,
    Run,
    encode_extents,
    encode_header,
    encode_log,
)
from snapshots.layer import OpenLayer, apply_layer
from snapshots.owner_map import DATA, ZERO, OwnerMap
from snapshots.reserve import with_reserve

JOURNAL_STEP = 256 << 10
RESERVED = 64 << 10
_COMPACT_FROM = 8 << 20


async def create_head(store: LayerStore, layer: str) -> None:
    """Make a layer that holds nothing, with an empty journal and room reserved in it."""
    await store.create_layer(layer)
    await store.create_log(layer, JOURNAL, encode_header(layer, JOURNAL) + bytes(JOURNAL_STEP))


class Head:
    """A layer that is being written (see the module's text); all but ``persist`` on the loop."""

    def __init__(self, layer: OpenLayer, slot: int, journal: LogFile, state: LogState) -> None:
        self.layer = layer
        self.data = layer.data
        self.slot = slot
        self.dirty = False
        self.pending: list[Run] = []
        self.late: list[Run] = []
        self.sealed = False
        self.writers = 0
        self.lock = asyncio.Lock()
        self._journal = journal
        self._sequence = state.sequence
        self._end = state.end
        self._reserved_end = state.end
        self._compact_at = _COMPACT_FROM
        self._captured = 0
        self._idle: asyncio.Future[None] | None = None
        self.write_limit = 0
        self.zero_limit = 0

    # Pending extents

    def take(self, first: int, last: int, kind: int) -> None:
        """Blocks ``first`` to ``last`` (exclusive) are now this head's (DATA) or nobody's (ZERO).

        Only runs of one kind are joined: so n pending runs never become more than 2n extents,
        and the room for them can be counted.
        """
        self.dirty = True
        if self.sealed:
            # A write that began before the gate: its blocks may have newer owners by the time
            # that pending runs are looked up, so it is noted as what it is.
            self.late.append((first, last, kind))
            return
        pending = self.pending
        if pending and pending[-1][1] == first and pending[-1][2] == kind:
            pending[-1] = (pending[-1][0], last, kind)
        else:
            pending.append((first, last, kind))

    def capture(self, owners: OwnerMap) -> list[Run]:
        """Pending runs as extents in order, by what ``owners`` says now; none is pending then."""
        runs: list[Run] = []
        slot = self.slot
        raw = owners.raw
        for first, last in _merged(self.pending):
            if last - first < 4096 and raw[first:last].count(slot) == last - first:
                runs.append((first, last, DATA))
                continue
            position = first
            for start, end, owner in owners.runs(first, last):
                assert owner == slot, "a pending block belongs to its head or to nobody"
                if start > position:
                    runs.append((position, start, ZERO))
                runs.append((start, end, DATA))
                position = end
            if position < last:
                runs.append((position, last, ZERO))
        self.pending = []
        self._captured = len(runs)
        self._set_limits()
        return runs

    def persist(self, runs: list[Run]) -> None:
        """Sync the data, then record ``runs`` (ascending) durably; blocking, in a thread."""
        self.data.sync()
        if runs:
            sectors = b"".join(encode_extents(self.layer.name, runs, self._sequence))
            self._journal.append(sectors)
            self._journal.sync()
            self._sequence += len(sectors) // SECTOR
            self._end += len(sectors)
        self._captured = 0
        self.extend()

    def settle(self) -> None:
        """Make what the journal says durable, and reserve room; blocking.

        A killed process may have appended what never was synced, and what is appended next says
        that everything before it is durable.
        """
        self._journal.sync()
        self.extend()

    # Room in the journal

    def extend(self) -> None:
        """Reserve more of the journal when less than half a step is left; blocking.

        A full disk is no error here: then the limits say how much may still be pending.
        """
        if self._reserved_end - self._end < JOURNAL_STEP // 2:
            try:
                self._journal.reserve(JOURNAL_STEP)
                self._reserved_end = self._end + JOURNAL_STEP
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
        self._set_limits()

    def adopt_reservation(self, size: int) -> None:
        """The journal's file is ``size`` bytes long: what lies behind its end is reserved."""
        self._reserved_end = max(self._reserved_end, size)
        self._set_limits()

    def _set_limits(self) -> None:
        room = self._reserved_end - self._end
        self.write_limit = self._runs_in(room - RESERVED)
        self.zero_limit = self._runs_in(room)

    def _runs_in(self, room: int) -> int:
        extents = room // SECTOR * EXTENTS_PER_SECTOR - self._captured
        # A later TRIM can cut a run in two, and adds a run of its own.
        return max(0, extents // 2 - 1)

    # Writers that run in threads

    def begin_write(self) -> None:
        """A write to this layer's data is under way until ``end_write``."""
        self.writers += 1

    def end_write(self) -> None:
        """Pair of ``begin_write``."""
        self.writers -= 1
        if self.writers == 0 and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    async def idle(self) -> None:
        """Wait until no write is under way; only for a sealed head, which gets no new ones."""
        if self.writers:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle

    # The journal's own size

    @property
    def wants_compaction(self) -> bool:
        """Whether the journal has grown well beyond what it says."""
        return self._end > self._compact_at

    async def compact(self, store: LayerStore, blocks: int) -> None:
        """Rewrite the journal as short as it can be; the caller holds ``lock``."""
        name = self.layer.name
        holds = OwnerMap(blocks)
        try:
            await apply_layer(store, name, holds)
            content, sequence = await asyncio.to_thread(
                encode_log, name, JOURNAL, holds.runs(0, blocks), sealed=False
            )
        finally:
            holds.close()
        await with_reserve(
            store, lambda: store.create_log(name, JOURNAL, content + bytes(JOURNAL_STEP))
        )
        journal = await store.open_log(name, JOURNAL, len(content))
        self._journal.close()
        self._journal = journal
        self._sequence = sequence
        self._end = len(content)
        self._reserved_end = self._end + JOURNAL_STEP
        self._compact_at = max(_COMPACT_FROM, 2 * self._end)
        self._set_limits()

    def close(self) -> None:
        """Close the journal; the data belongs to the pool."""
        self._journal.close()


async def open_head(
    store: LayerStore, layer: OpenLayer, slot: int, owners: OwnerMap, blocks: int
) -> Head:
    """Open a head and apply its journal to ``owners``; a torn tail of the journal goes."""
    state = await apply_layer(store, layer.name, owners, slot, 0)
    head = Head(layer, slot, await store.open_log(layer.name, JOURNAL, state.end), state)
    try:
        if state.ragged:
            await head.compact(store, blocks)
        else:
            head.adopt_reservation(state.size)
            await asyncio.to_thread(head.settle)
    except BaseException:
        head.close()
        raise
    return head


def _merged(pending: list[Run]) -> list[tuple[int, int]]:
    """Sorted, and joined where they touch or overlap."""
    merged: list[tuple[int, int]] = []
    for first, last, _ in sorted(pending):
        if merged and first <= merged[-1][1]:
            if last > merged[-1][1]:
                merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged
