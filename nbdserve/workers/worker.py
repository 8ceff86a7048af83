"""What runs in a worker process: views, and the connections that use them.

The daemon's calls go to a ``LocalHost``. A connection comes as a socket with what its handshake led
to, and is served as it would be in the daemon; ``over`` is told when its last request has ended,
``gone`` when its socket is closed. The daemon's ``finish`` and ``abort`` end it from
outside.

When the daemon is gone so is this process, at once, as if it had crashed with it: another daemon
may be waiting for the directory. ``stop`` comes after all views are closed: connections that are
still there are dropped.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from backends.errors import StorageError
from backends.local_layers import LocalLayerStore
from nbdserve.logs import Logs, write_logs
from nbdserve.protocol.constants import ReplyStyle
from nbdserve.server.exports import Agreement
from nbdserve.server.meter import Meters, Numbers
from nbdserve.server.session import Session
from nbdserve.workers.channel import Channel
from snapshots.limits import limits_from_map
from snapshots.local_host import LocalHost
from snapshots.threads import Threads

_METHODS: Final = frozenset(
    (
        "open_volume",
        "open_snapshot",
        "close_view",
        "flush",
        "record",
        "free_hidden",
        "grow",
        "count_owned",
        "count_cells",
        "list_changed",
        "check_journal",
        "settle",
        "add_head",
        "drop_head",
        "freeze",
        "thaw",
        "swap_heads",
        "finish_seal",
        "fail",
        "end_commit",
        "recall",
        "move",
        "follow_merge",
        "drop_layer",
        "complete",
    )
)
_TOLD: Final = frozenset(("fetched", "lost_again", "refused"))

log = logging.getLogger(__name__)


class Worker:
    """See the module's text; ``run`` does it all."""

    def __init__(self, sock: socket.socket, data: Path, slow_seconds: float) -> None:
        self._threads = Threads()
        self._host = LocalHost(LocalLayerStore(data), self._threads)
        self._meters = Meters(self._retire, slow_seconds)
        self._sessions: dict[int, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._channel = Channel(sock, self)

    async def run(self) -> None:
        """Until the daemon says stop."""
        await self._host.start(self)
        await self._stop.wait()
        for session in self._sessions.values():
            session.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._channel.sent()
        self._channel.close()
        self._threads.close()

    # What the host tells

    def lost(self, host: object) -> None:
        raise AssertionError("a process does not outlive itself")

    def failed(self, key: str, why: str) -> None:
        self._channel.event("failed", key, why)

    def wanted(self, host: object, layer: str, first: int, end: int) -> None:
        self._channel.event("wanted", layer, first, end)

    # What comes from the daemon

    def call(self, method: str, arguments: list[Any]) -> Coroutine[Any, Any, Any]:
        if method == "ping":
            return asyncio.sleep(0)
        if method == "measure":
            return self._measure()
        if method not in _METHODS:
            raise ValueError(f"method {method!r}")
        operation: Coroutine[Any, Any, Any] = getattr(self._host, method)(*arguments)
        return operation

    def event(self, name: str, arguments: list[Any], sock: socket.socket | None) -> None:
        if name == "serve":
            self._serve(sock, *arguments)
        elif name == "limit":
            key, limits = arguments
            self._meters.limit(key, limits_from_map(limits))
        elif name == "stop":
            self._stop.set()
        elif name == "logs":
            write_logs(Logs(*arguments), "worker")
        elif name in _TOLD:
            getattr(self._host, name)(*arguments)
        elif name in ("finish", "abort"):
            (number,) = arguments
            session = self._sessions.get(number)  # it may just have ended
            if session is not None:
                getattr(session, name)()
        else:
            raise ValueError(f"event {name!r}")

    def closed(self, wrong: str | None) -> None:
        if wrong is not None:
            log.error("worker process %d ends: %s", os.getpid(), wrong)
        os._exit(1)

    # Measuring

    async def _measure(self) -> None:
        """Tell what was counted: as an event, which keeps its place among those of ``_retire``."""
        read = {key: numbers.pack() for key, numbers in self._meters.read().items()}
        self._channel.event("measured", read)

    def _retire(self, key: str, numbers: Numbers) -> None:
        self._channel.event("retired", key, numbers.pack())

    # Connections

    def _serve(
        self,
        sock: socket.socket | None,
        number: int,
        key: str,
        name: str,
        bases: dict[str, str],
        style: str,
        contexts: list[list[Any]],
        peer: str,
        received: bytes,
        relayed: bool,
        connection: int | None,
        limits: dict[str, int],
    ) -> None:
        chosen = tuple((number, context) for number, context in contexts)
        agreement = Agreement(
            ReplyStyle(style),
            chosen,
            peer,
            received,
            relayed,
            connection,
            limits_from_map(limits),
        )
        try:
            if sock is None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            sock.setblocking(False)
            export = self._host.handle(key, name, bases, _not_here)
            session = Session(sock, export, agreement, self._meters)
        except (OSError, MemoryError, StorageError) as error:
            log.error("closed, it cannot be served: %s", error, extra=agreement.about(name))
            if sock is not None:
                sock.close()
            self._channel.event("over", number)
            self._channel.event("gone", number)
            return
        self._sessions[number] = session
        task = asyncio.get_running_loop().create_task(self._see_through(number, session, sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _see_through(self, number: int, session: Session, sock: socket.socket) -> None:
        await session.transmit()
        self._channel.event("over", number)
        await session.linger()
        sock.close()
        del self._sessions[number]
        self._channel.event("gone", number)


def _not_here() -> None:
    raise AssertionError("the daemon keeps what revokes a lease")
