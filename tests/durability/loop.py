"""An event loop in which nothing takes time and everything happens in the same order again.

Its clock jumps to the next timer whenever nothing else is to be done. What the product gives to a
thread is done in the loop's own, one piece at a time, some time after it was asked for, and not
always in the order of asking: so whatever waits for a sync sees others get on meanwhile. ``inside``
says that such a piece is running: then a real event loop could be doing something else at the same
moment, which whoever hooks into a system call may do there. A ``hurried`` loop does each piece when
it is asked for, which is quicker.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import selectors
from collections.abc import Callable
from random import Random
from typing import Any

from .disk import PowerCutError

# Seconds until what a thread is given has been done.
_DELAYS = (0, 0, 0.0005, 0.002, 0.006)


class _NoSelector(selectors.SelectSelector):
    """Waits for nobody; the loop's clock moves on instead."""

    loop: SimulatedLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing will ever happen")
        self.loop.now += max(0.0, timeout)
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """See the module's text."""

    def __init__(self, seed: object) -> None:
        selector = _NoSelector()
        selector.loop = self
        self._random = Random(repr(seed))
        self.now = 0.0
        self.inside = False
        self.hurried = False
        self.ended = False
        self.complaints: list[BaseException] = []
        super().__init__(selector)
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        return self.now

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        future = self.create_future()

        def work() -> None:
            if not future.cancelled():
                try:
                    result = self.do(func, *args)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        self.plan(work)
        return future

    def plan(self, work: Callable[[], None]) -> None:
        """Do ``work`` soon, or at once."""
        if self.hurried:
            work()
        else:
            self.call_later(self._random.choice(_DELAYS), work)

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what a thread would do."""
        if self.ended:
            raise PowerCutError
        self.inside = True
        try:
            return function(*args, **kwargs)
        finally:
            self.inside = False

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception):
            self.complaints.append(error)

    def abandon(self) -> None:
        """End all tasks, in whatever state, and what threads were given."""
        self.ended = True
        while tasks := asyncio.all_tasks(self):
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.complaints.clear()
        self.ended = False


def this_loop() -> SimulatedLoop:
    """The loop that runs."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulatedLoop)
    return loop


async def to_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands for ``asyncio.to_thread``."""
    loop = this_loop()
    if loop.hurried:
        return loop.do(function, *args, **kwargs)
    return await loop.run_in_executor(None, functools.partial(function, *args, **kwargs))


class InlineExecutor:
    """Stands for ``ThreadPoolExecutor``."""

    def __init__(self, workers: int, name: str) -> None:
        pass

    def submit(self, function: Any, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        loop = this_loop()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    result = loop.do(function, *args, **kwargs)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        loop.plan(work)
        return future

    def shutdown(self) -> None:
        pass
