"""The head: the one writable layer of a volume, and its journal.

What a head has taken since its last sync is **pending**: runs of blocks with what they became, data
or zero, in the order of their coming, later ones over earlier ones. ``capture`` takes them, which
costs the event loop nothing, and ``persist`` makes them durable, in a thread:

1. turn them into extents for the journal,
2. fdatasync of the data,
3. append the extents to the journal,
4. fdatasync of the journal.

The other order would, after a power cut, show zeroes or older bytes where the journal claims data.

Until then **recent** files say what is pending, to a process that comes after this one was killed
(recent.py): ``note`` is called before a client is answered.

**Room.** A write that takes new blocks must be sure that its journal record will fit, however full
the disk gets. Space for the journal is reserved ahead of its end; ``room(RESERVED)`` is how many
runs may be pending for a write, ``room(0)`` for what must go on when the disk is full (TRIM,
WRITE_ZEROES): a part of the reservation is theirs alone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from heapq import heappop, heappush

from backends.errors import CorruptError
from backends.layers import LayerStore, LogFile
from snapshots.examining import examine_log, missing_from
from snapshots.extent_log import (
    EXTENTS_PER_SECTOR,
    JOURNAL,
    SECTOR,
    LogState,
    Run,
    encode_extents,
    encode_header,
    encode_log,
    encode_mark,
)
from snapshots.layer import OpenLayer, apply_layer
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import DATA, ZERO, OwnerMap
from snapshots.recent import Found, Recent, open_recent, read_recent
from snapshots.reserve import with_reserve

JOURNAL_STEP = 256 << 10
# Where there is space: enough for what becomes pending while a slow disk syncs, 45,000 runs.
_AMPLE = 1 << 20
RESERVED = 64 << 10
_COMPACT_FROM = 8 << 20


_log = logging.getLogger(__name__)


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
        # Bytes written to the data so far; how many of them a sync took up, and how many it synced.
        self.written = 0
        self._begun = 0
        self.synced = 0
        self.check_at = 0
        self.pending: list[Run] = []
        self.late: list[Run] = []
        self.sealed = False
        self.writers = 0
        self.lock = asyncio.Lock()
        self._journal = journal
        self._sequence = state.sequence
        self._end = state.end
        self.marked = state.marked
        self._reserved_end = state.end
        self._compact_at = _COMPACT_FROM
        # Why nothing may be written here, if so.
        self.damage: str | None = None
        # Of what was zero already when the head was opened, some may still use space.
        self.zeroed = [(first, last, ZERO) for first, last in state.zeroed]
        self._zeroed = False
        self._captured = 0
        self._idle: asyncio.Future[None] | None = None
        self.write_limit = 0
        # The same for writes that cannot ask for space first (rationing.py).
        self.try_limit = 0
        self.rationed = False
        self.zero_limit = 0
        self.recent: Recent | None = None
        self.last_noted: Run | None = None
        self._noted = 0
        self._noted_late = 0
        # A volume that is only looked at needs no more than the first step.
        self.ample = False

    # Pending extents

    def take(self, first: int, last: int, kind: int) -> None:
        """Blocks ``first`` to ``last`` (exclusive) are now this head's (DATA) or nobody's (ZERO).

        Only runs of one kind are joined: so n pending runs never become more than 2n extents,
        and the room for them can be counted.
        """
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

    def take_zeroes(self, first: int, last: int) -> None:
        """Blocks ``first`` to ``last`` (exclusive) are nobody's any more."""
        self._zeroed = True
        self.take(first, last, ZERO)

    @property
    def dirty(self) -> bool:
        """Whether anything came after the last ``capture``."""
        return self.written != self._begun or bool(self.pending)

    def note(self) -> None:
        """Write down what is pending: whoever was answered may rely on it after a kill.

        The last run that was noted may have grown since, and is noted once more.
        """
        pending = self.pending
        if pending and pending[-1] is not self.last_noted:
            grown = self._noted and pending[self._noted - 1] is not self.last_noted
            self._note(pending[self._noted - 1 if grown else self._noted :])
            self._noted = len(pending)
            self.last_noted = pending[-1]

    def note_late(self) -> None:
        """The same for a sealed head: what is pending was noted when it was captured."""
        if len(self.late) > self._noted_late:
            self._note(self.late[self._noted_late :])
            self._noted_late = len(self.late)

    def _note(self, runs: list[Run]) -> None:
        if self.recent is None:
            return
        try:
            self.recent.note(runs)
        except OSError as error:
            _log.warning(
                "layer %s: what is not flushed would be lost if this process were killed: %s",
                self.layer.name,
                error.strerror or error,
            )

    def capture(self, *, turn: bool = True) -> list[Run]:
        """Take what is pending, for ``persist``; none is pending then.

        Without ``turn``, when a ``persist`` may be under way, what comes late is noted behind it.
        """
        self.note()
        if turn and self.recent is not None:
            self.recent.turn()
        runs = self.pending
        self.pending = []
        self._noted = 0
        self.last_noted = None
        # Runs of data alone are never cut in two (see ``flatten``).
        self._captured = 2 * len(runs) if self._zeroed else len(runs)
        self._zeroed = False
        self._begun = self.written
        self._set_limits()
        return runs

    def persist(self, runs: list[Run]) -> list[Run]:
        """Sync the data, then record captured ``runs`` durably; blocking, in a thread.

        Returns the extents that they are.
        """
        extents = flatten(runs)
        begun = self._begun
        self.data.sync()
        self.synced = begun
        if extents:
            sectors = b"".join(encode_extents(self.layer.name, extents, self._sequence))
            self._journal.append(sectors)
            self._journal.sync()
            self._sequence += len(sectors) // SECTOR
            self._end += len(sectors)
            self.marked = False
        self._captured = 0
        self.extend(ample=True)
        return extents

    def mark(self) -> None:
        """Let the journal end in a mark, if there is room; blocking, in a thread."""
        if self._reserved_end - self._end < 2 * SECTOR:
            return
        self._journal.append(encode_mark(self.layer.name, self._sequence))
        self._journal.sync()
        self._sequence += 1
        self._end += SECTOR
        self.marked = True
        self.extend()

    def settle(self) -> None:
        """Make what is found durable, and reserve room; blocking.

        A killed process may have written what it never synced. Clients that read it and then FLUSH
        rely on it; and what is appended next to the journal says that all before it is durable.
        """
        self.data.sync()
        self._journal.sync()
        self.extend()

    def make_ready(self, spans: list[tuple[int, int]]) -> None:
        """Be ready for many writes at once, as the next head of a snapshot must be; blocking.

        ``spans`` of blocks are where they are likely: none of them shall have to create a file
        first, nor wait for room in the journal.
        """
        if not spans:
            return
        for first, last in spans:
            self.data.prepare(first << BLOCK_SHIFT, (last - first) << BLOCK_SHIFT)
        self.data.sync()
        self.extend(ample=True)

    # Room in the journal

    def extend(self, *, ample: bool = False) -> None:
        """Reserve more of the journal when there is not enough, or not ample room; blocking.

        A full disk is no error here: then the limits say how much may still be pending.
        """
        self.ample = self.ample or ample
        for wanted in (_AMPLE, JOURNAL_STEP) if ample else (JOURNAL_STEP,):
            if self._reserved_end - self._end >= wanted - JOURNAL_STEP // 2:
                break
            try:
                self._journal.reserve(wanted)
                self._reserved_end = self._end + wanted
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
        self._set_limits()

    def adopt_reservation(self, size: int) -> None:
        """The journal's file is ``size`` bytes long: what lies behind its end is reserved."""
        self._reserved_end = max(self._reserved_end, size)
        self._set_limits()

    def ration(self, *, begun: bool) -> None:
        """Let no write take new blocks without asking for space first, or any write again."""
        self.rationed = begun
        self._set_limits()

    def _set_limits(self) -> None:
        # A mark, and the zeroes that end the log.
        room = self._reserved_end - self._end - 2 * SECTOR
        self.write_limit = self._runs_in(room - RESERVED)
        self.zero_limit = self._runs_in(room)
        self.try_limit = 0 if self.rationed else self.write_limit

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
        self.marked = True
        self._reserved_end = self._end + JOURNAL_STEP
        self._compact_at = max(_COMPACT_FROM, 2 * self._end)
        self._set_limits()

    async def check_journal(self, store: LayerStore, blocks: int, failed: bool) -> None:
        """CorruptError when the journal or the data is shorter than it was written; OSError.

        Where the journal of a volume that ``failed`` ends, nobody knows.
        """
        name = self.layer.name
        where = store.describe(name, JOURNAL)
        content = await store.read_log(name, JOURNAL)
        if content is None:
            raise CorruptError(f"{where}: is missing")
        state = await examine_log(content, name, JOURNAL, blocks, where)
        if not failed and state.end != self._end:
            raise CorruptError(f"{where}: ends at offset {state.end}, {self._end} expected")
        missing = await asyncio.to_thread(missing_from, self.data, state)
        if missing is not None:
            raise CorruptError(missing)

    def forget_recent(self) -> None:
        """The journal has everything, or what was written is lost."""
        if self.recent is not None:
            self.recent.remove()
            self.recent = None

    def close(self) -> None:
        """Close the journal; the data belongs to the pool."""
        if self.recent is not None and not (self.pending or self._captured or self.late):
            self.forget_recent()
        elif self.recent is not None:
            self.recent.close()
        self._journal.close()


