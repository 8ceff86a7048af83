"""Where the control socket is, and how to bind and reach it.

The address of a Unix socket holds 107 bytes, a path may be longer. Both ends therefore name the
socket through a descriptor of its directory, so any data directory works.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "control.sock"
_HIDDEN = "control.sock.hidden"


@contextmanager
def _directory(data: Path) -> Iterator[str]:
    descriptor = os.open(data, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def bind(data: Path) -> socket.socket:
    """A listening socket at ``DATA/control.sock``, open to its owner alone.

    The caller holds the lock of the data directory, so what lies there is stale and is replaced.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        (data / _HIDDEN).unlink(missing_ok=True)
        with _directory(data) as directory:
            listener.bind(f"{directory}/{_HIDDEN}")
        (data / _HIDDEN).chmod(0o600)  # before anyone can connect, hence the second name
        listener.listen(64)
        show(data)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(data: Path) -> socket.socket:
    """A connection to whoever serves ``data``.

    Raises FileNotFoundError or ConnectionRefusedError when nobody does.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _directory(data) as directory:
            connection.connect(f"{directory}/{NAME}")
    except OSError as error:
        connection.close()
        if error.errno == errno.EAGAIN:  # its backlog is full: it is there, and busy
            raise BlockingIOError(error.errno, "the daemon is too busy to answer") from None
        raise
    return connection


def hide(data: Path) -> None:
    """Take the socket's name away, so that nobody else connects."""
    (data / NAME).rename(data / _HIDDEN)


def show(data: Path) -> None:
    """Give the socket its name back."""
    (data / _HIDDEN).rename(data / NAME)


def remove(data: Path) -> None:
    """Take the socket's name away for good."""
    for name in (NAME, _HIDDEN):
        (data / name).unlink(missing_ok=True)
