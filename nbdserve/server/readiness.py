"""Waiting for a non-blocking socket outside the transmission phase."""

import asyncio
import socket


class Readiness:
    """Waits until a socket can be read or written; ``cancel`` ends the wait from outside.

    One wait at a time. The waits raise TimeoutError at ``deadline`` (the loop's clock, in seconds)
    and ConnectionAbortedError once cancelled. ``receive`` keeps the deadline, and lets others have
    their turn, also with a client that is so quick that it never has to be waited for.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._waiter: asyncio.Future[None] | None = None
        self._cancelled = False

    @property
    def waiting(self) -> bool:
        """Whether a wait is under way."""
        return self._waiter is not None

    def cancel(self) -> None:
        """Let the wait under way and all later ones fail."""
        self._cancelled = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionAbortedError("the connection was closed"))

    async def receive(self, size: int, deadline: float) -> bytes:
        """Receive up to ``size`` bytes; empty at the end of the stream."""
        while True:
            self._check()
            if self._loop.time() > deadline:
                raise TimeoutError
            try:
                data = self._sock.recv(size)
            except (BlockingIOError, InterruptedError):
                await self._wait(deadline, reading=True)
            else:
                await asyncio.sleep(0)
                return data

    async def send(self, data: bytes, deadline: float) -> None:
        """Send all of ``data``."""
        rest = memoryview(data)
        while rest:
            self._check()
            try:
                rest = rest[self._sock.send(rest) :]
            except (BlockingIOError, InterruptedError):
                await self._wait(deadline, reading=False)

    def _check(self) -> None:
        if self._cancelled:
            raise ConnectionAbortedError("the connection was closed")

    async def _wait(self, deadline: float, *, reading: bool) -> None:
        loop, waiter = self._loop, self._loop.create_future()
        self._waiter = waiter
        add, remove = (
            (loop.add_reader, loop.remove_reader)
            if reading
            else (loop.add_writer, loop.remove_writer)
        )
        add(self._sock, _wake, waiter)
        try:
            async with asyncio.timeout_at(deadline):
                await waiter
        finally:
            self._waiter = None
            remove(self._sock)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
