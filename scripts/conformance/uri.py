"""NBD URIs, as doc/uri.md of the reference implementation and libnbd have them.

``nbd://HOST[:PORT]/EXPORT``, ``nbd+unix:///EXPORT?socket=PATH``, and ``nbds`` in place of ``nbd``
for TLS. Queries: ``socket``, ``tls-certificates`` (a directory with ca-cert.pem, and
client-cert.pem and client-key.pem if there are any), ``tls-hostname``, ``tls-verify-peer``; others
are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

DEFAULT_PORT = 10809


class UriError(ValueError):
    """A URI that cannot be used; ``str()`` is a line for the user."""


@dataclass(frozen=True)
class Uri:
    """Where a server listens, and which export of it is meant; ``path`` for a Unix socket."""

    tls: bool
    host: str
    port: int
    path: str
    export: str
    certificates: str = ""
    server_name: str = ""
    verify: bool = True

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        if self.path:
            return f"{scheme}+unix:///{self.export}?socket={self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{self.export}"


def parse_uri(text: str) -> Uri:
    """Parse a URI; raises UriError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UriError(f"{text}: {error}") from None
    schemes = {
        "nbd": (False, False),
        "nbds": (True, False),
        "nbd+unix": (False, True),
        "nbds+unix": (True, True),
    }
    if parts.scheme not in schemes:
        raise UriError(f"{text}: a URI begins with nbd://, nbds://, nbd+unix:// or nbds+unix://")
    tls, unix = schemes[parts.scheme]
    # Not urllib's parse_qs: in these URIs a plus sign is one.
    pairs = (pair.partition("=") for pair in parts.query.split("&") if pair)
    query = {unquote(name): unquote(value) for name, _, value in pairs}
    if "tls-psk-file" in query:
        raise UriError(f"{text}: pre-shared keys are not supported, only certificates")
    path = query.get("socket", "")
    if unix and not path:
        raise UriError(f"{text}: a Unix socket is named by ?socket=PATH")
    if not unix and path:
        raise UriError(f"{text}: socket= is for nbd+unix:// and nbds+unix://")
    if not unix and not parts.hostname:
        raise UriError(f"{text}: names no host")
    # The first slash separates; what else is there belongs to the name.
    export = unquote(parts.path[1:] if parts.path.startswith("/") else parts.path)
    return Uri(
        tls,
        "" if unix else str(parts.hostname),
        DEFAULT_PORT if port is None else port,
        path,
        export,
        query.get("tls-certificates", ""),
        query.get("tls-hostname", ""),
        query.get("tls-verify-peer", "true").lower() not in ("false", "0", "no", "off"),
    )
