"""Where a volume's writes get space from once the disk is full, and others have reserved some.

reservations.py says what is kept back, and where. As long as there is space nothing here is looked
at. The first write of a volume that gets ENOSPC, while anything is kept back for any volume,
begins its **rationing**: ``try_write`` leaves blocks that the head does not own to ``write``, and
that asks here first.

* A volume **with** a reservation gives back as much of what is kept for it as the write takes, and
  a little in advance, and then writes.
* One **without**, or whose reservation is used up, is refused with ENOSPC while less than MARGIN is
  free: what is free then was just given back, for somebody else's write.

So among volumes that are rationed nobody takes what another one gave back, in whichever processes
they are: each has given back what it writes before it writes. A volume that does not know yet
takes at most what lies free at that moment, once. A reservation keeps a little more than it says
for that, and for what the file system itself needs.

Rationing ends when there is ample space again.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from backends.layers import LayerStore
from snapshots.threads import Threads

if TYPE_CHECKING:
    from snapshots.head import Head

MARGIN = 16 << 20
_AMPLE = 4 * MARGIN
_STEP = 1 << 20
# How often a write that failed all the same gives back more.
_TRIES = 16


class Rationing:
    """Of one volume, whose id what is kept back is named by (see the module's text)."""

    def __init__(self, store: LayerStore, volume: str, threads: Threads) -> None:
        self._store = store
        self._volume = volume
        self._threads = threads
        self._credit = 0
        self.begun = False

    def begins(self, error: OSError) -> bool:
        """Whether a write that failed may succeed by ``write``; begins the rationing."""
        if self.begun or error.errno != errno.ENOSPC:
            return False
        self.begun = self._store.holds_any()
        return self.begun

    async def claim(self, head: Head, length: int) -> None:
        """Let ``length`` bytes be written to new places; OSError ENOSPC when they must not."""
        if self.begun and not await self._threads.sync(self._claim, length):
            self.end(head)

    def helps(self, error: OSError, tries: int) -> bool:
        """Whether a write that failed for the ``tries``th time is worth another claim and write."""
        if error.errno != errno.ENOSPC or tries > _TRIES:
            return False
        self._credit = 0
        return self.begun or self.begins(error)

    def end(self, head: Head) -> None:
        """There is space again."""
        self.begun = False
        self._credit = 0
        head.ration(begun=False)

    def _claim(self, length: int) -> bool:
        """Whether rationing goes on; blocking."""
        free = self._store.free_now()
        if free >= _AMPLE + length:
            return False
        if self._credit < length:
            self._credit += self._spend(length + _STEP)
        if self._credit >= length:
            self._credit -= length
        elif free < MARGIN + length and self._store.holds_any():
            raise OSError(errno.ENOSPC, "no space left but what is reserved for others")
        return True

    def _spend(self, length: int) -> int:
        return self._store.spend(self._volume, length) if self._volume else 0
