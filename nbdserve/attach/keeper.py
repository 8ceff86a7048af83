"""The process that stays beside an attached device.

The kernel does all reading and writing itself, over sockets that it was given. It does not connect:
when one of its connections dies it says so (LINK_DEAD), lets requests wait, and goes on as soon as
it gets another socket. That is the keeper's work::

    attach: a connection, or several --> CONNECT --> ready
    keep:   LINK_DEAD --> connect, handshake, does the export still fit? --> RECONFIGURE
               ^                |  no server, refused, does not fit: a pause, longer each time
               |                v
               +----------------+
            every LOOK seconds: INFO of the export; a larger size --> RECONFIGURE

- What is offered is as many connections as the device has; the kernel takes those that it lacks.
  It does not say which are dead, and what it does not take ends when the keeper closes its copy.
- A keeper that begins on a device that is attached already to the same export, because an earlier
  one was killed, offers connections at once: one may have died while nobody listened.
- With TLS the kernel gets one end of a socket pair, and the keeper relays. The relay does not hide
  a reconnection: only the kernel knows which requests are unanswered, and sends them again. When
  the keeper dies the pair does, which is one more dead connection, and the next keeper mends that.
- SIGTERM ends the keeper and leaves the device attached; SIGHUP makes it look at the size at once.
"""

import asyncio
import contextlib
import logging
import random
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from backends.errors import InUseError, InvalidError, StorageError, UnavailableError
from nbdserve.attach import device
from nbdserve.attach.connecting import Connection, Connector
from nbdserve.attach.netlink import Disk, Listener, Netlink, NotAttachedError
from nbdserve.attach.records import Claim, Record
from nbdserve.protocol.client_handshake import ExportInformation
from nbdserve.protocol.constants import (
    FLAG_CAN_MULTI_CONN,
    FLAG_HAS_FLAGS,
    FLAG_READ_ONLY,
    FLAG_ROTATIONAL,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
)

LOOK: Final = 10.0
"""Seconds between looks at the size of the export."""

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 2.0
"""Seconds between attempts to connect; the pause doubles from the first to the longest."""

RESEND_INTERVAL: Final = 2000
"""Milliseconds after which the kernel looks whether a request's connection has been replaced."""

