"""Where the daemon listens, as people write it: ``HOST:PORT``, ``[IPV6]:PORT``, ``unix:PATH``."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from backends.errors import InvalidError


@dataclass(frozen=True)
class TcpAddress:
    """``port`` 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. Names other than localhost count as open."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True)
class UnixAddress:
    """The path of a socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:PATH``."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path:
            raise InvalidError(f"listen address {text!r} names no path: write unix:PATH")
        return UnixAddress(Path(path))
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InvalidError(f"listen address {text!r}: write an IPv6 address as [{host}]:PORT")
    if not colon or not host or not (port.isascii() and port.isdigit() and len(port) <= 5):
        raise InvalidError(f"listen address {text!r} is neither HOST:PORT nor unix:PATH")
    if int(port) > 65535:
        raise InvalidError(f"listen address {text!r}: a port is at most 65535")
    return TcpAddress(host, int(port))
