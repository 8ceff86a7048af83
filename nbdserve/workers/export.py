"""What the daemon holds of a view that a worker has open: a lease, and connections given away."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping

from nbdserve.server.exports import Agreement
from nbdserve.workers.channel import Channel
from snapshots.names import BLOCK_SIZE

log = logging.getLogger(__name__)


class Connections:
    """The connections that one worker process serves, by number."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._served: dict[int, RemoteServing] = {}
        self._next = 0

    def begin(
        self,
        key: str,
        name: str,
        bases: Mapping[str, str],
        sock: socket.socket,
        agreement: Agreement,
    ) -> RemoteServing:
        """Hand a client's socket over."""
        self._next += 1
        number = self._next
        serving = RemoteServing(self._channel, number)
        # The connection still has the object, and closes it: nothing is left in it.
        given = socket.socket(fileno=sock.detach())
        if not self._channel.open:
            given.close()
            log.info("its worker has just ended", extra=agreement.about(name))
            serving.lost()
            return serving
        self._served[number] = serving
        self._channel.hand_over(
            given,
            "serve",
            number,
            key,
            name,
            bases,
            agreement.style.value,
            agreement.contexts,
            agreement.peer,
            agreement.received,
            agreement.relayed,
            agreement.connection,
            agreement.limits.as_map(),
        )
        return serving

    def over(self, number: int) -> None:
        """The last request has ended."""
        self._served[number].over.set_result(None)

    def gone(self, number: int) -> None:
        """The socket is closed."""
        self._served.pop(number).gone.set_result(None)

    def lost(self) -> None:
        """The process has ended: so have all of them."""
        for serving in self._served.values():
            serving.lost()
        self._served.clear()


class RemoteServing:
    """A ``Serving`` of a connection that a worker has."""

    def __init__(self, channel: Channel, number: int) -> None:
        loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._channel = channel
        self._number = number

    async def transmit(self) -> None:
        await asyncio.shield(self.over)

    async def linger(self) -> None:
        await asyncio.shield(self.gone)

    def finish(self) -> None:
        self._channel.event("finish", self._number)

    def abort(self) -> None:
        self._channel.event("abort", self._number)

    def lost(self) -> None:
        """Both ends have come at once."""
        for future in (self.over, self.gone):
            if not future.done():
                future.set_result(None)


class WorkerExport:
    """A ``Lease`` and a ``RemoteExport``: one client's, of a view that a worker has open."""

    block_size = BLOCK_SIZE

    def __init__(
        self,
        connections: Connections,
        key: str,
        name: str,
        size: int,
        read_only: bool,
        bases: Mapping[str, str],
        revoke: Callable[[], None],
    ) -> None:
        self.key = key
        self.name = name
        self.size = size
        self.read_only = read_only
        self.revoke = revoke
        self._connections = connections
        self._bases = bases

    def serve(self, sock: socket.socket, agreement: Agreement) -> RemoteServing:
        return self._connections.begin(self.key, self.name, self._bases, sock, agreement)