async def open_head(
    store: LayerStore, layer: OpenLayer, slot: int, owners: OwnerMap, blocks: int
) -> Head:
    """Open a head and apply its journal to ``owners``; a torn tail of the journal goes."""
    state = await apply_layer(store, layer.name, owners, slot, 0)
    damage = missing_from(layer.data, state)
    found = await read_recent(store, layer.name)
    head = Head(layer, slot, await store.open_log(layer.name, JOURNAL, state.end), state)
    head.damage = damage
    try:
        if state.ragged:
            await head.compact(store, blocks)
        else:
            head.adopt_reservation(state.size)
        await _adopt(store, head, owners, found)
        head.recent = await open_recent(store, layer.name, found)
    except BaseException:
        head.close()
        raise
    return head


async def _adopt(store: LayerStore, head: Head, owners: OwnerMap, found: Found) -> None:
    """Make durable what a killed process left, and reserve room."""
    for first, last, kind in found.runs:
        owners.set(first, last, head.slot if kind == DATA else 0)
        if kind == DATA:
            head.take(first, last, DATA)
        else:
            head.take_zeroes(first, last)
    head.zeroed += [run for run in found.runs if run[2] == ZERO]
    try:
        await asyncio.to_thread(head.settle)
        if found.runs:
            await asyncio.to_thread(head.persist, head.capture())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            # Of what was in the cache some is lost: nothing may be taken for written the next time.
            for name in found.files:
                await store.delete_log(head.layer.name, name)
        raise


