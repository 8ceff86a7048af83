"""The NBD server: listeners, the connections they accept, and the orderly end of both."""

import asyncio
import logging
import socket
from pathlib import Path

from nbdserve.server.connection import Connection
from nbdserve.server.exports import ExportRegistry
from nbdserve.server.listening import Listener, bind_tcp, bind_unix
from nbdserve.server.tls import Tls

log = logging.getLogger(__name__)


class Server:
    """Serves a registry's exports, with TLS if given; belongs to the event loop it is used on."""

    def __init__(self, registry: ExportRegistry, tls: Tls | None = None) -> None:
        self._registry = registry
        self._tls = tls
        self._listeners: list[Listener] = []
        self._connections: dict[asyncio.Task[None], Connection] = {}

    @property
    def addresses(self) -> list[str]:
        """Where the server listens: ``HOST:PORT`` and ``unix:PATH``, in the order of the calls."""
        return [listener.address for listener in self._listeners]

    @property
    def connections(self) -> int:
        """Number of open connections, those in their handshake included."""
        return len(self._connections)

    async def listen_tcp(self, host: str, port: int) -> None:
        """Listen on every address of ``host`` (empty: all of this machine); port 0 picks one.

        Raises InUseError or InvalidError with one clear line.
        """
        for sock in await bind_tcp(host, port):
            self._listeners.append(Listener(sock, self._accepted))

    async def listen_unix(self, path: str | Path) -> None:
        """Listen on a socket file, readable and writable by its owner only.

        Raises InUseError when another server listens there, InvalidError with one clear line.
        """
        path = Path(path)
        self._listeners.append(Listener(bind_unix(path), self._accepted, path))

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - forces instead of raising
        """Stop listening, let the requests that were received be answered, close everything.

        After ``timeout`` seconds what is left is dropped. Returns whether all was answered; if not,
        requests may still be running on exports that are not yet closed in the registry.
        """
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection in self._connections.values():
            connection.finish()
        if not await self._wait(timeout):
            for connection in self._connections.values():
                log.warning("%s: dropped, its requests took too long", connection.peer)
                connection.abort()
            await self._wait(1.0)
            return False
        return True

    async def _wait(self, seconds: float) -> bool:
        """Wait for the connections to end; tells whether all did."""
        if not self._connections:
            return True
        _, pending = await asyncio.wait(self._connections, timeout=seconds)
        return not pending

    def _accepted(self, sock: socket.socket, peer: str) -> None:
        connection = Connection(sock, self._registry, peer, self._tls)
        task = asyncio.get_running_loop().create_task(connection.run())
        self._connections[task] = connection
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        connection = self._connections.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: the connection failed", connection.peer, exc_info=error)
