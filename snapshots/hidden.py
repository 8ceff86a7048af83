"""Giving back what a head hides in the layer right below it, where nobody else sees that layer.

When no snapshot ends on the layer below a head and no other layer stands on it, it is the head's
**own**. Only a snapshot could be cloned or rolled back to, so it stays the head's own until the
next snapshot makes another layer the head. Then what the head has taken or zeroed is never read
from it again, and its space is freed: no block is stored twice, and TRIM gives space back whichever
of the two layers holds it. The layer's index still lists such blocks; above it the head's
journal, and later its index, says otherwise.

The catalogue says which layer is the head's own, after a deletion and every few seconds
(freeing.py). A **pass** looks at all regions of the layer at first, and then at those where the
journal has grown. For each part of the layer that the file system has something of:

1. With no sync of the journal under way: take the blocks that are the head's or nobody's, without
   those that are pending. So the journal has them, durably.
2. Wait for reads that began before in a thread, and for what was lent (lending.py).
3. Punch them.

Hidden blocks stay hidden, so nothing needs to be locked, and nothing to be looked at again. After
the gate of a snapshot a merge may copy what the sealed head holds into this layer, right where
it was hidden: so a pass ends there, and the seal waits for the punch in hand.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, Protocol, TypeVar

from backends.errors import StorageError
from snapshots.extent_log import Run
from snapshots.head import Head
from snapshots.layer import OpenLayer
from snapshots.owner_map import REGION, REGION_SHIFT, OwnerMap
from snapshots.punching import find_allocated, punch_for_a_while
from snapshots.threads import Threads

_log = logging.getLogger(__name__)

# Ranges of at most 8 MiB that are compared with the owner map at a time: some milliseconds.
_COMPARED = 16
# Holes that are found before the first of them is punched: loans take a second to wait for.
_TOGETHER = 8192
# Seconds between punches while the volume is written: as long as those took.
_PAUSE = 2e-3

P = ParamSpec("P")
T = TypeVar("T")


class Covered(Protocol):
    """What ``Hidden`` needs of its volume."""

    name: str
    head: Head
    owners: OwnerMap

    @property
    def failure(self) -> str | None:
        """Why nothing is written any more."""

    def layer_below(self) -> OpenLayer | None:
        """The layer right below the head."""

    async def regions_of(self, layer: str) -> set[int]:
        """The regions of which a sealed layer has anything; OSError, StorageError."""

    def start_task(self, operation: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that the volume's end waits for."""

    def note_reading(self, reading: asyncio.Future[Any]) -> None:
        """No layer may be closed before ``reading`` is done."""

    async def record(self) -> None:
        """Make durable what is pending."""

    async def reads_before_now(self) -> None:
        """Wait for reads in threads."""

    async def loans_before_now(self) -> None:
        """Wait for what was lent; UnavailableError."""


