"""The NBD server: listeners, the connections they accept, and the orderly end of both."""

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from nbdserve.server.connection import HANDSHAKE_TIMEOUT, Connection
from nbdserve.server.door import Door
from nbdserve.server.entrance import EVERYBODY, MAX_CONNECTIONS, AccessList
from nbdserve.server.exports import ExportRegistry
from nbdserve.server.identity import Identity
from nbdserve.server.listening import OWNER_ONLY, Bound, bind_tcp, bind_unix
from nbdserve.server.meter import Meters
from nbdserve.server.permissions import Permissions
from nbdserve.server.tls import Tls
from snapshots.limits import NO_LIMITS, Limits

log = logging.getLogger(__name__)


class Server:
    """Serves a registry's exports; belongs to the event loop that it is used on.

    Each address has TLS if given (see tls.py), an access list and a number of places (see
    entrance.py); which client may have which export is the same on all of them. All of that, and
    ``handshake_timeout``, in seconds, may be changed, for clients that connect from then on.
    ``meters`` count the requests that are served in this process; ``limits`` tells an export's by
    its key.
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
        self.handshake_timeout = handshake_timeout
        self.meters = meters or Meters()
        self._limits = limits
        self._doors: list[Door] = []
        self._numbers = itertools.count(1)
        self._connections: dict[asyncio.Task[None], Connection] = {}

    @property
    def addresses(self) -> list[str]:
        """Where the server listens: ``HOST:PORT`` and ``unix:PATH``, in the order of the calls."""
        return [listener.address for door in self._doors for listener in door.listeners]

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
    ) -> Door:
        """Listen on every address of ``host`` (empty: all of this machine); port 0 picks one.

        Raises InUseError or InvalidError with one clear line.
        """
        return self.open(await bind_tcp(host, port), tls, access, max_connections)

    async def listen_unix(
        self,
        path: str | Path,
        tls: Tls | None = None,
        access: AccessList = EVERYBODY,
        max_connections: int = MAX_CONNECTIONS,
        mode: int = OWNER_ONLY,
        group: int | None = None,
    ) -> Door:
        """Listen on a socket file, of that mode and group (None: the process's).

        Raises InUseError when another server listens there, InvalidError with one clear line.
        """
        return self.open([bind_unix(Path(path), mode, group)], tls, access, max_connections)

    def open(
        self,
        sockets: Sequence[Bound],
        tls: Tls | None = None,
        access: AccessList = EVERYBODY,
        max_connections: int = MAX_CONNECTIONS,
    ) -> Door:
        """Listen on sockets of one address."""
        door = Door(sockets, tls, access, max_connections, self._accepted)
        self._doors.append(door)
        return door

    def close(self, door: Door) -> list[socket.socket]:
        """Let nobody in there any more; its connections stay. Returns the sockets that were passed.

        Who has connected by now is let in first, or, at a socket that was passed, goes on waiting.
        """
        self._doors.remove(door)
        return door.close(waiting=True)

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109 - forces instead of raising
        """Stop listening, let the requests that were received be answered, close everything.

        After ``timeout`` seconds what still runs is dropped, unanswered: who connects again asks
        again, while an error, ESHUTDOWN too, would reach a guest. Returns whether all was done; if
        not, requests may still be running on exports that are not yet closed in the registry.
        """
        for door in self._doors:
            for sock in door.close():
                sock.close()
        self._doors.clear()
        for connection in self._connections.values():
            connection.finish()
        if not await self._wait(timeout):
            for connection in self._connections.values():
                about = connection.identity.about(connection.export)
                log.warning("dropped, its requests took too long", extra=about)
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

    def _accepted(self, door: Door, sock: socket.socket, identity: Identity) -> None:
        connection = Connection(
            sock,
            self._registry,
            replace(identity, connection=next(self._numbers)),
            door.entrance,
            door.tls,
            self._permissions,
            self.handshake_timeout,
            self.meters,
            self._limits,
        )
        if not door.entrance.enter(connection):
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(connection.run())
        self._connections[task] = connection
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        connection = self._connections.pop(task)
        connection.entrance.leave(connection)
        if not task.cancelled() and (error := task.exception()) is not None:
            about = connection.identity.about(connection.export)
            log.error("the connection failed", exc_info=error, extra=about)