_KNOWN_FLAGS: Final = (
    FLAG_HAS_FLAGS
    | FLAG_READ_ONLY
    | FLAG_SEND_FLUSH
    | FLAG_SEND_FUA
    | FLAG_ROTATIONAL
    | FLAG_SEND_TRIM
    | FLAG_CAN_MULTI_CONN
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """How a volume is to be attached: ``block_size`` in bytes, times in seconds.

    ``index`` None: any free device. ``timeout`` 0: no request takes too long.
    """

    volume: str
    index: int | None
    connections: int
    block_size: int
    timeout: int
    dead_timeout: int
    read_only: bool


class Keeper:
    """Keeps one device, from ``attach`` until ``keep`` returns."""

    def __init__(
        self, kernel: Netlink, connector: Connector, wishes: Wishes, claim: Claim, process: int
    ) -> None:
        self._kernel = kernel
        self._connector = connector
        self._wishes = wishes
        self._claim = claim
        self._process = process
        self._index = -1
        self._size = 0
        self._flags: int | None = None
        self._listener: Listener | None = None
        self._wake = asyncio.Event()
        self._dead = False
        self._look = False
        self._stopping = False

    async def attach(self) -> Record:
        """Attach the device, or take it up where an earlier keeper left it. Raises StorageError."""
        self._listener = self._kernel.listen()
        found = find_attached(self._connector.uri)
        if found is not None:
            self._take_up(found)
        else:
            await self._connect()
        flags = self._flags if self._flags is not None else 0
        record = Record(
            self._index, self._wishes.volume, self._connector.uri, flags,
            self._wishes.connections, self._process,
        )  # fmt: skip
        self._claim.write(record)
        return record

    async def keep(self, ready: Callable[[], None]) -> None:
        """Keep the device served until it is detached or a signal ends this."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener.fileno(), self._on_news)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._look_now)
        ready()
        try:
            while not self._stopping:
                await self._step()
        except NotAttachedError:
            log.warning("%s is attached no more", device.name_of(self._index))
            self._claim.remove()
        finally:
            loop.remove_reader(self._listener.fileno())
            self._listener.close()

    async def _connect(self) -> None:
        wishes = self._wishes
        if wishes.index is not None and device.is_attached(wishes.index):
            raise InUseError(describe_other(wishes.index))
        connections: list[Connection] = []
        try:
            for _ in range(wishes.connections):
                connections.append(await self._connector.open())
                self._check_wishes(connections[-1].export)
            export = connections[0].export
            self._flags = export.flags & _KNOWN_FLAGS
            if wishes.read_only:
                self._flags |= FLAG_READ_ONLY
            disk = Disk(
                export.size, wishes.block_size, self._flags, wishes.timeout,
                wishes.dead_timeout, self._connector.uri,
            )  # fmt: skip
            sockets = self._plain_ends(connections)
            try:
                numbers = [sock.fileno() for sock in sockets]
                self._index = await asyncio.to_thread(
                    self._kernel.connect, wishes.index, disk, numbers
                )
            finally:
                _close(sockets)
        except BaseException:
            _close([connection.sock for connection in connections])
            raise
        self._size = export.size
        self._set_resend_interval()

    def _take_up(self, index: int) -> None:
        if self._wishes.index not in (None, index):
            raise InUseError(
                f"{self._wishes.volume} is attached already, as {device.name_of(index)}"
            )
        self._index = index
        self._size = device.read_size(index)
        left = self._claim.read()
        if left is not None and left.index == index:
            self._flags = left.flags
        self._set_resend_interval()
        self._dead = True  # or may be

    def _set_resend_interval(self) -> None:
        # With several connections the kernel takes a request that is this old for lost.
        if self._wishes.connections == 1 and self._wishes.timeout == 0:
            device.set_request_timeout(self._index, RESEND_INTERVAL)

    def _check_wishes(self, export: ExportInformation) -> None:
        if export.minimum_block > self._wishes.block_size:
            raise InvalidError(
                f"the server wants blocks of {export.minimum_block} bytes: "
                f"--block-size {self._wishes.block_size} is too small"
            )
        if self._wishes.connections > 1 and not export.flags & FLAG_CAN_MULTI_CONN:
            raise InvalidError("the server allows one connection only: --connections 1")

    def _check_fit(self, export: ExportInformation) -> None:
        """Whether the device can go on with what the server has now; raises UnavailableError."""
        if export.size < self._size:
            raise UnavailableError(
                f"{self._connector.uri} has {export.size} bytes now, "
                f"and {device.name_of(self._index)} has {self._size}"
            )
        told = self._flags
        if told is None:
            told = FLAG_READ_ONLY if device.is_read_only(self._index) else 0
        if export.flags & FLAG_READ_ONLY and not told & FLAG_READ_ONLY:
            raise UnavailableError(f"{self._connector.uri} is read-only now")
        if told & ~export.flags & (FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_CAN_MULTI_CONN):
            raise UnavailableError(f"{self._connector.uri} can do less than it could")

    def _plain_ends(self, connections: list[Connection]) -> list[socket.socket]:
        """What the kernel is to be given for these connections."""
        return [self._plain_end(connection) for connection in connections]

    def _plain_end(self, connection: Connection) -> socket.socket:
        if connection.session is None:
            return connection.sock
        # Its buffers are worth having only where there is TLS.
        from nbdserve.server.tls_relay import Relay  # noqa: PLC0415

        return Relay(connection.sock, connection.session, {}).inner

    async def _step(self) -> None:
        """Wait for something to do, and do it."""
        if self._dead:
            self._dead = False
            await self._restore()
        elif self._look:
            self._look = False
            await self._look_at_size()
        if self._dead or self._stopping or self._look:
            return
        self._wake.clear()
        try:
            async with asyncio.timeout(LOOK):
                await self._wake.wait()
        except TimeoutError:
            self._look = True

    async def _restore(self) -> None:
        """Offer connections until the kernel has had some. Raises NotAttachedError."""
        pause, said = FIRST_PAUSE, ""
        while not self._stopping:
            self._check_attached()
            try:
                await self._offer()
            except NotAttachedError:
                raise
            except StorageError as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("%s waits: %s", device.name_of(self._index), said)
            else:
                if said:
                    log.warning("%s goes on", device.name_of(self._index))
                return
            # Many hosts that have lost one server do not come back to it all at once.
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.5, 1)):  # noqa: S311
                    await self._wake.wait()
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _offer(self) -> None:
        connections: list[Connection] = []
        sockets: list[socket.socket] = []
        try:
            for _ in range(self._wishes.connections):
                connections.append(await self._connector.open())
                self._check_fit(connections[-1].export)
            sockets = self._plain_ends(connections)
            size = max(connections[0].export.size, self._size)
            await self._reconfigure(size, [sock.fileno() for sock in sockets])
        finally:
            _close(sockets or [connection.sock for connection in connections])

    async def _look_at_size(self) -> None:
        self._check_attached()
        try:
            export = await self._connector.describe()
            if export.size > self._size:
                # What INFO tells may be about to be; what is open has the size that it is told.
                connection = await self._connector.open()
                connection.sock.close()
                export = connection.export
            self._check_fit(export)
        except StorageError as error:
            # A connection that is alive is served whatever becomes of new ones.
            log.debug("%s: %s", device.name_of(self._index), error)
            return
        await self._reconfigure(export.size, [])

    async def _reconfigure(self, size: int, sockets: list[int]) -> None:
        """Give the kernel sockets, if any, and the size in bytes if it is larger."""
        if size <= self._size and not sockets:
            return
        await asyncio.to_thread(
            self._kernel.reconfigure,
            self._index,
            self._connector.uri,
            sockets=sockets,
            size=size if size > self._size else None,
        )
        if size > self._size:
            log.warning("%s has grown to %d bytes", device.name_of(self._index), size)
            self._size = size

    def _check_attached(self) -> None:
        if device.read_identifier(self._index) not in (self._connector.uri, None):
            raise NotAttachedError("it is attached to something else")
        if not device.is_attached(self._index):
            raise NotAttachedError("it is attached no more")

    def _on_news(self) -> None:
        assert self._listener is not None
        if self._listener.read(self._index):
            self._dead = True
            self._wake.set()

    def _look_now(self) -> None:
        self._look = True
        self._wake.set()

    def _stop(self) -> None:
        self._stopping = True
        self._wake.set()


def find_attached(uri: str) -> int | None:
    """The index of the device that is attached to an export."""
    for index in device.list_attached():
        if device.read_identifier(index) == uri:
            return index
    return None


def describe_other(index: int) -> str:
    """What a device is attached to, in a line."""
    identifier = device.read_identifier(index)
    if identifier:
        return f"{device.name_of(index)} is attached to {identifier}"
    return f"{device.name_of(index)} is in use, by process {device.read_pid(index)}"


def _close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()
