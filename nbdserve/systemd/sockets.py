"""Listening sockets that the service manager opened and passes on (sd_listen_fds(3)).

They are its own: it keeps them while the daemon is restarted, and clients that connect meanwhile
wait in their queue. So a socket that is not listened on any more comes back here and stays open,
and its file is never removed.

Which of them is for which listener is told by its address alone. Names of the descriptors
(``FileDescriptorName=``) are shown where something is wrong.
"""

import os
import socket
from collections.abc import MutableMapping
from typing import Final

from backends.errors import InvalidError

FIRST_DESCRIPTOR: Final = 3

Key = tuple[str, int] | str
"""Host and port of a TCP socket, the path of a Unix socket."""


class PassedSockets:
    """The sockets that were passed and are not in use."""

    def __init__(self, sockets: dict[Key, socket.socket] | None = None) -> None:
        self._sockets = dict(sockets or {})
        self._keys = frozenset(self._sockets)

    @property
    def unused(self) -> list[str]:
        """The addresses of those that nobody took."""
        return [
            f"unix:{key}" if isinstance(key, str) else f"{key[0]}:{key[1]}" for key in self._sockets
        ]

    def has(self, key: Key) -> bool:
        """Whether such a socket was passed, in use or not."""
        return key in self._keys

    def take(self, key: Key) -> socket.socket | None:
        return self._sockets.pop(key, None)

    def give_back(self, sock: socket.socket) -> None:
        self._sockets[_key(sock)] = sock


def take_passed_sockets(environment: MutableMapping[str, str] = os.environ) -> PassedSockets:
    """Those that the environment speaks of, which then says nothing more. InvalidError."""
    process = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if process != str(os.getpid()) or not count.isdecimal():
        return PassedSockets()
    sockets: dict[Key, socket.socket] = {}
    for number in range(int(count)):
        name = (names[number] if number < len(names) else "") or "without a name"
        sock = _adopt(FIRST_DESCRIPTOR + number, name)
        if (key := _key(sock)) in sockets:
            raise InvalidError(f"the service manager passed two sockets for {key}")
        sockets[key] = sock
    return PassedSockets(sockets)


def _adopt(descriptor: int, name: str) -> socket.socket:
    what = f"descriptor {descriptor} ({name}), which the service manager passed,"
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise InvalidError(f"{what} is no socket: {error.strerror}") from None
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
    if not listens or sock.type != socket.SOCK_STREAM or sock.family not in families:
        raise InvalidError(f"{what} is no listening stream socket: use ListenStream=, Accept=no")
    if sock.family == socket.AF_UNIX and not isinstance(_key(sock), str):
        raise InvalidError(f"{what} has no path in the file system")
    sock.setblocking(False)
    return sock


def _key(sock: socket.socket) -> Key:
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return name[0], name[1]
    if isinstance(name, bytes):  # the abstract name space
        return name.decode(errors="replace"), 0
    return str(name)
