"""Giving back the space of what became zero, while the volume goes on being used.

A hole is punched only after the journal's record that makes it zero is durable, and only where the
blocks still are nobody's when they are locked.

A whole-device TRIM can free any number of extents, and a file system takes a tenth of a millisecond
for each. All that time a punch keeps writes to the same file waiting, those on the event loop too,
and the range lock keeps those to its blocks waiting. So the file system is asked first where it
has anything at all, and one call frees one extent, at most LONGEST of it. While the volume is
being written, a range is locked for about two milliseconds, and there is a pause after each call:
who waits for a file's lock in the kernel does not get it from a thread that takes it again at once.

A volume that is closed does not wait for the file system: after GRACE the rest is left. What was
left, by a killed process too, the journal tells when it is read again. Where the head was sealed
meanwhile, the rest is punched once its index is written (merging.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from time import perf_counter, sleep
from typing import Any, Protocol

from backends.layers import DataFile
from snapshots.extent_log import Run
from snapshots.head import Head
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.owner_map import OwnerMap
from snapshots.range_lock import RangeLock
from snapshots.threads import Threads

_log = logging.getLogger(__name__)

# Most blocks of one punch: their pages have to leave the page cache, too.
LONGEST = (8 << 20) >> BLOCK_SHIFT
_LOOKED_UP = 256
_LOCKED = 16
_SECONDS = 2e-3
_PAUSE = 50e-6
GRACE = 0.5
"""Seconds that a volume which is closed goes on punching."""

# Runs that wait to be punched; a TRIM that adds more waits, or they would take any memory.
MOST_WAITING = 1 << 17


class Punched(Protocol):
    """What ``Punching`` needs of its volume."""

    name: str
    head: Head
    owners: OwnerMap

    @property
    def failure(self) -> str | None:
        """Why nothing is written any more."""

    def start_task(self, operation: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that the volume's end waits for."""


class Punching:
    """See the module's text; all methods on the event loop's thread."""

    def __init__(self, volume: Punched, locks: RangeLock, threads: Threads) -> None:
        self._volume = volume
        self._locks = locks
        self._threads = threads
        self._waiting: deque[tuple[Head, Run]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._written = 0
        self._stopped = False

    async def stop(self) -> None:
        """Punch for GRACE and no longer; nothing may be added any more."""
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task], timeout=GRACE)
        self._stopped = True

    def add(self, head: Head, runs: list[Run]) -> None:
        """``runs`` of ``head`` are zero, durably."""
        self._waiting.extend((head, run) for run in runs)
        if self._waiting and (self._task is None or self._task.done()):
            self._task = self._volume.start_task(self._punch())

    async def wait(self) -> None:
        """Return when not too much waits to be punched."""
        while len(self._waiting) > MOST_WAITING:
            if self._room is None:
                self._room = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)

    async def _punch(self) -> None:
        try:
            while self._waiting and not self._stopped:
                head, (first, last, _) = self._waiting.popleft()
                if len(self._waiting) <= MOST_WAITING:
                    self._give_room()
                await self._punch_run(head, first, last)
        except OSError as error:
            _log.warning(
                "volume %s: space is not given back: %s",
                self._volume.name,
                error.strerror or error,
            )
        finally:
            self._waiting.clear()
            self._give_room()

    def _give_room(self) -> None:
        if self._room is not None:
            self._room.set_result(None)
            self._room = None

    async def _punch_run(self, head: Head, first: int, last: int) -> None:
        while first < last and self._may_punch(head):
            ranges = await asyncio.shield(
                self._threads.transfer(find_allocated, head.data, first, last)
            )
            if not ranges:
                return
            first = ranges[-1][1]
            # Whole extents may have been written again: then there is nothing to lock.
            owners = self._volume.owners
            ranges = [hole for start, end in ranges for hole in gaps(owners, start, end)]
            while ranges:
                ranges = await self._punch_some(head, ranges)

    async def _punch_some(self, head: Head, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Punch the first of ``ranges``; returns those that are left."""
        volume = self._volume
        chosen = ranges if head.written == self._written else ranges[:_LOCKED]
        self._written = written = head.written
        async with self._locks.hold(chosen[0][0], chosen[-1][1]):
            if not self._may_punch(head):
                return []
            holes = [hole for start, end in chosen for hole in gaps(volume.owners, start, end)]
            waiting = len(self._locks.entries)

            def disturbs() -> bool:
                if self._stopped:
                    return True
                return head.written != written or len(self._locks.entries) > waiting

            done = await asyncio.shield(
                self._threads.transfer(punch_for_a_while, head.data, holes, disturbs)
            )
        position = holes[done][0] if done < len(holes) else chosen[-1][1]
        return [(max(start, position), end) for start, end in ranges if end > position]

    def _may_punch(self, head: Head) -> bool:
        return self._volume.head is head and not (self._volume.failure or self._stopped)


def find_allocated(data: DataFile, first: int, last: int) -> list[tuple[int, int]]:
    """The first ranges of blocks between ``first`` and ``last`` that may use space; blocking.

    None is longer than LONGEST; [] when there are none.
    """
    ranges: list[tuple[int, int]] = []
    found = data.allocated_ranges(first << BLOCK_SHIFT, (last - first) << BLOCK_SHIFT, _LOOKED_UP)
    position = first
    for offset, length in found:
        start = max(position, offset >> BLOCK_SHIFT)
        position = (offset + length + BLOCK_SIZE - 1) >> BLOCK_SHIFT
        ranges += [(at, min(at + LONGEST, position)) for at in range(start, position, LONGEST)]
    return ranges


def punch_allocated(data: DataFile, first: int, last: int) -> None:
    """Punch blocks ``first`` to ``last`` (exclusive) of a layer that nobody writes; blocking."""
    while first < last:
        ranges = find_allocated(data, first, last)
        if not ranges:
            return
        for start, end in ranges:
            data.punch(start << BLOCK_SHIFT, (end - start) << BLOCK_SHIFT)
        first = ranges[-1][1]


def gaps(owners: OwnerMap, first: int, last: int) -> list[tuple[int, int]]:
    """Blocks between ``first`` and ``last`` that are nobody's, as (start, end)."""
    found = []
    position = first
    for start, end in owners.owned_runs(first, last):
        if start > position:
            found.append((position, start))
        position = end
    if position < last:
        found.append((position, last))
    return found


def punch_for_a_while(
    data: DataFile, holes: list[tuple[int, int]], disturbs: Callable[[], bool]
) -> int:
    """Punch the first of ``holes``, in a thread; how many it were, at least one of them.

    All of them while nothing ``disturbs``.
    """
    end = perf_counter() + _SECONDS
    for done, (first, last) in enumerate(holes):
        if done and disturbs():
            if perf_counter() > end:
                return done
            sleep(_PAUSE)
        data.punch(first << BLOCK_SHIFT, (last - first) << BLOCK_SHIFT)
    return len(holes)
