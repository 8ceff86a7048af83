"""The entrance of a listener: who may come in, and how many at once.

The access list is looked at first. Who is not on it is closed at once, before a byte is sent.

Then a client takes one of ``max_connections`` places, and keeps it to its end. A client that says
nothing, or speaks slowly, holds its place until its handshake times out, and enough such clients
would shut everybody out. So when all places are taken, the newcomer gets that of a client still in
its handshake: of whoever has the most such clients, the oldest one. Whoever: one address (of IPv6,
one network of 64 bits, which a single host can have for itself) or one user. So who holds places
without using them loses them, and an honest client has to keep its own for some milliseconds only.
One that has opened an export is never disturbed: when such have all places, the newcomer is closed.

Clients in their handshake also have to leave descriptors for everything else, and take three each
(the socket, and the ends of a relay). So a listener has at most an eighth as many of them as the
process may have descriptors; beyond that it is the same as when all places are taken.

What is logged of clients that have opened nothing goes through ``report``: at most LINES lines in
INTERVAL seconds, the others as a number. So nobody fills the disk by connecting.
"""

import asyncio
import logging
import resource
from collections.abc import Hashable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import Final, Protocol

from nbdserve.server.identity import Identity

MAX_CONNECTIONS: Final = 2048
"""Places of a listener that is not given another number."""

LINES: Final = 20
INTERVAL: Final = 10.0
"""Seconds; with LINES what is logged at most of clients that have opened nothing."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AccessList:
    """Who may connect: over TCP from ``networks``, over Unix sockets as ``users`` (numbers).

    None admits everybody.
    """

    networks: tuple[IPv4Network | IPv6Network, ...] | None = None
    users: frozenset[int] | None = None

    @property
    def limits(self) -> bool:
        """Whether some address is kept out."""
        return self.networks is not None and all(net.prefixlen for net in self.networks)

    def admits(self, client: Identity) -> bool:
        """Whether the list has the client; one without address or user is on no list."""
        if self.networks is not None:
            address = client.address
            return address is not None and any(address in network for network in self.networks)
        return self.users is None or client.user in self.users


EVERYBODY: Final = AccessList()


class Visitor(Protocol):
    """A connection, as the entrance sees it."""

    @property
    def identity(self) -> Identity:
        """Who it is."""

    def abort(self) -> None:
        """Close it now."""


class Entrance:
    """Of one listener; ``name`` is for the log. A visitor that entered leaves once."""

    def __init__(
        self,
        name: str,
        access: AccessList = EVERYBODY,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.name = name
        self._access = access
        self._max_connections = max_connections
        self._inside: set[Visitor] = set()  # who has a place
        self._max_arriving = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8
        # Those in their handshake by who they are, each group's oldest first.
        self._arriving: dict[Hashable, dict[Visitor, None]] = {}
        self._arriving_count = 0
        self._window: asyncio.TimerHandle | None = None
        self._lines = 0
        self._unlogged = 0

    def change(self, access: AccessList, max_connections: int) -> None:
        """What holds from now on; who is inside stays."""
        self._access = access
        self._max_connections = max_connections

    def admits(self, client: Identity) -> bool:
        """Whether the access list lets the client in; logs it when not."""
        if self._access.admits(client):
            return True
        self._refuse(client, "not on the access list")
        return False

    def enter(self, visitor: Visitor) -> bool:
        """Take a place for a visitor that begins its handshake; False when there is none."""
        full = len(self._inside) >= self._max_connections
        if (full or self._arriving_count >= self._max_arriving) and not self._make_room():
            self._refuse(visitor.identity, f"all {self._max_connections} connections are taken")
            return False
        self._inside.add(visitor)
        self._arriving.setdefault(_origin(visitor.identity), {})[visitor] = None
        self._arriving_count += 1
        return True

    def settle(self, visitor: Visitor) -> None:
        """The visitor's handshake is over, and its place is its own."""
        origin = _origin(visitor.identity)
        group = self._arriving.get(origin, {})
        if visitor not in group:
            return
        del group[visitor]
        self._arriving_count -= 1
        if not group:
            del self._arriving[origin]

    def leave(self, visitor: Visitor) -> None:
        """The visitor is gone."""
        self.settle(visitor)
        self._inside.discard(visitor)

    def report(self, client: Identity, text: str) -> None:
        """Log what became of a client that has opened nothing, unless there are too many such."""
        if self._lines >= LINES:
            self._unlogged += 1
            return
        self._lines += 1
        log.info("%s", text, extra=client.about())
        if self._window is None:
            self._window = asyncio.get_running_loop().call_later(INTERVAL, self._next_window)

    def close(self) -> None:
        """Nobody is let in any more."""
        if self._window is not None:
            self._window.cancel()
            self._count_unlogged()

    def _make_room(self) -> bool:
        """Drop the oldest handshake of whoever has the most of them."""
        if not self._arriving:
            return False
        crowd: dict[Visitor, None] = max(self._arriving.values(), key=len)
        victim = next(iter(crowd))
        self._refuse(victim.identity, "others need the place, and its handshake is the oldest")
        self.leave(victim)
        victim.abort()
        return True

    def _refuse(self, client: Identity, reason: str) -> None:
        self.report(client, f"refused at {self.name}: {reason}")

    def _next_window(self) -> None:
        self._window = None
        self._count_unlogged()

    def _count_unlogged(self) -> None:
        if self._unlogged:
            log.info("%s: %d more lines of this kind", self.name, self._unlogged)
        self._lines = self._unlogged = 0


def _origin(client: Identity) -> Hashable:
    """Who shares a client's lot when places are scarce."""
    address = client.address
    if isinstance(address, IPv6Address):
        return int(address) >> 64
    return address or client.user
