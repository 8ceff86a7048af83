"""One address that is listened on, and how clients are let in there."""

import socket
from collections.abc import Callable, Sequence
from functools import partial

from nbdserve.server.entrance import AccessList, Entrance
from nbdserve.server.identity import Identity
from nbdserve.server.listening import Bound, Listener
from nbdserve.server.tls import Tls


class Door:
    """Sockets of one address; what ``accepted`` is given was admitted by the access list."""

    def __init__(
        self,
        sockets: Sequence[Bound],
        tls: Tls | None,
        access: AccessList,
        max_connections: int,
        accepted: "Callable[[Door, socket.socket, Identity], None]",
    ) -> None:
        self.tls = tls
        self.entrance = Entrance("", access, max_connections)
        self.listeners = [
            Listener(bound, self.entrance, partial(accepted, self)) for bound in sockets
        ]
        self.entrance.name = self.listeners[0].address

    def change(self, tls: Tls | None, access: AccessList, max_connections: int) -> None:
        """What holds for clients that come from now on."""
        self.tls = tls
        self.entrance.change(access, max_connections)

    def close(self, *, waiting: bool = False) -> list[socket.socket]:
        """Let nobody in any more; see ``Listener.close``. Returns the sockets that were passed."""
        passed = []
        for listener in self.listeners:
            if listener.passed:
                passed.append(listener.release())
            else:
                listener.close(waiting=waiting)
        self.entrance.close()
        return passed
