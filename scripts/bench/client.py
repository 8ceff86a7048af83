"""A small NBD client: what the benchmark fills volumes and times single requests with.

Blocking, one connection over a Unix socket or TCP, simple replies, or extended ones to requests
without data. With TLS it does not ask who serves, as fio does not.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from nbdserve.protocol.constants import (
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    INIT_PASSWD,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REPLY_TYPE_NONE,
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
_EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
_EXTENDED_REPLY: Final = struct.Struct(">IHHQQQ")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_IN_FLIGHT: Final = 64
_TIMEOUT: Final = 120.0

Address = Path | tuple[str, int]
"""A Unix socket, or a host and a port."""


class Client:
    """An open connection to an export of ``size`` bytes; a context manager.

    With ``extended`` headers, lengths have 64 bits, and neither ``read`` nor ``write`` works.
    """

    def __init__(
        self, where: Address, export: str, *, tls: bool = False, extended: bool = False
    ) -> None:
        self._extended = extended
        family = socket.AF_UNIX if isinstance(where, Path) else socket.AF_INET
        self._socket = socket.socket(family)
        self._wait_all = 0 if tls else socket.MSG_WAITALL
        self._socket.settimeout(_TIMEOUT)
        try:
            if isinstance(where, Path):
                self._socket.connect(str(where))
            else:
                self._socket.connect(where)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._greet()
            if tls:
                self._start_tls()
            if extended:
                self._choose_extended_headers()
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
            if self._extended:
                bye = _EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0)
            else:
                bye = _REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0)
            self._socket.sendall(bye)
            while self._socket.recv(1 << 16):
                pass
        except OSError:
            pass  # the server has gone
        finally:
            self._socket.close()

    def leave(self) -> None:
        """Close the connection without a word."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are, and wait for nothing."""
        self._socket.sendall(data)

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes."""
        self._socket.sendall(_REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, 0, offset, length))
        self._take_reply()
        return self._receive(length)

    def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        """Write ``data`` and wait for the reply; with ``fua``, until it is durable."""
        flags = CMD_FLAG_FUA if fua else 0
        self._socket.sendall(
            _REQUEST.pack(REQUEST_MAGIC, flags, CMD_WRITE, 0, offset, len(data)) + data
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
        self._carry_out(CMD_FLUSH, 0, 0)

    def trim(self, offset: int, length: int) -> None:
        """Drop a range and wait for the reply."""
        self._carry_out(CMD_TRIM, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero a range, holes allowed, and wait for the reply."""
        self._carry_out(CMD_WRITE_ZEROES, offset, length)

    def _carry_out(self, command: int, offset: int, length: int) -> None:
        if self._extended:
            header = _EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, 0, command, 0, offset, length)
        else:
            header = _REQUEST.pack(REQUEST_MAGIC, 0, command, 0, offset, length)
        self._socket.sendall(header)
        self._take_reply()

    def _greet(self) -> None:
        password, magic, _ = _GREETING.unpack(self._receive(_GREETING.size))
        if (password, magic) != (INIT_PASSWD, OPTION_MAGIC):
            raise BenchError("what listens is no NBD server")
        self._socket.sendall(struct.pack(">I", FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES))

    def _start_tls(self) -> None:
        self._socket.sendall(_OPTION.pack(OPTION_MAGIC, Option.STARTTLS, 0))
        _, _, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
        if kind != OptionReply.ACK:
            raise BenchError(f"no TLS: {self._receive(length).decode(errors='replace')}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._socket = context.wrap_socket(self._socket)

    def _choose_extended_headers(self) -> None:
        self._socket.sendall(_OPTION.pack(OPTION_MAGIC, Option.EXTENDED_HEADERS, 0))
        _, _, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
        if kind != OptionReply.ACK:
            raise BenchError(f"no extended headers: {self._receive(length)!r}")

    def _go(self, export: str) -> int:
        name = export.encode()
        self._socket.sendall(
            _OPTION.pack(OPTION_MAGIC, Option.GO, 4 + len(name) + 2)
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
        if self._extended:
            fields = _EXTENDED_REPLY.unpack(self._receive(_EXTENDED_REPLY.size))
            magic, _, kind, _, _, length = fields
            if magic != EXTENDED_REPLY_MAGIC or kind != REPLY_TYPE_NONE or length:
                raise BenchError("a request failed")
            return
        magic, error, _ = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != SIMPLE_REPLY_MAGIC or error:
            raise BenchError(f"a request failed with NBD error {error}")

    def _receive(self, length: int) -> bytes:
        data = self._socket.recv(length, self._wait_all) if length else b""
        while len(data) < length:
            more = self._socket.recv(length - len(data), self._wait_all)
            if not more:
                raise BenchError("the server closed the connection")
            data += more
        return data
