"""Changes run to their end, whatever becomes of the connection that asked for them.

aiohttp cancels a handler when its client goes away. A claim (a pin, an import) wants just that; a
change of the catalogue must not be torn in the middle, so it runs in a task of its own.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Operations:
    """The changes that are running."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._resumable: set[asyncio.Task[Any]] = set()

    def start(self, change: Coroutine[Any, Any, T], *, resumable: bool = False) -> asyncio.Task[T]:
        """Begin ``change``; ``resumable`` says that it may be cut off when the process stops."""
        task = asyncio.ensure_future(change)
        self._running.add(task)
        if resumable:
            self._resumable.add(task)
        task.add_done_callback(self._forget)
        return task

    async def run(self, change: Coroutine[Any, Any, T]) -> T:
        """The result of ``change``, which goes on if the caller is cancelled."""
        return await asyncio.shield(self.start(change))

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._resumable.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen: its caller may have left

    def cut_off(self) -> None:
        """Cancel those that can be resumed later."""
        for task in self._resumable:
            task.cancel()

    async def finish(self) -> None:
        """Wait for all of them."""
        while self._running:
            await asyncio.wait(self._running)
