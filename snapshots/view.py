"""A view: one state of a volume that can be read, as a stack of layers under an owner map.

A snapshot export is a view; a volume is a view that is written as well (volume.py). Every layer of
the stack has a **slot**, a byte value of the owner map; slots say nothing of order, so a merge
or a new head touches only the blocks that it is about.

A read looks at the owners of its blocks. One owner, the usual case, means one read of that layer's
data at the same offset; several mean one for each run. ``try_read`` does that on the event loop,
as long as the page cache has it; ``read`` finishes in a thread what is not.

What is not here at all, only in a repository (lazy.py), ``read`` waits for without a thread.

A read in a thread goes by the owners that it saw when it began. Whoever takes bytes away from
a layer (a merge, closing) changes the owner map first and then waits for ``reads_before_now``.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable, Iterable
from itertools import islice
from time import monotonic
from typing import Any

from backends.errors import CorruptError, UnavailableError
from backends.layers import DataFile, LayerStore
from snapshots.cold_reads import Part
from snapshots.layer import LayerPool, OpenLayer, apply_layer, apply_merge, check_no_merge
from snapshots.lending import MIN_LOAN, Borrower, wait_for_loans
from snapshots.manifest import MAX_LAYERS, Merge
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.owner_map import OwnerMap
from snapshots.readahead import Readahead
from snapshots.runs import blocks_of, runs_in_bytes
from snapshots.threads import Threads

_ZEROES = bytes(1 << 20)
_BLOCK_MASK = BLOCK_SIZE - 1
# For so long after a read that waited for a disk nothing is lent.
_COLD_SECONDS = 0.1
# Most runs that are asked for ahead of a stream: finding them takes a microsecond each.
_AHEAD_RUNS = 256
_RUNS = re.compile(rb"(.)\1*", re.DOTALL).finditer


class View:
    """Read access to one state of a volume; all methods on the event loop's thread.

    Offsets and lengths are in bytes and lie within ``size``: whoever faces a client checks that.
    """

    read_only = True
    block_size = BLOCK_SIZE

    def __init__(self, name: str, size: int, owners: OwnerMap, threads: Threads) -> None:
        self.name = name
        self.size = size
        self.owners = owners
        self.stack: list[tuple[int, OpenLayer]] = []
        self._raw = owners.raw
        self._files: list[DataFile | None] = [None] * 256
        self._readers: list[Callable[[int, memoryview], bool]] = [_read_zeroes] * 256
        self._lenders: list[Callable[[int, int], tuple[int, int] | None]] = [_lend_nothing] * 256
        self._lent = False
        self._cold_until = 0.0
        self.borrowers: set[Borrower] = set()
        self.closed = False
        self._threads = threads
        self._reading: set[asyncio.Future[Any]] = set()
        self._arriving: set[asyncio.Future[None]] = set()
        self._readahead = Readahead()

    # Stack

    def free_slot(self) -> int:
        """A slot that no layer of the stack has."""
        used = {slot for slot, _ in self.stack}
        return next(slot for slot in range(1, 256) if slot not in used)

    def push_layer(self, layer: OpenLayer) -> int:
        """Put a layer on top of the stack and return its slot; it owns no block yet."""
        slot = self.free_slot()
        self.stack.append((slot, layer))
        self._files[slot] = layer.data
        self._readers[slot] = layer.data.try_read
        self._lenders[slot] = layer.data.lend
        return slot

    def drop_layer(self, name: str) -> OpenLayer:
        """Take a layer that owns no block any more out of the stack."""
        index, slot = next(
            (index, slot) for index, (slot, layer) in enumerate(self.stack) if layer.name == name
        )
        _, layer = self.stack.pop(index)
        self._files[slot] = None
        self._readers[slot] = _read_zeroes
        self._lenders[slot] = _lend_nothing
        return layer

    def replace_data(self, name: str, data: DataFile) -> None:
        """Read a layer of the stack from ``data`` from now on, which holds the same."""
        slot = self.slot_of(name)
        if slot is not None:
            self._files[slot] = data
            self._readers[slot] = data.try_read
            self._lenders[slot] = data.lend

    def slot_of(self, name: str) -> int | None:
        """The slot of a layer, None when it is not in the stack."""
        return next((slot for slot, layer in self.stack if layer.name == name), None)

    def slots_by_depth(self) -> list[int]:
        """The slots of the layers, from the top of the stack down."""
        return [slot for slot, _ in reversed(self.stack)]

    def note(self) -> None:
        """See to it that a process which comes after a kill of this one finds what was done.

        Called before a client is answered.
        """

    # Reading

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` now, or return False when that would wait for a disk."""
        end = offset + len(buffer)
        first = offset >> BLOCK_SHIFT
        last = (end + _BLOCK_MASK) >> BLOCK_SHIFT
        if last - first == 1:
            return self._readers[self._raw[first]](offset, buffer)
        owners = self._raw[first:last]
        if not owners:
            return True
        owner = owners[0]
        if owners.count(owner) == last - first:
            return self._readers[owner](offset, buffer)
        position = 0
        for run in _RUNS(owners):
            stop = min((first + run.end()) << BLOCK_SHIFT, end) - offset
            read = self._readers[owners[run.start()]]
            if not read(offset + position, buffer[position:stop]):
                return False
            position = stop
        return True

    def try_lend(self, offset: int, length: int) -> list[tuple[int, int, int]] | None:
        """What to send a range from: pieces (descriptor, position, length), in order.

        None unless every piece is data of at least MIN_LOAN bytes, and in the page cache. The
        caller is one of the ``borrowers`` (lending.py has what that means).
        """
        if monotonic() < self._cold_until:
            return None
        end = offset + length
        first = offset >> BLOCK_SHIFT
        last = (end + _BLOCK_MASK) >> BLOCK_SHIFT
        owners = self._raw[first:last]
        pieces = []
        position = offset
        for run in _RUNS(owners):
            stop = min((first + run.end()) << BLOCK_SHIFT, end)
            loan = stop - position >= MIN_LOAN and self._lenders[owners[run.start()]](
                position, stop - position
            )
            if not loan:
                return None
            pieces.append((*loan, stop - position))
            position = stop
        self._lent = True
        return pieces

    def stop_lending(self, layer: str) -> bool:
        """Lend nothing of a layer from now on; whether anything may be on loan."""
        slot = self.slot_of(layer)
        if slot is None:
            return False
        self._lenders[slot] = _lend_nothing
        return self._lent

    async def wait_for_loans(self) -> None:
        """Wait until everything lent is back; UnavailableError."""
        if not await wait_for_loans(self.borrowers):
            raise UnavailableError(
                f"a client of {self.name} does not take its replies: the space of deleted snapshots"
                " comes back once it does"
            )

    async def loans_before_now(self) -> None:
        """The same when anything was ever lent."""
        if self._lent:
            await self.wait_for_loans()

    def is_data(self, offset: int, length: int) -> bool:
        """Whether every block of a range holds data, so that no part of it is a hole."""
        last = (offset + length + _BLOCK_MASK) >> BLOCK_SHIFT
        return self._raw.find(b"\0", offset >> BLOCK_SHIFT, last) < 0

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, in a thread where that waits for a disk; OSError."""
        waiting: list[Part] = []
        for start, part, file in self.parts(offset, buffer):
            if file is None:
                _fill_zeroes(part)
            else:
                waiting.append((file, start, part))
        if waiting:
            # What is cached may be on its way from the disk, and sending it would wait.
            self._cold_until = monotonic() + _COLD_SECONDS
            ahead = self._readahead.missed(offset, len(buffer))
            if ahead is not None:
                self._read_ahead(*ahead)
            arriving = [
                arrival
                for file, start, part in waiting
                if (arrival := file.arrival(start, len(part))) is not None
            ]
            reading: asyncio.Future[Any]
            if arriving:
                reading = asyncio.ensure_future(self._read_arriving(arriving, waiting))
            else:
                reading = self._threads.cold_reads.read(waiting)
            self.note_reading(reading)
            await asyncio.shield(reading)

    async def _read_arriving(
        self, arriving: list[asyncio.Future[None]], waiting: list[Part]
    ) -> None:
        """Read when everything that is not here yet has come; OSError when it does not."""
        await self._await_all(arriving)
        await self._threads.cold_reads.read(waiting)

    async def await_blocks(self, blocks: Iterable[int]) -> None:
        """Wait until these blocks can be read without waiting for more than a disk; OSError."""
        arriving = []
        for block in blocks:
            file = self._files[self._raw[block]]
            arrival = file and file.arrival(block << BLOCK_SHIFT, BLOCK_SIZE)
            if arrival:
                arriving.append(arrival)
        if arriving:
            await self._await_all(arriving)

    async def _await_all(self, arriving: list[asyncio.Future[None]]) -> None:
        self._arriving.update(arriving)
        if self.closed:
            self.stop_waiting()
        try:
            await asyncio.wait(arriving)
        finally:
            self._arriving.difference_update(arriving)
        errors = [error for arrival in arriving if (error := arrival.exception()) is not None]
        if errors:
            raise errors[0]

    def stop_waiting(self) -> None:
        """Let reads fail that wait for something to arrive: nobody waits for them any more."""
        for arrival in self._arriving:
            if not arrival.done():
                arrival.set_exception(OSError(errno.EIO, f"{self.name} is closed"))

    def parts(
        self, offset: int, buffer: memoryview
    ) -> list[tuple[int, memoryview, DataFile | None]]:
        """Cut a read where the owner changes: (offset, part of the buffer, data or None)."""
        parts: list[tuple[int, memoryview, DataFile | None]] = []
        end = offset + len(buffer)
        first = offset >> BLOCK_SHIFT
        last = (end + _BLOCK_MASK) >> BLOCK_SHIFT
        position = offset
        for start, stop, owner in self.owners.runs(first, last):
            begin = max(start << BLOCK_SHIFT, offset)
            finish = min(stop << BLOCK_SHIFT, end)
            if begin > position:
                parts.append((position, buffer[position - offset : begin - offset], None))
            part = buffer[begin - offset : finish - offset]
            parts.append((begin, part, self._files[owner]))
            position = finish
        if position < end:
            parts.append((position, buffer[position - offset :], None))
        return parts

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """Up to ``limit`` runs (length in bytes, holds data) from ``offset`` on, alternating.

        They may end before the range does: no more of it is looked at than ``OwnerMap.reach``.
        """
        first, last = blocks_of(offset, length)
        last = self.owners.reach(first, last)
        runs = ((start, end, True) for start, end in self.owners.owned_runs(first, last))
        return runs_in_bytes(runs, offset, min(offset + length, last << BLOCK_SHIFT), limit, False)

    async def cache(self, offset: int, length: int) -> None:
        """Ask for a range to be brought into the page cache."""
        await asyncio.shield(self._cache(self._wanted(offset, length)))

    def _read_ahead(self, offset: int, length: int) -> None:
        """Ask for what a stream comes to next; in one file the kernel does that by itself."""
        wanted = self._wanted(offset, max(0, min(length, self.size - offset)), _AHEAD_RUNS)
        if len(wanted) > 1:
            # What is wrong with a disk, the read itself will tell.
            self._cache(wanted).add_done_callback(lambda done: done.exception())

    def _wanted(
        self, offset: int, length: int, limit: int | None = None
    ) -> list[tuple[DataFile, int, int]]:
        """What a range, or its first ``limit`` runs, is made of: (data, offset, length)."""
        first = offset >> BLOCK_SHIFT
        last = (offset + length + _BLOCK_MASK) >> BLOCK_SHIFT
        wanted = []
        for start, stop, owner in islice(self.owners.runs(first, last), limit):
            file = self._files[owner]
            if file is not None:
                wanted.append((file, start << BLOCK_SHIFT, (stop - start) << BLOCK_SHIFT))
        return wanted

    def _cache(self, wanted: list[tuple[DataFile, int, int]]) -> asyncio.Future[None]:
        def cache_all() -> None:
            for file, start, count in wanted:
                file.cache(start, count)

        reading = self._threads.transfer(cache_all)
        self.note_reading(reading)
        return reading

    def note_reading(self, reading: asyncio.Future[Any]) -> None:
        """Something uses the layers in a thread: ``reads_before_now`` waits for it."""
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)

    async def reads_before_now(self) -> None:
        """Wait for every read in a thread that began before this call."""
        if self._reading:
            await asyncio.wait(set(self._reading))

    # What a read-only export refuses; the server never gets this far.

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Refused: snapshots are immutable."""
        raise OSError(errno.EPERM, "a snapshot is read-only")

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Refused: snapshots are immutable."""
        raise OSError(errno.EPERM, "a snapshot is read-only")

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Refused: snapshots are immutable."""
        raise OSError(errno.EPERM, "a snapshot is read-only")

    async def trim(self, offset: int, length: int) -> None:
        """Refused: snapshots are immutable."""
        raise OSError(errno.EPERM, "a snapshot is read-only")

    async def flush(self) -> None:
        """Nothing to do: a snapshot's layers were made durable before it existed."""

    async def record(self) -> None:
        """Nothing to do either."""


