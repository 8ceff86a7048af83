"""A small NBD client: what the benchmark fills volumes and times single requests with.

Blocking, one connection over a Unix socket, simple replies only.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from nbdserve.protocol.constants import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    INIT_PASSWD,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
)
from scripts.bench.process import BenchError

_GREETING: Final = struct.Struct(">QQH")
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_IN_FLIGHT: Final = 64
_TIMEOUT: Final = 120.0


class Client:
    """An open connection to an export of ``size`` bytes; a context manager."""

    def __init__(self, path: Path, export: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_TIMEOUT)
        try:
            self._socket.connect(str(path))
            self.size = self._go(export)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, and wait until the server has seen it."""
        try:
            self._socket.sendall(_REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
            while self._socket.recv(1 << 16):
                pass
        except OSError:
            pass  # the server has gone
        finally:
            self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes."""
        self._socket.sendall(_REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, 0, offset, length))
        self._take_reply()
        return self._receive(length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write ``data`` and wait for the reply."""
        self._socket.sendall(
            _REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, 0, offset, len(data)) + data
        )
        self._take_reply()

    def write_many(self, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
        """Write pieces of (offset, data), many in flight; small ones, or the sockets fill up."""
        waiting = 0
        for offset, data in pieces:
            header = _REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, 0, offset, len(data))
            self._socket.sendall(header + data)
            waiting += 1
            if waiting == _IN_FLIGHT:
                for _ in range(_IN_FLIGHT // 2):
                    self._take_reply()
                waiting -= _IN_FLIGHT // 2
        for _ in range(waiting):
            self._take_reply()

    def flush(self) -> None:
        """Make everything written durable."""
        self._socket.sendall(_REQUEST.pack(REQUEST_MAGIC, 0, CMD_FLUSH, 0, 0, 0))
        self._take_reply()

    def _go(self, export: str) -> int:
        password, magic, _ = _GREETING.unpack(self._receive(_GREETING.size))
        if (password, magic) != (INIT_PASSWD, OPTION_MAGIC):
            raise BenchError("what listens is no NBD server")
        name = export.encode()
        self._socket.sendall(
            struct.pack(">I", FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES)
            + _OPTION.pack(OPTION_MAGIC, Option.GO, 4 + len(name) + 2)
            + struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        )  # fmt: skip
        size = None
        while True:
            magic, _, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            content = self._receive(length)
            if magic != OPTION_REPLY_MAGIC or kind & 1 << 31:
                raise BenchError(f"export {export!r}: refused, {content.decode(errors='replace')}")
            if kind == OptionReply.ACK and size is not None:
                return size
            if kind == OptionReply.INFO and content[:2] == struct.pack(">H", Info.EXPORT):
                size = int(_INFO_EXPORT.unpack(content)[1])

    def _take_reply(self) -> None:
        magic, error, _ = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != SIMPLE_REPLY_MAGIC or error:
            raise BenchError(f"a request failed with NBD error {error}")

    def _receive(self, length: int) -> bytes:
        data = self._socket.recv(length, socket.MSG_WAITALL) if length else b""
        while len(data) < length:
            more = self._socket.recv(length - len(data), socket.MSG_WAITALL)
            if not more:
                raise BenchError("the server closed the connection")
            data += more
        return data
