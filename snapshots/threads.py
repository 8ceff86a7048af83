"""The threads that take what would block the event loop.

Two pools, so that a slow fdatasync never keeps a read waiting. A hop to a thread costs about
100 µs: cached input and output stays on the event loop.

A thread that computes (an index of many extents, say) keeps the interpreter to itself until the
switch interval is over, each time that the event loop comes back from a system call, of which each
request makes several. So Python's 5 ms would be 20 ms for a request: it is made shorter.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from snapshots.cold_reads import ColdReads

P = ParamSpec("P")
T = TypeVar("T")

_TRANSFERS = 32
_SYNCS = 16
_SWITCH_INTERVAL = 0.3e-3


class Threads:
    """``transfer`` for reads, writes and punches; ``sync`` for whatever waits for a disk's cache.

    Both go on to their end when the caller is cancelled: work on files is never half-known.
    """

    def __init__(self) -> None:
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self._transfers = ThreadPoolExecutor(_TRANSFERS, "nbdserve-transfer")
        self._syncs = ThreadPoolExecutor(_SYNCS, "nbdserve-sync")
        self.cold_reads = ColdReads(self._transfers.submit)

    def transfer(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """Start ``function`` in the pool for data."""
        return asyncio.wrap_future(self._transfers.submit(function, *args, **kwargs))

    async def sync(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` in the pool for syncs."""
        return await asyncio.shield(
            asyncio.wrap_future(self._syncs.submit(function, *args, **kwargs))
        )

    def close(self) -> None:
        """Wait for what runs, then end the threads."""
        self._transfers.shutdown()
        self._syncs.shutdown()