async def load_stack(
    view: View,
    layers: list[str],
    merges: dict[str, Merge],
    store: LayerStore,
    pool: LayerPool,
) -> None:
    """Open sealed ``layers``, oldest first, into an empty view.

    ``merges`` are the merges under way, by the layer that takes over: what it took over already
    is in its merge log, which counts from the upper one of the two layers on. CorruptError when
    there is such a log and no such merge.
    """
    if len(layers) > MAX_LAYERS:
        raise CorruptError(f"{view.name}: {len(layers)} layers, at most {MAX_LAYERS} are possible")
    upper = {merge.upper: merge for merge in merges.values()}
    for name in layers:
        slot = view.push_layer(await pool.acquire(name))
        await apply_layer(store, name, view.owners, slot, 0)
        if any(merge.source == name for merge in merges.values()):
            view.stop_lending(name)
        if name not in merges:
            await check_no_merge(store, name, view.owners.blocks)
        merge = upper.get(name)
        if merge is not None:
            target = view.slot_of(merge.target)
            if target is not None:
                await apply_merge(store, merge.target, view.owners, target, 0)


def _read_zeroes(offset: int, buffer: memoryview) -> bool:
    """``try_read`` of the owner 0, nobody."""
    _fill_zeroes(buffer)
    return True


def _lend_nothing(offset: int, length: int) -> tuple[int, int] | None:
    """``lend`` of the owner 0, and of layers that lend nothing."""
    return None


def _fill_zeroes(buffer: memoryview) -> None:
    length = len(buffer)
    if length <= len(_ZEROES):
        buffer[:] = _ZEROES[:length]
        return
    for start in range(0, length, len(_ZEROES)):
        part = buffer[start : start + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]
