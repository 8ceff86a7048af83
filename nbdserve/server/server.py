"""The NBD server: listeners, the connections they accept, and the orderly end of both."""

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nbdserve.server.connection import HANDSHAKE_TIMEOUT, Connection
from nbdserve.server.entrance import EVERYBODY, MAX_CONNECTIONS, AccessList, Entrance
from nbdserve.server.exports import ExportRegistry
from nbdserve.server.identity import Identity
from nbdserve.server.listening import OWNER_ONLY, Listener, bind_tcp, bind_unix
from nbdserve.server.meter import Meters
from nbdserve.server.permissions import Permissions
from nbdserve.server.tls import Tls
from snapshots.limits import NO_LIMITS, Limits

log = logging.getLogger(__name__)


class Server:
    """Serves a registry's exports; belongs to the event loop that it is used on.

    Each listener has TLS if given (see tls.py), an access list and a number of places (see
    entrance.py); which client may have which export is the same on all of them. ``meters`` count
    the requests that are served in this process; ``limits`` tells an export's by its key.
    """

    def __init__(
        self,
        registry: ExportRegistry,
        permissions: Permissions | None = None,
        handshake_timeout: float = HANDSHAKE_TIMEOUT,
        meters: Meters | None = None,
        limits: Callable[[str], Limits] = lambda key: NO_LIMITS,
    ) -> None:
        self._registry = registry
        self._permissions = permissions or Permissions()
        self._handshake_timeout = handshake_timeout
        self.meters = meters or Meters()
        self._limits = limits
        self._listeners: list[Listener] = []
        self._entrances: list[Entrance] = []
        self._connections: dict[asyncio.Task[None], Connection] = {}

    @property
    def addresses(self) -> list[str]:
        """Where the server listens: ``HOST:PORT`` and ``unix:PATH``, in the order of the calls."""
        return [listener.address for listener in self._listeners]

    @property
    def connections(self) -> int:
        """Number of open connections, those in their handshake included."""
        return len(self._connections)

    async def listen_tcp(
        self,
        host: str,
        port: int,
        tls: Tls | None = None,
        access: AccessList = EVERYBODY,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """Listen on every address of ``host`` (empty: all of this machine); port 0 picks one.

        Raises InUseError or InvalidError with one clear line.
        """
        sockets = await bind_tcp(host, port)
        port = sockets[0].getsockname()[1]
        entrance = self._new_entrance(f"{host}:{port}", access, max_connections)
        accepted = partial(self._accepted, entrance, tls)
        self._listeners += [Listener(sock, entrance, accepted) for sock in sockets]

    async def listen_unix(
        self,
        path: str | Path,
        tls: Tls | None = None,
        access: AccessList = EVERYBODY,
        max_connections: int = MAX_CONNECTIONS,
        mode: int = OWNER_ONLY,
        group: int | None = None,
    ) -> None:
        """Listen on a socket file, of that mode and group (None: the process's).

        Raises InUseError when another server listens there, InvalidError with one clear line.
        """
        path = Path(path)
        sock = bind_unix(path, mode, group)
        entrance = self._new_entrance(f"unix:{path}", access, max_connections)
        accepted = partial(self._accepted, entrance, tls)
        self._listeners.append(Listener(sock, entrance, accepted, path))

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - forces instead of raising
        """Stop listening, let the requests that were received be answered, close everything.

        After ``timeout`` seconds what still runs is answered with ESHUTDOWN, and dropped. Returns
        whether all was done; if not,
        requests may still be running on exports that are not yet closed in the registry.
        """
        for listener in self._listeners:
            listener.close()
        for entrance in self._entrances:
            entrance.close()
        self._listeners.clear()
        for connection in self._connections.values():
            connection.finish()
        if not await self._wait(timeout):
            for connection in self._connections.values():
                log.warning("%s: dropped, its requests took too long", connection.peer)
                connection.expire()
            if not await self._wait(1.0):
                for connection in self._connections.values():
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

    def _new_entrance(self, name: str, access: AccessList, max_connections: int) -> Entrance:
        entrance = Entrance(name, access, max_connections)
        self._entrances.append(entrance)
        return entrance

    def _accepted(
        self, entrance: Entrance, tls: Tls | None, sock: socket.socket, identity: Identity
    ) -> None:
        connection = Connection(
            sock,
            self._registry,
            identity,
            entrance,
            tls,
            self._permissions,
            self._handshake_timeout,
            self.meters,
            self._limits,
        )
        if not entrance.enter(connection):
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(connection.run())
        self._connections[task] = connection
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        connection = self._connections.pop(task)
        connection.entrance.leave(connection)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: the connection failed", connection.peer, exc_info=error)
