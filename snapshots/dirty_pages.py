"""How much one volume may have dirty in the page cache, so that the kernel need never hold it up.

When too much of a machine's memory waits for its disks, Linux lets whoever writes sleep. Here
that would be the event loop, and with it all volumes. So a volume's writes are **held** before
it comes to that: they become tasks that wait, while everything else goes on.

The kernel lets writers alone up to the mean of its two thresholds. What others have dirtied is
taken off that; of the rest a volume takes two thirds. Volumes that write without end so come to the
same share each, in whichever processes they are, and some room is always left.

A head counts the bytes written to it. Up to ``check_at`` nothing else happens; beyond, ``Pacing``

1. **measures**: what of the heads is not on the disk yet (rewritten pages count once), and what the
   kernel allows. With less than three quarters of the share dirty, it only moves ``check_at``;
2. else lets the disk **write**, in a thread, and measures again every few milliseconds. The
   difference to the share is **credit**: whoever uses it up is held until the next measurement.

An error in writing means what an error of a sync means: the volume fails.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Coroutine
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from backends.layers import DataFile
from snapshots.head import Head
from snapshots.threads import Threads

_KERNEL = Path("/proc/vmstat")
_FIELDS = {b"nr_dirty", b"nr_writeback", b"nr_dirty_threshold", b"nr_dirty_background_threshold"}
# Where the kernel does not tell.
_UNKNOWN_ROOM = 256 << 20
LEAST_SHARE = 4 << 20
"""Bytes that a volume may always have dirty: so it gets on when others take everything."""

_MEASURE_SECONDS = 0.01


class Paced(Protocol):
    """What ``Pacing`` needs of its volume."""

    head: Head

    async def flush(self) -> None:
        """Make everything durable."""

    def unsynced_heads(self) -> list[Head]:
        """The head, and those before it that are not durable yet."""

    def start_task(self, operation: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that the volume's end waits for."""

    def hold_writes(self, held: bool) -> None:
        """Let ``try_write`` refuse, or not."""

    def fail(self, why: str) -> None:
        """Refuse writes from now on."""


class Pacing:
    """See the module's text; all methods on the event loop's thread."""

    def __init__(self, volume: Paced, threads: Threads) -> None:
        self._volume = volume
        self._threads = threads
        self._share = 0
        self._paced: asyncio.Task[None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._released: asyncio.Future[None] | None = None
        self._stopped = False

    @property
    def held(self) -> bool:
        """Whether writes wait."""
        return self._released is not None

    async def wait(self) -> None:
        """Return when writes are not held, or never will be again."""
        while self._released is not None:
            await asyncio.shield(self._released)

    def spent(self) -> None:
        """The head was written beyond its ``check_at``."""
        head = self._volume.head
        if self._stopped:
            head.check_at = _FAR
        elif self._paced is None:
            # Until the measurement is there; then it is known better.
            head.check_at = head.written + max(LEAST_SHARE, self._share // 4)
            self._paced = self._volume.start_task(self._pace())
        else:
            self._hold()

    def stop(self) -> None:
        """Hold nothing any more: the volume has failed, or is to be closed."""
        self._stopped = True
        self._release()

    async def _pace(self) -> None:
        try:
            while not self._stopped:
                cost = await self._measure()
                if self._writing is None and not self.held:
                    return
                await asyncio.sleep(max(_MEASURE_SECONDS, 10 * cost))
            if self._writing is not None:
                await self._writing
        except OSError as error:
            self._volume.fail(f"writing back failed: {error.strerror or error}")
        finally:
            self._paced = None
            self._release()

    async def _measure(self) -> float:
        """Measure, and do what follows from it; returns the seconds that it took."""
        volume = self._volume
        heads = volume.unsynced_heads()
        head, written = volume.head, volume.head.written
        begun = perf_counter()
        dirty, room = await self._threads.sync(_measure, [found.data for found in heads])
        cost = perf_counter() - begun
        known = dirty is not None
        if dirty is None:  # no more than that, and only a sync makes it less
            dirty = sum(found.written - found.synced for found in heads)
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()
        self._share = share = max(LEAST_SHARE, (room + dirty) * 2 // 3)
        begin = share - share // 4
        if self._writing is None and dirty >= begin:
            files = [found.data for found in heads]
            self._writing = asyncio.ensure_future(
                self._threads.sync(_write_back, files) if known else volume.flush()
            )
        if volume.head is not head:
            # A gate came in between: what the old head had left is not known, so none of it.
            head, written = volume.head, volume.head.written
            share = begin = dirty
        head.check_at = written + max(0, (begin if self._writing is None else share) - dirty)
        if head.written < head.check_at:
            self._release()
        elif self._writing is not None:
            self._hold()
        return cost

    def _hold(self) -> None:
        if self._released is None and not self._stopped:
            self._released = asyncio.get_running_loop().create_future()
            self._volume.hold_writes(True)

    def _release(self) -> None:
        if self._released is not None:
            self._released.set_result(None)
            self._released = None
            self._volume.hold_writes(False)


_FAR = 1 << 62


def _measure(files: list[DataFile]) -> tuple[int | None, int]:
    """(what of ``files`` waits for the disk, what may be dirty beside all that is), in bytes."""
    counts = [file.unwritten() for file in files]
    known = [count for count in counts if count is not None]
    return (sum(known) if len(known) == len(counts) else None), read_room()


def read_room(kernel: Path = _KERNEL) -> int:
    """Bytes that may become dirty before the kernel lets writers sleep; below 0: it does."""
    try:
        text = kernel.read_bytes()
    except OSError:
        return _UNKNOWN_ROOM
    found = {
        name: int(value)
        for name, value in (line.split() for line in text.splitlines())
        if name in _FIELDS
    }
    if len(found) < len(_FIELDS):
        return _UNKNOWN_ROOM
    limit = (found[b"nr_dirty_threshold"] + found[b"nr_dirty_background_threshold"]) // 2
    return (limit - found[b"nr_dirty"] - found[b"nr_writeback"]) * mmap.PAGESIZE


def _write_back(files: list[DataFile]) -> None:
    for file in files:
        file.write_back()
