"""TLS as a client: which certificates are shown and which are believed."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from .uri import Uri


class TlsError(Exception):
    """Certificates that cannot be used; ``str()`` is a line for the user."""


@dataclass(frozen=True)
class Tls:
    """What a connection needs to be upgraded; empty strings where nothing was given.

    ``server_name`` is the name that the server's certificate must bear, and that it is told. On a
    Unix socket it may be empty: then any certificate that ``ca`` signed will do.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""
    server_name: str = ""
    verify: bool = True

    def context(self, highest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """Make what connections are wrapped by; raises TlsError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.verify and bool(self.server_name)
        context.verify_mode = ssl.CERT_REQUIRED if self.verify else ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if highest is not None:
            context.maximum_version = highest
        try:
            if self.ca:
                context.load_verify_locations(self.ca)
            elif self.verify:
                context.load_default_certs()
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key or None, _no_password)
        except (OSError, ssl.SSLError) as error:
            names = ", ".join(name for name in (self.ca, self.certificate, self.key) if name)
            raise TlsError(f"{names}: {error.strerror or error}") from None
        return context


def gather(uri: Uri, given: Tls) -> Tls:
    """What the URI says, and what was ``given`` besides, which wins."""
    ca, certificate, key = given.ca, given.certificate, given.key
    if uri.certificates:
        directory = Path(uri.certificates)
        if not directory.is_dir():
            raise TlsError(f"{directory}: not a directory (tls-certificates=)")
        ca = ca or _present(directory / "ca-cert.pem")
        if not certificate:
            certificate = _present(directory / "client-cert.pem")
            key = _present(directory / "client-key.pem")
    name = given.server_name or uri.server_name or uri.host
    return Tls(ca, certificate, key, name, given.verify and uri.verify)


def _present(path: Path) -> str:
    return str(path) if path.exists() else ""


def _no_password() -> str:
    raise TlsError("the client's key has a password, which this program does not ask for")
