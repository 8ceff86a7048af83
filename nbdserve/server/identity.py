"""Who is at the other end of a connection."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from nbdserve.logs import about


@dataclass(frozen=True)
class Identity:
    """What is known of a client; ``peer`` names it in the log, ``connection`` is its number there.

    ``address`` is that of a TCP client (IPv4-mapped ones as IPv4), ``user`` the numeric user ID of
    the process that connected to a Unix socket. ``secure`` says that TLS has begun;
    ``certificate_names`` are those of the certificate that the client showed, in lower case.
    """

    peer: str
    address: IPv4Address | IPv6Address | None = None
    user: int | None = None
    secure: bool = False
    certificate_names: tuple[str, ...] = ()
    connection: int | None = None

    def about(self, export: str | None = None) -> dict[str, Mapping[str, object]]:
        """The ``extra`` of a log call about this client, which has opened ``export``."""
        return about(connection=self.connection, client=self.peer, export=export)
