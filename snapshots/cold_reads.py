"""Reads that the page cache could not serve: all of them in flight together, few hops to threads.

A hop to a thread costs about what a quick disk takes, so what comes together in one turn of the
event loop is gathered, and then

1. short reads are tried once more on the loop: the first try made the kernel begin to read;
2. the rest goes to threads, several short reads to each; long ones, which take copying, alone.
   A thread first asks for all that it has to read (``cache``), so that the disk has it at once;
   then it takes one read after the other, and reports what is done before it waits for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from backends.layers import DataFile

Part = tuple[DataFile, int, memoryview]
"""(data, offset, where it goes)"""

_TOGETHER = 8  # reads that share a hop to a thread
_SHORT = 64 << 10  # bytes of them


class ColdReads:
    """Gathers reads on one event loop; ``submit`` starts a call in a thread."""

    def __init__(self, submit: Callable[..., Any]) -> None:
        self._submit = submit
        self._gathered: list[_Reading] = []

    def read(self, parts: list[Part]) -> asyncio.Future[None]:
        """Fill the parts' buffers; the future ends when nothing touches them any more."""
        loop = asyncio.get_running_loop()
        reading = _Reading(parts, loop.create_future())
        if not self._gathered:
            loop.call_soon(self._start, loop)
        self._gathered.append(reading)
        return reading.done

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        gathered, self._gathered = self._gathered, []
        together: list[_Reading] = []
        size = 0
        for reading in gathered:
            if reading.length <= _SHORT and reading.take_cached():
                reading.end()
                continue
            if together and (len(together) == _TOGETHER or size + reading.length > _SHORT):
                self._submit(_read_all, loop, together)
                together, size = [], 0
            together.append(reading)
            size += reading.length
        if together:
            self._submit(_read_all, loop, together)


class _Reading:
    """One read: what is left of it, and who waits for it."""

    def __init__(self, parts: list[Part], done: asyncio.Future[None]) -> None:
        self.parts = parts
        self.done = done
        self.length = sum(len(buffer) for _, _, buffer in parts)
        self._error: BaseException | None = None

    def take_cached(self) -> bool:
        """Take the parts that are there, up to the first that is not; whether that was all."""
        parts = self.parts
        self.parts = []
        try:
            for index, (file, offset, buffer) in enumerate(parts):
                if not file.try_read(offset, buffer):
                    self.parts = parts[index:]
                    return False
        except BaseException as error:
            self._error = error
        return True

    def ask(self) -> None:
        """Let the disk begin with all parts."""
        # What is wrong with it, the read itself will tell.
        with contextlib.suppress(OSError):
            for file, offset, buffer in self.parts:
                file.cache(offset, len(buffer))

    def finish(self) -> None:
        """Take the parts that are left, however long that takes."""
        try:
            for file, offset, buffer in self.parts:
                file.read(offset, buffer)
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        """Tell who waits; on the event loop."""
        if self._error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(self._error)


def _read_all(loop: asyncio.AbstractEventLoop, readings: list[_Reading]) -> None:
    if len(readings) > 1 or len(readings[0].parts) > 1:
        for reading in readings:
            reading.ask()
    done: list[_Reading] = []
    for reading in readings:
        if done and not reading.take_cached():
            loop.call_soon_threadsafe(_end_all, done)
            done = []
        reading.finish()
        done.append(reading)
    loop.call_soon_threadsafe(_end_all, done)


def _end_all(done: list[_Reading]) -> None:
    for reading in done:
        reading.end()
