"""TLS for the server: certificates read at start, and the handshake of one connection.

TLS 1.2 and up, X.509; with a client CA, clients without a certificate that it signed are refused.
What the certificate calls a client is its DNS names, in any case of letters; a certificate without
DNS names is known by its common name, as RFC 6125 has it for servers.
Sessions are not resumed and not renegotiated: an NBD connection lasts, and what a session ticket
would save is spent once. Errors of files name the file and what is wrong with it.
"""

import contextlib
import hashlib
import logging
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from backends.errors import InvalidError
from nbdserve.protocol.handshake import TlsMode
from nbdserve.server.readiness import Readiness

_RECEIVE_SIZE: Final = 16 << 10

_Pairs = tuple[tuple[str, str], ...]

log = logging.getLogger(__name__)


class TlsError(Exception):
    """The handshake failed; ``str()`` is for the log."""


@dataclass(frozen=True)
class TlsSession:
    """An established session, without a socket.

    What the client sends is written into ``incoming`` and read from ``stream``; what is written to
    ``stream`` is read from ``outgoing`` and sent to the client. ``certificate_names`` is what the
    client's certificate calls it, in lower case; empty when it showed none.
    """

    stream: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    certificate_names: tuple[str, ...]


class Tls:
    """What a listener's connections need: whether TLS is required, and the certificate to show."""

    def __init__(self, mode: TlsMode, context: ssl.SSLContext, fingerprint: bytes = b"") -> None:
        self.mode = mode
        self.fingerprint = fingerprint  # of all that was read
        self._context = context

    async def accept(self, readiness: Readiness, deadline: float) -> TlsSession:
        """Carry out the handshake on a connection that is to be encrypted from here on.

        Raises TlsError once the client has been told what is wrong, and what ``readiness`` does.
        """
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        stream = self._context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                stream.do_handshake()
            except ssl.SSLWantReadError:
                await readiness.send(outgoing.read(), deadline)
                data = await readiness.receive(_RECEIVE_SIZE, deadline)
                if not data:
                    raise TlsError("the client ended the connection") from None
                incoming.write(data)
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):  # the client may have closed already
                    await readiness.send(outgoing.read(), deadline)
                raise TlsError(describe_error(error)) from None
            else:
                await readiness.send(outgoing.read(), deadline)
                return TlsSession(stream, incoming, outgoing, _certificate_names(stream))


def load_tls(mode: TlsMode, certificate: Path, key: Path, client_ca: Path | None) -> Tls:
    """Read the server's certificate chain and key, and the CA that signs clients' certificates.

    All are PEM. Raises InvalidError with one line that names the file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    _check_certificates(certificate, "TLS certificate")
    _check_key(key)
    try:
        context.load_cert_chain(certificate, key, password=lambda: _refuse_encrypted(key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidError(
                f"TLS key {key} does not belong to the certificate in {certificate}"
            ) from None
        raise InvalidError(
            f"TLS certificate {certificate} cannot be used with the key {key}:"
            f" {describe_error(error)}"
        ) from None
    if client_ca is not None:
        _check_certificates(client_ca, "TLS client CA")
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    digest = hashlib.sha256()
    for path in (certificate, key, client_ca):
        if path is not None:
            digest.update(path.read_bytes())
    return Tls(mode, context, digest.digest())


def _certificate_names(stream: ssl.SSLObject) -> tuple[str, ...]:
    """The DNS names of the client's certificate; without any, its common name.

    Raises TlsError when its CA signed something that cannot be read.
    """
    try:
        certificate = stream.getpeercert() or {}
    except (ValueError, ssl.SSLError):
        raise TlsError("the names in the client's certificate cannot be read") from None
    alternatives = cast(_Pairs, certificate.get("subjectAltName", ()))
    names = [name for kind, name in alternatives if kind == "DNS"]
    if not names:
        subject = cast(tuple[_Pairs, ...], certificate.get("subject", ()))
        names = [value for parts in subject for kind, value in parts if kind == "commonName"]
    return tuple(name.lower() for name in names)


def describe_error(error: ssl.SSLError) -> str:
    """OpenSSL's reason in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate was refused: {error.verify_message}"
    return (error.reason or str(error)).replace("_", " ").lower()


def _check_certificates(path: Path, what: str) -> None:
    """See that a file can be read and holds certificates; raises InvalidError."""
    text = _read(path, what)
    if "-----BEGIN " not in text:
        raise InvalidError(f"{what} {path} is not PEM: no line begins with -----BEGIN")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        reason = describe_error(error) if isinstance(error, ssl.SSLError) else str(error)
        raise InvalidError(f"{what} {path} holds no usable certificate: {reason}") from None


def _check_key(path: Path) -> None:
    if "PRIVATE KEY-----" not in _read(path, "TLS key"):
        raise InvalidError(f"TLS key {path} holds no private key in PEM")
    if stat.S_IMODE(path.stat().st_mode) & stat.S_IROTH:
        log.warning("TLS key %s can be read by every user: chmod o-r %s", path, path)


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="ascii", errors="ignore")  # comments
    except OSError as error:
        raise InvalidError(f"{what} {path}: {error.strerror}") from None


def _refuse_encrypted(key: Path) -> str:
    raise InvalidError(
        f"TLS key {key} is encrypted: decrypt it with openssl pkey -in {key} -out FILE"
    )
