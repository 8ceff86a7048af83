"""Listening sockets: TCP and Unix, bound with clear errors, and accepting without busy loops.

Unix socket files: mode 0600 from the moment they exist (``fchmod`` before ``bind``); another mode
and group come after that, by the file that was opened (``O_PATH``), not by its path. A file that a
dead daemon left behind refuses connections, and is replaced; one that answers is in use.

Out of file descriptors, ``accept`` fails but the client stays in the queue, so the socket would be
reported readable without end: the listener stops looking for ACCEPT_PAUSE seconds.
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backends.errors import InUseError, InvalidError, StorageError
from nbdserve.server.entrance import Entrance
from nbdserve.server.identity import Identity

ACCEPT_PAUSE: Final = 0.5
"""Seconds without accepting when the process is out of file descriptors or memory."""

UNIX_SEND_BUFFER: Final = 1 << 20
"""Bytes; the default makes a reply of 1 MiB wait for its client 5 times."""

OWNER_ONLY: Final = 0o600
"""Mode of a Unix socket's file that is not given another one."""

_BACKLOG: Final = 1024
_ACCEPTS_AT_ONCE: Final = 16
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_ABSENT: Final = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL))
_CREDENTIALS: Final = struct.Struct("3i")

log = logging.getLogger(__name__)


Take = Callable[[tuple[str, int]], socket.socket | None]


@dataclass(frozen=True)
class Bound:
    """A socket that is bound; ``path`` is that of its file.

    ``passed`` says that somebody else keeps it open: its file stays.
    """

    sock: socket.socket
    path: Path | None = None
    passed: bool = False

    def close(self) -> None:
        """Give it up before it was listened on."""
        self.sock.close()
        if self.path is not None and not self.passed:
            self.path.unlink(missing_ok=True)


class Listener:
    """One listening socket; hands the socket of each client that the entrance admits on."""

    def __init__(
        self,
        bound: Bound,
        entrance: Entrance,
        accepted: Callable[[socket.socket, Identity], None],
    ) -> None:
        sock, path = bound.sock, bound.path
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._entrance = entrance
        self._accepted = accepted
        self._path = path
        self._file = None if path is None else _identity(path)
        self.passed = bound.passed
        self._pause: asyncio.TimerHandle | None = None
        self.address = _format_address(sock) if path is None else f"unix:{path}"
        sock.listen(_BACKLOG)
        self._loop.add_reader(sock, self._on_readable)

    def release(self) -> socket.socket:
        """Stop accepting; the socket, which goes on listening, is the caller's."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._loop.remove_reader(self._sock)
        return self._sock

    def close(self, *, waiting: bool = False) -> None:
        """Stop listening; removes the socket file unless it has been replaced, or was passed.

        With ``waiting``, who has connected by now is let in first.
        """
        self.release()
        if self._has_its_file() and not self.passed:
            assert self._path is not None
            with contextlib.suppress(OSError):
                self._path.unlink()
        if waiting:
            with contextlib.suppress(OSError):  # out of descriptors: they will come again
                while self._accept():
                    pass
        self._sock.close()

    def open_to(self, mode: int, group: int | None) -> None:
        """Give the socket's file another mode, and another group unless None. InvalidError."""
        if not self._has_its_file():
            raise InvalidError(f"{self.address}: the socket's file has been removed or replaced")
        assert self._path is not None
        _open_to_others(self._path, mode, group)

    def share_port(self, shared: bool) -> None:
        """Whether sockets of this user may be bound to the same TCP port, if they want that too."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)

    def _has_its_file(self) -> bool:
        return self._path is not None and _identity(self._path) == self._file

    def _on_readable(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                if not self._accept():
                    return
            except OSError as error:
                log.error("%s: no connection can be accepted: %s", self.address, error.strerror)
                self._loop.remove_reader(self._sock)
                self._pause = self._loop.call_later(ACCEPT_PAUSE, self._resume)
                return

    def _accept(self) -> bool:
        """Take one client; False when none waits. OSError when resources are exhausted."""
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            log.warning("%s: accept failed: %s", self.address, error.strerror)
            return False
        try:
            identity = _identify(sock)
            if self._entrance.admits(identity):
                _prepare(sock)
                self._accepted(sock, identity)
                return True
        except OSError:  # gone already
            pass
        sock.close()
        return True

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._on_readable)


async def bind_tcp(
    host: str, port: int, take: Take = lambda _: None, *, share: bool = False
) -> list[Bound]:
    """Bind to every address of ``host``; with port 0 all get the same free one.

    ``take`` gives the socket of an address that somebody has bound already. With ``share`` a port
    may be in use by one that shares it (``Listener.share_port``).

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
    sockets: list[Bound] = []
    failure: OSError | None = None
    for family, kind, protocol, _, (name, number, *scope) in dict.fromkeys(found):
        if (taken := take((str(name), int(number)))) is not None:
            sockets.append(Bound(taken, passed=True))
            continue
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        except OSError as error:
            failure = error
            continue
        if not port and sockets:
            number = sockets[0].sock.getsockname()[1]  # noqa: PLW2901
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if share:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((name, number, *scope))
        except OSError as error:
            sock.close()
            if error.errno in _ABSENT:
                failure = error  # no IPv6 here: one address that works is enough
                continue
            for other in sockets:
                other.close()
            raise _bind_error(where, error) from None
        sockets.append(Bound(sock))
    if not sockets:
        raise _bind_error(where, failure or OSError(errno.EADDRNOTAVAIL, "no address"))
    return sockets


def bind_unix(path: Path, mode: int = OWNER_ONLY, group: int | None = None) -> Bound:
    """Bind a socket file, replacing a dead daemon's; ``group`` None is that of the process.

    Raises InUseError, InvalidError or StorageError.
    """
    if "\0" in str(path):  # the kernel would take what is before it
        raise InvalidError(f"cannot listen on unix:{path}: a NUL character in the path")
    sock = _new_unix_socket()
    try:
        os.fchmod(sock.fileno(), OWNER_ONLY)
        try:
            sock.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(str(path))
        if mode != OWNER_ONLY or group is not None:
            try:
                _open_to_others(path, mode, group)
            except InvalidError:
                path.unlink(missing_ok=True)
                raise
    except StorageError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise _bind_error(f"unix:{path}", error) from None
    return Bound(sock, path)


def _open_to_others(path: Path, mode: int, group: int | None) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        file = Path(f"/proc/self/fd/{descriptor}")  # since chmod wants a path
        if group is not None:
            os.chown(file, -1, group)
        file.chmod(mode)
    except OSError as error:
        what = f"mode {mode:04o}" if group is None else f"mode {mode:04o} and group {group}"
        raise InvalidError(f"cannot give the socket {path} {what}: {error.strerror}") from None
    finally:
        os.close(descriptor)


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


def _identify(sock: socket.socket) -> Identity:
    """Who connected."""
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, _ = _CREDENTIALS.unpack(credentials)
        return Identity(f"unix:pid={process},uid={user}", user=user)
    host, port = sock.getpeername()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        return Identity(f"[{host}]:{port}", address.ipv4_mapped or address)
    return Identity(f"{host}:{port}", address)


def _prepare(sock: socket.socket) -> None:
    """Set the options of an accepted socket."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A client whose host has vanished is noticed within two minutes.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
