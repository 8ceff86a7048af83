"""The server that a volume is attached from, as people write it.

``nbd://HOST[:PORT]/``, ``nbd+unix:///?socket=PATH``, and ``nbds://``, ``nbds+unix://`` with TLS:
the forms of the NBD URI specification. The export's name is given beside it, or is its path.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from backends.errors import InvalidError
from nbdserve.addresses import Address, TcpAddress, UnixAddress

DEFAULT_PORT: Final = 10809


@dataclass(frozen=True)
class ServerUri:
    """Where a server is, and whether to speak to it through TLS."""

    address: Address
    tls: bool

    def export(self, name: str) -> str:
        """The URI of one of its exports: the same text whenever it is the same export."""
        scheme = "nbds" if self.tls else "nbd"
        path = quote(name, safe="@")
        if isinstance(self.address, UnixAddress):
            return f"{scheme}+unix:///{path}?socket={quote(str(self.address.path), safe='/')}"
        return f"{scheme}://{self.address}/{path}"


def parse_uri(text: str, name: str) -> ServerUri:
    """Read the URI of a server from which the export ``name`` is wanted; raises InvalidError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InvalidError(f"URI {text!r}: {error}") from None
    if parts.scheme not in ("nbd", "nbds", "nbd+unix", "nbds+unix"):
        raise InvalidError(
            f"URI {text!r} begins with none of nbd://, nbds://, nbd+unix://, nbds+unix://"
        )
    if unquote(parts.path.removeprefix("/")) not in ("", name):
        raise InvalidError(f"URI {text!r} names another export than {name}")
    if parts.fragment or parts.username is not None:
        raise InvalidError(f"URI {text!r} has a part that NBD URIs do not have")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    socket = query.pop("socket", "")
    if query:
        raise InvalidError(
            f"URI {text!r}: {next(iter(query))!r} is not known here; TLS has options"
        )
    tls = parts.scheme.startswith("nbds")
    if parts.scheme.endswith("+unix"):
        if not socket or parts.netloc:
            raise InvalidError(f"URI {text!r}: write {parts.scheme}:///?socket=PATH")
        return ServerUri(UnixAddress(Path(socket).absolute()), tls)
    if socket:
        raise InvalidError(f"URI {text!r}: a socket goes with {parts.scheme}+unix://")
    if not parts.hostname:
        raise InvalidError(f"URI {text!r} names no host")
    return ServerUri(TcpAddress(parts.hostname, port or DEFAULT_PORT), tls)