def flatten(runs: list[Run]) -> list[Run]:
    """What blocks are in the end, after ``runs`` in the order of their coming: as extents.

    Those are ascending and disjoint; n runs become at most 2n extents, and at most n when all
    are of one kind.
    """
    if len({kind for _, _, kind in runs}) < 2:
        return _joined(runs)
    starts = sorted((first, -order, last, kind) for order, (first, last, kind) in enumerate(runs))
    begun: list[tuple[int, int, int]] = []  # a heap of (order, end, kind), the latest first
    extents: list[Run] = []
    position = 0
    index = 0
    while True:
        while begun and begun[0][1] <= position:
            heappop(begun)
        if not begun:
            if index == len(starts):
                return extents
            position = max(position, starts[index][0])
        while index < len(starts) and starts[index][0] <= position:
            _, order, last, kind = starts[index]
            heappush(begun, (order, last, kind))
            index += 1
        _, last, kind = begun[0]
        if last <= position:
            continue
        if index < len(starts):
            last = min(last, starts[index][0])
        if extents and extents[-1][1] == position and extents[-1][2] == kind:
            extents[-1] = (extents[-1][0], last, kind)
        else:
            extents.append((position, last, kind))
        position = last


def _joined(runs: list[Run]) -> list[Run]:
    """Runs of one kind, sorted, and joined where they touch or overlap."""
    joined: list[Run] = []
    end = -1
    for run in sorted(runs):
        if run[0] > end:
            joined.append(run)
            end = run[1]
        elif run[1] > end:
            end = run[1]
            joined[-1] = (joined[-1][0], end, run[2])
    return joined
