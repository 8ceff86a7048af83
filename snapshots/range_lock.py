"""Locks on ranges of blocks, first come first served.

A write that cannot be done in one step on the event loop (it reads first, or runs in a thread)
holds its blocks, so that no other write, TRIM or hole punch touches them in between. Holders that
overlap get their turn in the order in which they asked; no holder waits for a later one, so there
is no deadlock. Reads take no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class RangeLock:
    """``entries`` are the ranges held or waited for; all calls on one event loop."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, asyncio.Future[None]]] = []

    def overlaps(self, first: int, last: int) -> bool:
        """Whether anything of ``first`` to ``last`` (exclusive) is held or waited for."""
        return any(first < end and start < last for start, end, _ in self.entries)

    def bar(self, first: int, last: int) -> Callable[[], None]:
        """Let whoever asks from now on wait until the returned function is called.

        Unlike a holder, it does not wait for those before it.
        """
        entry = (first, last, asyncio.get_running_loop().create_future())
        self.entries.append(entry)

        def end() -> None:
            self.entries.remove(entry)
            entry[2].set_result(None)

        return end

    @asynccontextmanager
    async def hold(self, first: int, last: int) -> AsyncIterator[None]:
        """Hold ``first`` to ``last`` (exclusive) inside the ``async with``."""
        earlier = [done for start, end, done in self.entries if first < end and start < last]
        entry = (first, last, asyncio.get_running_loop().create_future())
        self.entries.append(entry)
        try:
            for done in earlier:
                # Shielded: the future is the other holder's, whatever becomes of this task.
                await asyncio.shield(done)
            yield
        finally:
            self.entries.remove(entry)
            entry[2].set_result(None)
