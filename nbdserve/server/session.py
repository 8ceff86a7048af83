"""The transmission phase of one connection and its end, over an export of this process.

Lingering: a socket that is closed while the client's bytes lie unread is reset, and the reset may
destroy replies on their way. So when the server ends, it sends its end of stream, and reads what
comes until the client's, for LINGER_TIMEOUT seconds at most.
"""

import asyncio
import contextlib
import socket
from typing import Final

from nbdserve.server.exports import Agreement, Export
from nbdserve.server.meter import Meters
from nbdserve.server.readiness import Readiness
from nbdserve.server.transmission import Transmission

LINGER_TIMEOUT: Final = 1.0
"""Seconds that a client has to end its stream after the server has."""

_RECEIVE_SIZE: Final = 64 << 10


class Session:
    """A ``Serving``; the socket is closed by whoever made it, after ``linger``."""

    def __init__(
        self, sock: socket.socket, export: Export, agreement: Agreement, meters: Meters
    ) -> None:
        self._sock = sock
        self._readiness = Readiness(sock)
        self._linger = False
        self._meters = meters
        self._meter = meters.enter(export.key, agreement.limits)
        try:
            self._transmission = Transmission(
                sock,
                export,
                style=agreement.style,
                contexts=agreement.contexts,
                peer=agreement.peer,
                connection=agreement.connection,
                relayed=agreement.relayed,
                meter=self._meter,
            )
        except BaseException:
            meters.leave(self._meter)
            raise
        self._transmission.start(agreement.received)

    async def transmit(self) -> None:
        try:
            self._linger = await self._transmission.closed
        finally:
            self._meters.leave(self._meter)

    async def linger(self) -> None:
        if self._linger:
            await read_to_end(self._sock, self._readiness)

    def finish(self) -> None:
        self._transmission.finish()

    def abort(self) -> None:
        self._transmission.abort()
        self._readiness.cancel()


async def read_to_end(sock: socket.socket, readiness: Readiness) -> None:
    """Send the end of our stream, and throw away what comes until the client's."""
    deadline = asyncio.get_running_loop().time() + LINGER_TIMEOUT
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while await readiness.receive(_RECEIVE_SIZE, deadline):
            pass
