"""Listening sockets: TCP and Unix, bound with clear errors, and accepting without busy loops.

Unix socket files: mode 0600 from the moment they exist (``fchmod`` before ``bind``). A file that a
dead daemon left behind refuses connections, and is replaced; one that answers is in use.

Out of file descriptors, ``accept`` fails but the client stays in the queue, so the socket would be
reported readable without end: the listener stops looking for ACCEPT_PAUSE seconds.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from backends.errors import InUseError, InvalidError, StorageError

ACCEPT_PAUSE: Final = 0.5
"""Seconds without accepting when the process is out of file descriptors or memory."""

_BACKLOG: Final = 128
_UNIX_SEND_BUFFER: Final = 1 << 20  # the default makes a reply of 1 MiB wait for its client 5 times
_ACCEPTS_AT_ONCE: Final = 16
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_ABSENT: Final = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL))
_CREDENTIALS: Final = struct.Struct("3i")

log = logging.getLogger(__name__)


class Listener:
    """One listening socket; hands every accepted socket and its peer's name to ``accepted``."""

    def __init__(
        self,
        sock: socket.socket,
        accepted: Callable[[socket.socket, str], None],
        path: Path | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._accepted = accepted
        self._path = path
        self._file = None if path is None else _identity(path)
        self._pause: asyncio.TimerHandle | None = None
        self.address = _format_address(sock) if path is None else f"unix:{path}"
        sock.listen(_BACKLOG)
        self._loop.add_reader(sock, self._on_readable)

    def close(self) -> None:
        """Stop listening; removes the socket file unless it has been replaced."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        if self._path is not None and _identity(self._path) == self._file:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _on_readable(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    log.warning("%s: accept failed: %s", self.address, error.strerror)
                    return
                log.error("%s: no connection can be accepted: %s", self.address, error.strerror)
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(ACCEPT_PAUSE, self._resume)
                return
            try:
                peer = _prepare(sock)
            except OSError:  # gone already
                sock.close()
                continue
            self._accepted(sock, peer)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._on_readable)


async def bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Bind to every address of ``host``; with port 0 all get the same free one.

    Raises InUseError, InvalidError or StorageError.
    """
    where = f"{host}:{port}"
    if not 0 <= port <= 0xFFFF:  # getaddrinfo would take it modulo 65536
        raise InvalidError(f"cannot listen on {where}: a port is a number up to 65535")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidError(f"cannot listen on {where}: {reason}") from None
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, (name, number, *scope) in dict.fromkeys(found):
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        except OSError as error:
            failure = error
            continue
        if not port and sockets:
            number = sockets[0].getsockname()[1]  # noqa: PLW2901
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((name, number, *scope))
        except OSError as error:
            sock.close()
            if error.errno in _ABSENT:
                failure = error  # no IPv6 here: one address that works is enough
                continue
            for other in sockets:
                other.close()
            raise _bind_error(where, error) from None
        sockets.append(sock)
    if not sockets:
        raise _bind_error(where, failure or OSError(errno.EADDRNOTAVAIL, "no address"))
    return sockets


def bind_unix(path: Path) -> socket.socket:
    """Bind a socket file with mode 0600, replacing a dead daemon's.

    Raises InUseError, InvalidError or StorageError.
    """
    if "\0" in str(path):  # the kernel would take what is before it
        raise InvalidError(f"cannot listen on unix:{path}: a NUL character in the path")
    sock = _new_unix_socket()
    try:
        os.fchmod(sock.fileno(), 0o600)
        try:
            sock.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(str(path))
    except StorageError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise _bind_error(f"unix:{path}", error) from None
    return sock


def _new_unix_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def _remove_stale(path: Path) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise InvalidError(f"cannot listen on unix:{path}: a file that is no socket is in the way")
    with _new_unix_socket() as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # its queue of clients is full: somebody listens
            pass
    raise InUseError(f"cannot listen on unix:{path}: another server is listening there")


def _bind_error(where: str, error: OSError) -> StorageError:
    line = f"cannot listen on {where}: {error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        return InUseError(line)
    return InvalidError(line)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _format_address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _prepare(sock: socket.socket) -> str:
    """Set the options of an accepted socket; returns the peer's name for the log."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, _ = _CREDENTIALS.unpack(credentials)
        return f"unix:pid={process},uid={user}"
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A client whose host has vanished is noticed within two minutes.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    host, port = sock.getpeername()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
