"""A volume: a view with a writable head on top.

**Write.** Data goes into the head at the offset that it has in the volume. Blocks that the head
does not own yet become its own once they are written whole: where a write covers a block only
in part, what is missing is read from the block's owner first. ``try_write`` does all that on the
event loop when nothing of it waits; ``write`` does it under a range lock, large data in a thread.
Blocks that the head owns already are overwritten in place.

**TRIM, WRITE_ZEROES.** Whole blocks lose their owner, so they read as zeroes at once; the edges are
written. Their space in the head is given back afterwards (punching.py), and that in the layer below
where nobody else sees it (hidden.py).

**FLUSH.** All FLUSHes that wait share one sync: the one that begins after they came. It captures
what is pending and lets the head persist it (head.py). When that fails, the pages that could not
be written may be gone from the cache, and no later sync could tell: the volume refuses writes
and flushes from then on.

**On a full disk** a write may still get space that is reserved for its volume (rationing.py).

**Dirty pages** are bounded: a volume that writes faster than its disk has its writes held for a
while (dirty_pages.py), before the kernel would hold up the event loop.

**The gate** of a snapshot is ``swap_head``: one assignment on the event loop, between two requests.
Writes in threads that began before it end in the old head, which ``finish_seal`` waits for. Until
the snapshot is committed the new head does not exist for a reopened volume, so a FLUSH that comes
in between waits (``commit_begins``, ``commit_ended``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from backends.errors import NoSpaceError, StorageError
from backends.layers import Buffer, LayerStore
from snapshots.dirty_pages import Pacing
from snapshots.extent_log import Run
from snapshots.head import JOURNAL_STEP, Head
from snapshots.hidden import Hidden
from snapshots.layer import OpenLayer, apply_layer
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.owner_map import DATA, ZERO, OwnerMap, Regions
from snapshots.punching import Punching, gaps
from snapshots.range_lock import RangeLock
from snapshots.rationing import Rationing
from snapshots.threads import Threads
from snapshots.view import View

_log = logging.getLogger(__name__)

_BLOCK_MASK = BLOCK_SIZE - 1
# What is copied into the page cache on the event loop; longer writes go to a thread.
INLINE_WRITE = 1024 << 10
# Zeroes are written and locked, and blocks disowned, in pieces of these many bytes.
_ZERO_PIECE = 32 << 20
_TRIM_PIECE = 16 << 30
# Pending runs at which a sync is begun that nobody asked for.
SYNC_FROM = 4096
# The first sync after opening comes early: it reserves ample room in the journal.
_FIRST_SYNC = 256


class Volume(View):
    """A view that is written (see the module's text); all methods on the event loop's thread."""

    read_only = False

    def __init__(
        self,
        name: str,
        size: int,
        owners: OwnerMap,
        threads: Threads,
        store: LayerStore,
        key: str = "",
    ) -> None:
        super().__init__(name, size, owners, threads)
        self.head: Head
        self._failure: str | None = None
        self._refusing = False
        self.on_failure: Callable[[str], None] | None = None
        self._store = store
        self._locks = RangeLock()
        self._current: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._commit: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sealing: list[Head] = []
        self._pacing = Pacing(self, threads)
        self._rationing = Rationing(store, key, threads)
        self._punching = Punching(self, self._locks, threads)
        self.hidden = Hidden(self, threads)

    @property
    def failure(self) -> str | None:
        """Why writes and flushes are refused; None: they are not."""
        return self._failure

    @failure.setter
    def failure(self, why: str | None) -> None:
        self._failure = why
        self._refusing = why is not None
        if why is not None:
            self._pacing.stop()

    def slots_by_depth(self) -> list[int]:
        """The slots of the layers, from the head down: the next head is none of them yet."""
        slots = super().slots_by_depth()
        return slots[slots.index(self.head.slot) :]

    def layer_below(self) -> OpenLayer | None:
        """The layer right below the head."""
        slots = [slot for slot, _ in self.stack]
        index = slots.index(self.head.slot)
        return self.stack[index - 1][1] if index else None

    async def regions_of(self, layer: str) -> set[int]:
        """The regions of the owner map of which a sealed layer has anything; OSError."""
        regions = Regions()
        await apply_layer(self._store, layer, regions)
        return regions.found

    def drop_layer(self, name: str) -> OpenLayer:
        self.hidden.forget()
        return super().drop_layer(name)

    # Writing

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write now, or return False (and do nothing) when that would wait for something."""
        length = len(data)
        end = offset + length
        first = offset >> BLOCK_SHIFT
        last = (end + _BLOCK_MASK) >> BLOCK_SHIFT
        if self._refusing or length > INLINE_WRITE:
            return False
        if self._locks.entries and self._locks.overlaps(first, last):
            return False
        head = self.head
        blocks = last - first
        slot = head.slot
        if self._raw[first] == slot if blocks == 1 else self._raw[first:last].count(slot) == blocks:
            head.data.write(offset, data)
            head.written += length
            if head.written > head.check_at:
                self._pacing.spent()
            return True
        if len(head.pending) >= head.try_limit:
            return False
        if (offset | end) & _BLOCK_MASK:
            whole = self._try_complete(offset, data, first, last)
            if whole is None:
                return False
            offset, data = whole
        try:
            self._put(head, offset, data, first, last)
        except OSError as error:
            if not self._rationing.begins(error):
                raise
            head.ration(begun=True)
            return False
        self._take(head, first, last)
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``; OSError, ENOSPC leaving every block as it was or overwritten."""
        await self._to_its_end(self._write(offset, data))

    async def _write(self, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        first = offset >> BLOCK_SHIFT
        last = (end + _BLOCK_MASK) >> BLOCK_SHIFT
        if first == last:
            return
        if self._pacing.held:
            await self._pacing.wait()
        async with self._locks.hold(first, last):
            self._check_writable()
            if self._raw[first:last].count(self.head.slot) != last - first:
                await self._make_room()
            if (offset | end) & _BLOCK_MASK:
                # Before the write counts as under way: a snapshot waits for those.
                edges = ((offset, first), (end, last - 1))
                await self.await_blocks(block for at, block in edges if at & _BLOCK_MASK)
            head = self.head
            owned = self._raw[first:last].count(head.slot) == last - first
            head.begin_write()
            try:
                if (offset | end) & _BLOCK_MASK:
                    offset, data = await self._complete(head, offset, data, first, last)
                put = functools.partial(self._put_anywhere, head, offset, data, first, last)
                if owned:
                    await put()
                    head.written += len(data)
                    if head.written > head.check_at:
                        self._pacing.spent()
                else:
                    await self._with_space(head, len(data), put)
                    self._take(head, first, last)
            finally:
                head.end_write()

    async def _with_space(
        self, head: Head, length: int, put: Callable[[], Awaitable[None]]
    ) -> None:
        """``put``, which takes new blocks, with whatever space there is for it (rationing.py)."""
        tries = 0
        while True:
            await self._rationing.claim(head, length)
            try:
                await put()
                return
            except OSError as error:
                tries += 1
                if not self._rationing.helps(error, tries):
                    raise
                head.ration(begun=True)

    async def _put_anywhere(
        self, head: Head, offset: int, data: Buffer, first: int, last: int
    ) -> None:
        if len(data) > INLINE_WRITE:
            await asyncio.shield(self._threads.transfer(self._put, head, offset, data, first, last))
        else:
            self._put(head, offset, data, first, last)

    def _put(self, head: Head, offset: int, data: Buffer, first: int, last: int) -> None:
        """Write into the head's data; after an error nothing is left in blocks it does not own."""
        try:
            head.data.write(offset, data)
        except OSError:
            self._give_back(head, first, last)
            raise

    def _put_zeroes(self, head: Head, first: int, last: int) -> None:
        """The same for allocated zeroes."""
        try:
            head.data.write_zeroes(first << BLOCK_SHIFT, (last - first) << BLOCK_SHIFT)
        except OSError:
            self._give_back(head, first, last)
            raise

    def _give_back(self, head: Head, first: int, last: int) -> None:
        """What a failed write left lies hidden where the head owns nothing: free its space."""
        with contextlib.suppress(OSError):
            _punch_all(head, _not_owned_by(self.owners, head.slot, first, last))

    def _try_complete(
        self, offset: int, data: Buffer, first: int, last: int
    ) -> tuple[int, memoryview] | None:
        """Extend a write to whole blocks where the head does not own them; None: would wait."""
        whole, skip, front, back = self._frame(self.head.slot, offset, data, first, last)
        for edge, position in ((front, 0), (back, len(whole) - BLOCK_SIZE)):
            if edge is not None and not self.try_read(
                edge, memoryview(whole)[position : position + BLOCK_SIZE]
            ):
                return None
        whole[skip : skip + len(data)] = data
        return offset - skip, memoryview(whole)

    async def _complete(
        self, head: Head, offset: int, data: Buffer, first: int, last: int
    ) -> tuple[int, memoryview]:
        """``_try_complete`` that waits; the caller holds the range."""
        whole, skip, front, back = self._frame(head.slot, offset, data, first, last)
        for edge, position in ((front, 0), (back, len(whole) - BLOCK_SIZE)):
            if edge is not None:
                await self.read(edge, memoryview(whole)[position : position + BLOCK_SIZE])
        whole[skip : skip + len(data)] = data
        return offset - skip, memoryview(whole)

    def _frame(
        self, slot: int, offset: int, data: Buffer, first: int, last: int
    ) -> tuple[bytearray, int, int | None, int | None]:
        """A buffer for the write and its edges: (buffer, bytes before the data in it, offset of
        the block to read in front, and of the one to read behind; None where none is needed)."""
        end = offset + len(data)
        begin, finish = offset, end
        front = back = None
        if offset & _BLOCK_MASK and self._raw[first] != slot:
            front = begin = first << BLOCK_SHIFT
        if end & _BLOCK_MASK and self._raw[last - 1] != slot:
            finish = last << BLOCK_SHIFT
            if front != finish - BLOCK_SIZE:
                back = finish - BLOCK_SIZE
        return bytearray(finish - begin), offset - begin, front, back

    def _take(self, head: Head, first: int, last: int) -> None:
        self.owners.set(first, last, head.slot)
        head.take(first, last, DATA)
        head.written += (last - first) << BLOCK_SHIFT
        if head.written > head.check_at:
            self._pacing.spent()
        pending = len(head.pending)
        if pending == SYNC_FROM or (pending == _FIRST_SYNC and not head.ample):
            self.start_task(self.flush())

    async def _make_room(self) -> None:
        """Be sure that what the head takes next can be journalled; ENOSPC when it cannot."""
        head = self.head
        if len(head.pending) < head.write_limit:
            return
        await self._sync_head()
        head = self.head
        if len(head.pending) < head.write_limit:
            return
        full = OSError(errno.ENOSPC, "no space left for the journal")
        if not self._rationing.helps(full, 1):
            raise full
        await self._rationing.claim(head, JOURNAL_STEP)
        async with head.lock:
            await self._threads.sync(head.extend)
        head.ration(begun=True)
        if head.sealed or len(head.pending) >= head.write_limit:
            raise full

    def note(self) -> None:
        head = self.head
        pending = head.pending
        if pending and pending[-1] is not head.last_noted:
            head.note()
        for old in self._sealing:
            old.note_late()

    # Zeroes

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Make a range read as zeroes; with ``no_hole`` its space stays allocated."""
        await self._to_its_end(self._zero(offset, length, no_hole))

    async def trim(self, offset: int, length: int) -> None:
        """Drop a range: it reads as zeroes and its space is given back once that is durable."""
        await self._to_its_end(self._zero(offset, length, False))

    async def _zero(self, offset: int, length: int, no_hole: bool) -> None:
        self._check_writable()
        end = offset + length
        inner = (offset + _BLOCK_MASK) & ~_BLOCK_MASK
        inner_end = end & ~_BLOCK_MASK
        if inner >= inner_end:
            await self._zero_edge(offset, end)
            return
        await self._zero_edge(offset, inner)
        piece = _ZERO_PIECE if no_hole else _TRIM_PIECE
        for start in range(inner, inner_end, piece):
            first = start >> BLOCK_SHIFT
            last = min(start + piece, inner_end) >> BLOCK_SHIFT
            if no_hole:
                await self._write_zero_blocks(first, last)
            else:
                await self._disown(first, last)
            await asyncio.sleep(0)
        await self._zero_edge(inner_end, end)

    async def _zero_edge(self, offset: int, end: int) -> None:
        """Zero less than a block, at most across one border; nothing where it is zero already."""
        while offset < end:
            stop = min(end, (offset | _BLOCK_MASK) + 1)
            if self._raw[offset >> BLOCK_SHIFT] or self._locks.entries:
                await self._write(offset, bytes(stop - offset))
            offset = stop

    async def _write_zero_blocks(self, first: int, last: int) -> None:
        async with self._locks.hold(first, last):
            self._check_writable()
            await self._make_room()
            head = self.head
            head.begin_write()
            try:
                await self._with_space(
                    head,
                    (last - first) << BLOCK_SHIFT,
                    lambda: asyncio.shield(
                        self._threads.transfer(self._put_zeroes, head, first, last)
                    ),
                )
                self._take(head, first, last)
            finally:
                head.end_write()

    async def _disown(self, first: int, last: int) -> None:
        await self._punching.wait()
        async with self._locks.hold(first, last):
            self._check_writable()
            # Of what was ever touched all is nobody's from now on. It is noted from the first owned
            # block to the end, as one run: what is not owned in between is zero as it is.
            spans = list(self.owners.touched_spans(first, last))
            runs = [
                (run[0], end)
                for start, end in spans
                if (run := next(self.owners.owned_runs(start, end), None)) is not None
            ]
            head = self.head
            if len(head.pending) + len(runs) > head.zero_limit:
                await self._sync_head()
                head = self.head
                if len(head.pending) + len(runs) > head.zero_limit:
                    raise OSError(errno.ENOSPC, "no space left for the journal")
            for start, end in spans:
                self.owners.set(start, end, 0)
            for start, end in runs:
                head.take_zeroes(start, end)
            if runs and len(head.pending) >= SYNC_FROM:
                self.start_task(self.flush())

    # Flushing

    async def flush(self) -> None:
        """Make every write that completed before durable; OSError when that is impossible."""
        if self._next is None:
            self._next = self.start_task(self._flush_after(self._current))
        await asyncio.shield(self._next)

    async def record(self) -> None:
        """Make durable which blocks were taken or zeroed before, with what they hold; OSError.

        What was written to blocks that the journal has already is left to the kernel, as it is for
        any file that nobody syncs.
        """
        if self.head.pending:
            await self.flush()
        else:
            await self.mark_journal()

    async def mark_journal(self) -> None:
        """Let a journal that nothing is appended to for now end in a mark (extent_log.py)."""
        head = self.head
        if head.marked:
            return
        async with head.lock:
            if head.marked or head.sealed or self._failure is not None:
                return
            try:
                await self._threads.sync(head.mark)
            except OSError as error:
                self.fail(f"a sync failed: {error.strerror or error}")

    async def _flush_after(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        self._current, self._next = self._next, None
        head = None
        while head is not self.head:
            # Once more when a gate came in between: what was written before is in its snapshot.
            while self._commit is not None:
                await asyncio.shield(self._commit)
            head = self.head
            await self._sync_head()

    async def _sync_head(self) -> None:
        """Persist the head, then punch what became zero; FLUSH without waiting for a commit."""
        self._check_failure()
        head = self.head
        async with head.lock:
            self._check_failure()
            if head.sealed:
                return
            if not head.dirty:
                if head.write_limit == 0:
                    await self._threads.sync(head.extend)
                return
            extents = await self._persist(head, head.capture())
            if head.wants_compaction and not head.sealed:
                await self._compact(head)
        self._punching.add(head, [run for run in extents if run[2] == ZERO])
        if head is self.head:
            self.hidden.note(extents)

    async def _persist(self, head: Head, runs: list[Run]) -> list[Run]:
        try:
            return await self._threads.sync(head.persist, runs)
        except OSError as error:
            self.fail(f"a sync failed: {error.strerror or error}")
            raise OSError(errno.EIO, f"volume {self.name}: a sync failed") from error
        except BaseException as error:
            # What was captured is recorded nowhere else: no later sync may claim that it is.
            self.fail(f"a sync failed: {error!r}")
            raise

    async def _compact(self, head: Head) -> None:
        try:
            await head.compact(self._store, self.owners.blocks)
        except NoSpaceError as error:
            # The journal as it was is as good.
            _log.warning("journal of volume %s was not compacted: %s", self.name, error)
        except (OSError, StorageError) as error:
            self.fail(f"its journal could not be rewritten: {error}")

    def fail(self, why: str) -> None:
        """Refuse writes and flushes from now on."""
        self.failure = why
        # What is in the cache may not be what the disk has.
        for head in self.unsynced_heads():
            head.forget_recent()
        if self.on_failure is not None:
            self.on_failure(why)
        _log.error("volume %s is read-only from now on: %s", self.name, why)

    def reclaim(self) -> None:
        """Punch what a killed process recorded as zero and did not get to punch."""
        self._punching.add(self.head, self.head.zeroed)
        self.head.zeroed = []

    # Snapshots

    async def settle(self) -> None:
        """Sync until so little is pending that what follows the gate is short."""
        for _ in range(5):
            await self._sync_head()
            if len(self.head.pending) < SYNC_FROM // 8:
                return

    def freeze(self) -> Callable[[], None]:
        """Let writes wait that have not begun, until the returned function is called.

        For a gate over several processes: each freezes its volumes, and when all have, each swaps
        its heads. So no write that begins after one swap can be on this side of another.
        """
        return self._locks.bar(0, self.owners.blocks)

    def commit_begins(self) -> None:
        """FLUSHes wait from here until ``commit_ended``."""
        assert self._commit is None, "commits of one volume do not overlap"
        self._commit = asyncio.get_running_loop().create_future()

    def commit_ended(self) -> None:
        """FLUSHes go on."""
        if self._commit is not None:
            self._commit.set_result(None)
            self._commit = None
            if self.head.recent is not None:
                self.head.recent.follow(None)

    def swap_head(self, head: Head) -> tuple[Head, list[Run]]:
        """The gate: write into ``head`` from now on. Returns the old head and its last extents."""
        old = self.head
        runs = old.capture(turn=False)
        old.sealed = True
        if head.recent is not None:
            head.recent.follow(old.layer.name)
        self._sealing.append(old)
        head.check_at = head.written + max(0, old.check_at - old.written)
        head.ration(begun=old.rationed)
        self.head = head
        self.hidden.forget()
        return old, runs

    async def finish_seal(self, old: Head, runs: list[Run]) -> None:
        """Wait for what was being written to the sealed head, and make all of it durable."""
        try:
            await self.hidden.idle()
            await old.idle()
            async with old.lock:
                self._check_failure()
                await self._persist(old, runs)
                if old.late:
                    await self._persist(old, old.late)
                old.forget_recent()
        finally:
            self._sealing.remove(old)

    def unsynced_heads(self) -> list[Head]:
        """The head, and those that were sealed but are not durable yet."""
        return [self.head, *self._sealing]

    def hold_writes(self, held: bool) -> None:
        """Let ``try_write`` refuse, or not (see dirty_pages.py)."""
        self._refusing = held or self._failure is not None

    def grow(self, size: int) -> None:
        """Make the volume ``size`` bytes long, which is more than it has; the rest is zeroes."""
        self.owners, old = self.owners.grown(size >> BLOCK_SHIFT), self.owners
        self._raw = self.owners.raw
        self.size = size
        old.close()

    # Ends

    async def quiesce(self) -> None:
        """Wait for every operation that was begun; the caller makes sure that none comes after."""
        self._pacing.stop()
        self.hidden.stop()
        await self._punching.stop()
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await self.reads_before_now()

    def _check_failure(self) -> None:
        if self.failure:
            raise OSError(errno.EIO, f"volume {self.name} is read-only: {self.failure}")

    _check_writable = _check_failure

    async def _to_its_end(self, operation: Coroutine[Any, Any, None]) -> None:
        """Run ``operation`` in a task that a cancelled caller leaves behind, not half done."""
        await asyncio.shield(self.start_task(operation))

    def start_task(self, operation: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``operation`` in a task that ``quiesce`` waits for."""
        task = asyncio.get_running_loop().create_task(operation)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever waited has it too; a task nobody waited for has noted its failure already.
            task.exception()


def _not_owned_by(owners: OwnerMap, slot: int, first: int, last: int) -> list[tuple[int, int]]:
    others = gaps(owners, first, last)
    others += [(start, end) for start, end, owner in owners.runs(first, last) if owner != slot]
    return others


def _punch_all(head: Head, holes: list[tuple[int, int]]) -> None:
    for first, last in holes:
        head.data.punch(first << BLOCK_SHIFT, (last - first) << BLOCK_SHIFT)
