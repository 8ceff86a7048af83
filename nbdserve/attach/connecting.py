"""Connections to a server: made, secured, and brought to where the kernel takes over.

A dead peer is found by TCP, not by how long a request takes: what is sent has to be acknowledged by
the other machine within UNACKNOWLEDGED seconds, and an idle connection is probed. So a slow
server is not taken for a dead one, and one that vanished without a word is not waited for.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backends.errors import InvalidError, NotFoundError, StorageError, UnavailableError, one_line
from nbdserve.addresses import TcpAddress, UnixAddress
from nbdserve.attach.server import ServerUri
from nbdserve.protocol.client_handshake import (
    Agreed,
    ClientHandshake,
    ExportInformation,
    HandshakeError,
)
from nbdserve.protocol.constants import OptionReply
from nbdserve.protocol.handshake import StartTls
from nbdserve.server.tls import TlsSession, describe_error

CONNECTING: Final = 15.0
"""Seconds that a connection and its handshake may take."""

UNACKNOWLEDGED: Final = 30
"""Seconds after which a server that acknowledges nothing is given up."""

_KEEPALIVE_IDLE: Final = 10
_KEEPALIVE_INTERVAL: Final = 5
_KEEPALIVE_PROBES: Final = 4
_RECEIVE_SIZE: Final = 16 << 10


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of the client's side, and the name that the server's certificate is to have.

    Without ``ca`` the certificate must be one that this system trusts; without ``hostname`` its
    name is the server's address, or localhost for a Unix socket.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    hostname: str | None = None


@dataclass(frozen=True)
class Connection:
    """A connection whose handshake is done: ``session`` is its TLS, if it has one."""

    sock: socket.socket
    session: TlsSession | None
    export: ExportInformation


class Connector:
    """Makes connections to one server for one export."""

    def __init__(self, server: ServerUri, name: str, tls: TlsFiles) -> None:
        """Reads the TLS files; raises InvalidError when one of them cannot be used."""
        self.uri = server.export(name)
        self._server = server
        self._name = name
        self._context = _load_context(tls) if server.tls else None
        host = server.address.host if isinstance(server.address, TcpAddress) else "localhost"
        self._hostname = tls.hostname or host

    async def open(self) -> Connection:
        """A connection on which the export is open. Raises StorageError with one line."""
        async with self._agreed(opening=True) as connection:
            return connection

    async def describe(self) -> ExportInformation:
        """What the server says about the export now. Raises StorageError with one line."""
        async with self._agreed(opening=False) as connection:
            connection.sock.close()
            return connection.export

    @asynccontextmanager
    async def _agreed(self, *, opening: bool) -> AsyncIterator[Connection]:
        """Carry out a handshake; what goes wrong closes the connection and becomes one line."""
        sock = None
        try:
            async with asyncio.timeout(CONNECTING):
                sock = await self._connect()
                connection = await self._shake_hands(sock, opening=opening)
            yield connection
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, StorageError):
                raise
            if isinstance(error, HandshakeError | OSError | TimeoutError):
                raise self._explained(error) from None
            raise

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        address = self._server.address
        if isinstance(address, UnixAddress):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                await loop.sock_connect(sock, str(address.path))
            except BaseException:
                sock.close()
                raise
            return sock
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        for number, (family, kind, protocol, _, where) in enumerate(found, 1):
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            try:
                await loop.sock_connect(sock, where)
            except BaseException as error:
                sock.close()
                if isinstance(error, OSError) and number < len(found):
                    continue
                raise
            _watch(sock)
            return sock
        raise UnavailableError(f"{address.host} has no address")

    async def _shake_hands(self, sock: socket.socket, *, opening: bool) -> Connection:
        loop = asyncio.get_running_loop()
        handshake = ClientHandshake(self._name, opening=opening, tls=self._context is not None)
        session: TlsSession | None = None
        while True:
            event = handshake.next_event()
            data = handshake.data_to_send()
            if data and session is None:
                await loop.sock_sendall(sock, data)
            elif data and session is not None:
                session.stream.write(data)
                await loop.sock_sendall(sock, session.outgoing.read())
            if isinstance(event, Agreed):
                return Connection(sock, session, event.export)
            if isinstance(event, StartTls):
                session = await self._secure(sock)
                handshake.tls_started()
            else:
                handshake.receive(await _receive(sock, session))

    async def _secure(self, sock: socket.socket) -> TlsSession:
        loop = asyncio.get_running_loop()
        assert self._context is not None
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        stream = self._context.wrap_bio(incoming, outgoing, server_hostname=self._hostname)
        while True:
            try:
                stream.do_handshake()
            except ssl.SSLWantReadError:
                await loop.sock_sendall(sock, outgoing.read())
                data = await loop.sock_recv(sock, _RECEIVE_SIZE)
                if not data:
                    raise UnavailableError(f"{self.uri}: the server ended TLS") from None
                incoming.write(data)
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    await loop.sock_sendall(sock, outgoing.read())
                raise
            else:
                await loop.sock_sendall(sock, outgoing.read())
                return TlsSession(stream, incoming, outgoing, ())

    def _explained(self, error: HandshakeError | OSError) -> StorageError:
        if isinstance(error, HandshakeError):
            line = f"{self.uri}: {error}"
            if error.reply == OptionReply.ERR_TLS_REQD and not self._server.tls:
                line += "; write nbds:// or nbds+unix://, with --uri"
            kind = NotFoundError if error.reply == OptionReply.ERR_UNKNOWN else UnavailableError
            return kind(line)
        if isinstance(error, TimeoutError) and not error.errno:
            return UnavailableError(f"{self.uri}: no answer in {CONNECTING:.0f} seconds")
        if isinstance(error, ssl.SSLCertVerificationError):
            return UnavailableError(
                f"{self.uri}: the server's certificate is not trusted: {error.verify_message}"
            )
        if isinstance(error, ssl.SSLError):
            return UnavailableError(f"{self.uri}: TLS failed: {describe_error(error)}")
        # asyncio puts words of its own in place of the reason; who looks up names has own numbers.
        if isinstance(error, socket.gaierror):
            return UnavailableError(f"{self.uri}: {one_line(error)}")
        reason = os.strerror(error.errno) if error.errno else one_line(error)
        return UnavailableError(f"{self.uri}: {reason}")


async def _receive(sock: socket.socket, session: TlsSession | None) -> bytes:
    loop = asyncio.get_running_loop()
    while True:
        if session is not None:
            with contextlib.suppress(ssl.SSLWantReadError):
                data = session.stream.read(_RECEIVE_SIZE)
                if not data:
                    break
                return data
        data = await loop.sock_recv(sock, _RECEIVE_SIZE)
        if not data:
            break
        if session is None:
            return data
        session.incoming.write(data)
    raise HandshakeError("the server closed the connection")


def _watch(sock: socket.socket) -> None:
    """Let TCP find out when the other machine is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED * 1000)


def _load_context(files: TlsFiles) -> ssl.SSLContext:
    """What a client needs; the server's certificate is always verified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if files.key is not None and files.certificate is None:
        raise InvalidError("a TLS key needs its certificate: give --tls-certificate")
    try:
        where = files.ca
        if files.ca is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            context.load_verify_locations(files.ca)
        where = files.certificate
        if files.certificate is not None:
            context.load_cert_chain(files.certificate, files.key, password=_refuse_encrypted)
    except ssl.SSLError as error:
        raise InvalidError(f"TLS file {where} cannot be used: {describe_error(error)}") from None
    except OSError as error:
        raise InvalidError(f"TLS file {error.filename or where}: {error.strerror}") from None
    return context


def _refuse_encrypted() -> str:
    raise InvalidError("the TLS key is encrypted: decrypt it with openssl pkey")
