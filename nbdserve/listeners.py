"""The addresses that the daemon listens on: those of the configuration, at its start and later."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from backends.errors import InUseError
from nbdserve.addresses import Address, TcpAddress, UnixAddress
from nbdserve.configuration.listeners import ListenerConfiguration
from nbdserve.configuration.settings import Configuration
from nbdserve.configuration.tls import TlsConfiguration
from nbdserve.reloading import Change
from nbdserve.server import Server
from nbdserve.server.door import Door
from nbdserve.server.listening import Bound, bind_tcp, bind_unix
from nbdserve.server.tls import Tls, load_tls
from nbdserve.systemd.sockets import PassedSockets

log = logging.getLogger(__name__)

_Certificates = dict[TlsConfiguration | None, Tls | None]


async def load_certificates(configuration: Configuration) -> _Certificates:
    """Read the files of all listeners, each once. InvalidError."""
    found: _Certificates = {None: None}
    for tls in dict.fromkeys(listener.tls for listener in configuration.listeners):
        if tls is not None:
            found[tls] = await asyncio.to_thread(
                load_tls, tls.mode, tls.certificate, tls.key, tls.client_ca
            )
    return found


class Listeners:
    """The doors of a server, by address; ``passed`` are what a service manager has opened."""

    def __init__(self, server: Server, passed: PassedSockets) -> None:
        self._server = server
        self._passed = passed
        self._doors: dict[Address, tuple[ListenerConfiguration, Door]] = {}

    async def start(self, configuration: Configuration, certificates: _Certificates) -> None:
        """Listen on all addresses, or on none. StorageError."""
        bound: list[tuple[ListenerConfiguration, list[Bound]]] = []
        try:
            for wanted in configuration.listeners:
                bound.append((wanted, await self._bind(wanted)))
        except BaseException:
            self._give_up(found for _, sockets in bound for found in sockets)
            raise
        for wanted, sockets in bound:
            self._open(wanted, sockets, certificates)
            _warn_of(wanted, configuration)
        for address in self._passed.unused:
            log.warning(
                "the service manager listens on %s, which the configuration does not name:"
                " clients wait there for nothing",
                address,
            )

    async def prepare(self, old: Configuration, new: Configuration) -> Change | None:
        """See reloading.py."""
        certificates = await load_certificates(new)
        wanted = {listener.address: listener for listener in new.listeners}
        removed = [address for address in self._doors if address not in wanted]
        added: list[tuple[ListenerConfiguration, list[Bound]]] = []
        undo: list[Callable[[], None]] = []

        def discard() -> None:
            self._give_up(found for _, sockets in added for found in sockets)
            for step in reversed(undo):
                step()

        what = [f"{address}: not listened on any more; its connections stay" for address in removed]
        steps: list[Callable[[], None]] = [partial(self._remove, address) for address in removed]
        try:
            for address, listener in wanted.items():
                if address not in self._doors:
                    sockets = await self._bind_beside(listener, removed, undo)
                    added.append((listener, sockets))
                    what.append(f"{address}: listened on")
                    # Before those that may have the same port are closed.
                    steps.insert(0, partial(self._open, listener, sockets, certificates))
                    steps.append(partial(_warn_of, listener, new))
                    continue
                before, door = self._doors[address]
                changed = _differences(before, listener, door, certificates)
                if changed:
                    self._change_file(before, listener, door, undo)
                    what.append(f"{address}: {', '.join(changed)}")
                    steps.append(partial(self._change, listener, door, certificates))
                    steps.append(partial(_warn_of, listener, new))
        except BaseException:
            discard()
            raise

        def apply() -> None:
            for step in steps:
                step()

        return Change(what, apply, discard) if what else None

    async def _bind(self, wanted: ListenerConfiguration, *, share: bool = False) -> list[Bound]:
        address = wanted.address
        if isinstance(address, TcpAddress):
            return await bind_tcp(address.host, address.port, self._passed.take, share=share)
        sock = self._passed.take(str(address.path.absolute()))
        if sock is not None:
            return [Bound(sock, address.path, passed=True)]
        return [bind_unix(address.path, wanted.socket_mode, wanted.socket_group)]

    async def _bind_beside(
        self,
        wanted: ListenerConfiguration,
        removed: Sequence[Address],
        undo: list[Callable[[], None]],
    ) -> list[Bound]:
        """Bind, also where addresses that are about to be removed have the same port."""
        try:
            return await self._bind(wanted)
        except InUseError:
            port = wanted.address.port if isinstance(wanted.address, TcpAddress) else None
            rivals = [
                listener
                for address in removed
                if isinstance(address, TcpAddress) and port and address.port == port
                for listener in self._doors[address][1].listeners
            ]
            if not rivals:
                raise
            for listener in rivals:
                listener.share_port(True)
                undo.append(partial(listener.share_port, False))
            return await self._bind(wanted, share=True)

    def _give_up(self, sockets: Iterable[Bound]) -> None:
        for found in sockets:
            if found.passed:
                self._passed.give_back(found.sock)
            else:
                found.close()

    def _open(
        self, wanted: ListenerConfiguration, sockets: list[Bound], certificates: _Certificates
    ) -> None:
        tls = certificates[wanted.tls]
        door = self._server.open(sockets, tls, wanted.access, wanted.max_connections)
        self._doors[wanted.address] = wanted, door

    def _remove(self, address: Address) -> None:
        _, door = self._doors.pop(address)
        for sock in self._server.close(door):
            self._passed.give_back(sock)
            log.warning(
                "the service manager goes on listening on %s: clients wait there for nothing"
                " until it does not",
                address,
            )
        for other, door in self._doors.values():  # nobody shares a port any longer
            if isinstance(other.address, TcpAddress):
                for listener in door.listeners:
                    listener.share_port(False)

    def _change(
        self, wanted: ListenerConfiguration, door: Door, certificates: _Certificates
    ) -> None:
        door.change(certificates[wanted.tls], wanted.access, wanted.max_connections)
        self._doors[wanted.address] = wanted, door

    @staticmethod
    def _change_file(
        before: ListenerConfiguration,
        after: ListenerConfiguration,
        door: Door,
        undo: list[Callable[[], None]],
    ) -> None:
        """The file's mode and group, at once, since that may fail."""
        if _file(before) == _file(after) or door.listeners[0].passed:
            return
        (listener,) = door.listeners
        # Without a group given, the file has that of the process, unless it had another before.
        group = after.socket_group
        if group is None and before.socket_group is not None:
            group = Path("/proc/self").stat().st_gid
        listener.open_to(after.socket_mode, group)
        undo.append(partial(listener.open_to, before.socket_mode, before.socket_group))


def _file(listener: ListenerConfiguration) -> tuple[int, int | None]:
    return listener.socket_mode, listener.socket_group


def _differences(
    before: ListenerConfiguration,
    after: ListenerConfiguration,
    door: Door,
    certificates: _Certificates,
) -> list[str]:
    """What is changed of an address, in words."""
    found = []
    old, new = door.tls, certificates[after.tls]
    if before.tls != after.tls:
        found.append("TLS changed")
    elif old is not None and new is not None and old.fingerprint != new.fingerprint:
        found.append("TLS files read again")
    if before.access != after.access:
        found.append("access list changed")
    if before.max_connections != after.max_connections:
        found.append(f"{after.max_connections} connections instead of {before.max_connections}")
    if isinstance(after.address, UnixAddress) and _file(before) != _file(after):
        found.append("mode or group of the file changed")
    return found


def _warn_of(listener: ListenerConfiguration, configuration: Configuration) -> None:
    if listener.lacks:
        limited = any(rule.certificates for rule in configuration.exports)
        log.warning(
            "%s is open to the network without %s: whoever reaches it can read and write every"
            " volume%s",
            listener.address,
            listener.lacks,
            " that no certificate is asked for" if limited else "",
        )
