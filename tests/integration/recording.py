"""A relay between a client and the daemon that keeps what the client sent, and what that means."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdserve.protocol.constants import (
    CMD_WRITE,
    EXTENDED_REQUEST_MAGIC,
    OPTION_MAGIC,
    REQUEST_MAGIC,
)

_OPTION = struct.Struct(">QII")
_COMPACT = struct.Struct(">IHHQQI")
_EXTENDED = struct.Struct(">IHHQQQ")


@dataclass(frozen=True)
class Sent:
    """A request as a client sent it; `extended` tells which of the two headers it had."""

    extended: bool
    command: int
    flags: int
    offset: int
    length: int


class Recorder:
    """Listens on `path` for clients of the daemon that listens on `target`, until `close`."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self._target = target
        self._streams: list[bytearray] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start(self._accept)

    def close(self) -> None:
        """Take no more clients, and wait until those that there were are gone."""
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a client is still connected"
        self._listener.close()

    def requests(self) -> list[list[Sent]]:
        """Return the requests of each client that has been connected."""
        return [list(_parse(bytes(stream))) for stream in self._streams]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._target))
            stream = bytearray()
            self._streams.append(stream)
            self._start(_pump, client, server, stream)
            self._start(_pump, server, client, bytearray())

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


def _pump(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    """Pass on until one of them ends, and then its end."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            kept += data
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _parse(stream: bytes) -> Iterator[Sent]:
    """Go through what a client sent: its flags, its options, its requests."""
    place = 4
    while len(stream) - place >= _OPTION.size:
        magic, _, length = _OPTION.unpack_from(stream, place)
        if magic != OPTION_MAGIC:
            break
        place += _OPTION.size + length
    while place < len(stream):
        (magic,) = struct.unpack_from(">I", stream, place)
        assert magic in (REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC), hex(magic)
        header = _EXTENDED if magic == EXTENDED_REQUEST_MAGIC else _COMPACT
        _, flags, command, _, offset, length = header.unpack_from(stream, place)
        yield Sent(header is _EXTENDED, command, flags, offset, length)
        place += header.size + (length if command == CMD_WRITE else 0)