class Hidden:
    """See the module's text; all methods on the event loop's thread."""

    def __init__(self, volume: Covered, threads: Threads) -> None:
        self._volume = volume
        self._threads = threads
        self._own: OpenLayer | None = None
        self._everywhere = False
        self._regions: set[int] = set()
        self._pass: asyncio.Task[None] | None = None
        self._punch: asyncio.Future[int] | None = None
        self._loans: asyncio.Task[None] | None = None
        self._written = 0
        self._broken = False

    # What the volume tells

    def note(self, extents: list[Run]) -> None:
        """The journal has these extents of the head, durably."""
        if self._own is not None:
            for first, last, _ in extents:
                self._regions.update(range(first >> REGION_SHIFT, ((last - 1) >> REGION_SHIFT) + 1))

    def forget(self) -> None:
        """The stack changes: nothing is the head's own until that is said again."""
        self._own = None
        self._everywhere = False
        self._regions.clear()
        if self._loans is not None:
            self._loans.cancel()

    async def idle(self) -> None:
        """Wait for the punch in hand; after ``forget`` no other follows."""
        if self._punch is not None:
            await asyncio.wait([self._punch])

    def stop(self) -> None:
        """The volume is closed; what is left is found when it is opened again."""
        self._broken = True
        self.forget()

    # What the catalogue tells

    async def free(self, layer: str | None) -> None:
        """The layer of that name is the head's own (None: still); return when a pass has ended."""
        volume = self._volume
        if layer is not None and not self._broken:
            below = volume.layer_below()
            if below is not None and below.name == layer and below is not self._own:
                self._own = below
                self._everywhere = True
        if self._pass is not None and not self._pass.done():
            await asyncio.wait([self._pass])
        if self._own is None or not (self._everywhere or self._regions):
            return
        if self._pass is None or self._pass.done():
            self._pass = volume.start_task(self._run(self._own))
        await asyncio.wait([self._pass])

    # A pass

    async def _run(self, own: OpenLayer) -> None:
        volume = self._volume
        regions: list[int] = []
        everywhere = False
        try:
            if volume.head.pending and not volume.failure:
                await volume.record()
            if not self._may_punch(own):
                return
            regions, everywhere = sorted(self._regions), self._everywhere
            self._regions.clear()
            self._everywhere = False
            if everywhere:
                regions = sorted(await volume.regions_of(own.name))
            await self._free(own, _joined(regions, volume.owners.blocks))
            return
        except StorageError as error:
            _log.warning("volume %s: space is given back later: %s", volume.name, error)
        except OSError as error:
            if volume.failure is None:
                self._broken = True
                _log.warning(
                    "volume %s: space is not given back: %s", volume.name, error.strerror or error
                )
        if self._own is own:
            self._everywhere = self._everywhere or everywhere
            self._regions.update(regions)

    def _may_punch(self, own: OpenLayer) -> bool:
        return self._own is own and not (self._broken or self._volume.failure)

    async def _free(self, own: OpenLayer, spans: list[tuple[int, int]]) -> None:
        volume = self._volume
        holes: list[tuple[int, int]] = []
        for start, last in spans:
            first = start
            while first < last and self._may_punch(own):
                ranges = await self._transfer(find_allocated, own.data, first, last)
                if not ranges:
                    break
                first = ranges[-1][1]
                for index in range(0, len(ranges), _COMPARED):
                    async with volume.head.lock:
                        if not self._may_punch(own):
                            return
                        holes += find_hidden(
                            volume.owners, volume.head, ranges[index : index + _COMPARED]
                        )
                    if len(holes) >= _TOGETHER:
                        await self._punch_all(own, holes)
                        holes = []
        await self._punch_all(own, holes)

    async def _punch_all(self, own: OpenLayer, holes: list[tuple[int, int]]) -> None:
        if not holes:
            return
        volume = self._volume
        await volume.reads_before_now()
        self._loans = asyncio.ensure_future(volume.loans_before_now())
        try:
            await self._loans
        except asyncio.CancelledError:
            return  # forgotten
        finally:
            self._loans = None

        def disturbs() -> bool:
            return volume.head.written != self._written or not self._may_punch(own)

        done = 0
        while done < len(holes) and self._may_punch(own):
            self._written = volume.head.written
            part = holes[done : done + _TOGETHER]
            self._punch = self._transfer(punch_for_a_while, own.data, part, disturbs)
            done += await self._punch
            if volume.head.written != self._written:
                await asyncio.sleep(_PAUSE)

    def _transfer(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        working = self._threads.transfer(function, *args, **kwargs)
        self._volume.note_reading(working)
        return working


def find_hidden(
    owners: OwnerMap, head: Head, ranges: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Blocks of ``ranges`` (ascending, disjoint) that the head's journal has, as (start, end).

    The caller holds the head's lock: what is not pending is durable.
    """
    hidden = bytearray(256)
    hidden[0] = hidden[head.slot] = 1
    starts = [start for start, _ in ranges]
    marks = [bytearray(owners.raw[start:end].translate(hidden)) for start, end in ranges]
    for first, last, _ in head.pending:
        index = max(0, bisect_right(starts, first) - 1)
        while index < len(ranges) and starts[index] < last:
            start, end = max(first, starts[index]), min(last, ranges[index][1])
            if start < end:
                begin = start - starts[index]
                marks[index][begin : begin + end - start] = bytes(end - start)
            index += 1
    holes = []
    for start, mark in zip(starts, marks, strict=True):
        stop = 0
        while (begin := mark.find(1, stop)) >= 0:
            stop = mark.find(0, begin)
            if stop < 0:
                stop = len(mark)
            holes.append((start + begin, start + stop))
    return holes


def _joined(regions: list[int], blocks: int) -> list[tuple[int, int]]:
    """Ascending regions as spans of blocks."""
    spans: list[tuple[int, int]] = []
    for region in regions:
        first = region << REGION_SHIFT
        last = min(first + REGION, blocks)
        if first >= last:
            break  # behind a head that is smaller
        if spans and spans[-1][1] == first:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    return spans
