"""A connection that never waits for ever, whatever the server does.

Three limits hold for every wait: ``timeout`` seconds for the first byte, a second more for every
MiB that is expected, and the deadline of the check that the connection is used by. So a server
that says nothing, or one byte a second, or more and more, ends the check and not the program.

Everything sent is put into words in the check's journal: a finding tells what led to it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time

from .strings import shown
from .verdicts import Closed, Silent, Violation

_PIECE = 1 << 20
_BYTES_PER_SECOND = 1 << 20
_READ_AHEAD = 64 << 10
_MOST_AHEAD = 128 << 20
"""Bytes that are taken in while we send; a server that sends more is not waited for."""


class Connection:
    """One connection; ``journal`` takes a line for everything that is sent."""

    def __init__(
        self, sock: socket.socket, timeout: float, deadline: float, journal: list[str]
    ) -> None:
        self.timeout = timeout
        self.journal = journal
        self.cut_short = False
        """TLS: the connection ended without the close_notify that shuts TLS down."""
        self.reads_ahead = False
        """Whether more may be read than is asked for: not while TLS may begin behind it."""
        self._sock = sock
        self._deadline = deadline
        self._ahead = bytearray()
        self._end = ""

    def send(self, data: bytes, what: str, *, reading: bool = True) -> None:
        """Send bytes; ``what`` says in words what they are.

        What the server sends meanwhile is taken in, unless not ``reading``: it need not take more
        while its replies are not taken. A connection that breaks is noticed when the answer is
        read: the server may have sent something before it closed.
        """
        self.journal.append(what)
        view = memoryview(data)
        limit = self._limit(len(data))
        self._sock.settimeout(0)
        while view:
            try:
                view = view[self._sock.send(view[:_PIECE]) :]
                continue
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
            except (OSError, ValueError):
                return
            if reading:
                self._take_in()
            if not self._wait_to_send(limit, reading=reading and not self._end):
                raise Silent(
                    f"the server to read what it is sent ({what})",
                    f"{len(view)} of {len(data)} bytes not taken in {self.timeout:g} s",
                )

    def _wait_to_send(self, limit: float, *, reading: bool) -> bool:
        remaining = limit - time.monotonic()
        if remaining <= 0:
            return False
        wanted = [self._sock] if reading and len(self._ahead) < _MOST_AHEAD else []
        ready, writable, _ = select.select(wanted, [self._sock], [], remaining)
        return bool(ready or writable)

    def _take_in(self) -> None:
        """Keep what has come, without waiting for it."""
        while not self._end and len(self._ahead) < _MOST_AHEAD:
            try:
                data = self._receive_now(_PIECE)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            self._ahead += data

    def receive(self, length: int, expected: str) -> bytes:
        """Receive exactly ``length`` bytes; raises Closed or Silent."""
        parts = []
        missing = length
        limit = self._limit(length)
        while missing:
            data = self._receive_some(min(missing, _PIECE), limit, expected)
            if not data:
                got = length - missing
                raise Closed(expected, self._end + (f" after {got} bytes of it" if got else ""))
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def expect_close(self, expected: str = "the server to close the connection") -> None:
        """The next thing that comes must be the end of the connection."""
        data = self._receive_some(64, self._limit(0), expected)
        if data:
            raise Violation(expected, f"{len(data)} bytes: {data[:32].hex(' ')}")

    def drain(self, expected: str) -> bytes:
        """All that still comes until the server closes; raises Silent when it does not."""
        parts: list[bytes] = []
        limit = self._limit(64 << 20)
        while True:
            data = self._receive_some(_PIECE, limit, expected)
            if not data:
                return b"".join(parts)
            parts.append(data)

    def received_anything(self, seconds: float) -> bytes:
        """What comes within some seconds; nothing when nothing does."""
        with contextlib.suppress(Silent):
            return self._receive_some(4096, time.monotonic() + seconds, "")
        return b""

    def start_tls(self, context: ssl.SSLContext, server_name: str | None) -> None:
        """Carry out the TLS handshake; raises Closed, Silent or Violation."""
        expected = "a TLS handshake"
        self.journal.append("TLS handshake")
        if self._ahead:
            raise Violation("nothing in plain text behind NBD_REP_ACK", shown(self._ahead))
        self._sock.settimeout(_remaining(self._limit(0)))
        try:
            self._sock = context.wrap_socket(
                self._sock, server_hostname=server_name, suppress_ragged_eofs=False
            )
        except (TimeoutError, socket.timeout):
            raise Silent(expected, f"nothing in {self.timeout:g} s") from None
        except (ConnectionError, ssl.SSLEOFError) as error:
            raise Closed(expected, f"the connection ended: {error}") from None
        except (ssl.SSLError, OSError) as error:
            raise Violation(expected, str(error)) from None
        self.reads_ahead = True

    @property
    def tls_version(self) -> str:
        """TLSv1.2 and so on; empty without TLS."""
        return (self._sock.version() or "") if isinstance(self._sock, ssl.SSLSocket) else ""

    def shut_down_sending(self) -> None:
        """End the stream to the server; what it sends is still read."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    @property
    def is_open(self) -> bool:
        """Whether ``close`` has not been called."""
        return self._sock.fileno() != -1

    def close(self) -> None:
        """Close it, without any word to the server."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def _receive_some(self, length: int, limit: float, expected: str) -> bytes:
        if time.monotonic() > self._deadline:  # however much there is: it might never end
            raise Silent(expected, "no end of what came before, in all the time that a check has")
        if self._ahead:
            data = bytes(self._ahead[:length])
            del self._ahead[:length]
            return data
        if self._end:
            return b""
        try:
            self._sock.settimeout(_remaining(limit))
            data = self._receive_now(max(length, _READ_AHEAD) if self.reads_ahead else length)
        except (TimeoutError, socket.timeout, ssl.SSLWantReadError):
            raise Silent(expected, f"nothing in {self.timeout:g} s") from None
        self._ahead += data[length:]
        return data[:length]

    def _receive_now(self, length: int) -> bytes:
        """What the socket gives; nothing, and ``_end`` set, at the end of the connection."""
        try:
            data = self._sock.recv(length)
        except (BlockingIOError, TimeoutError, socket.timeout, ssl.SSLWantReadError):
            raise
        except (OSError, ValueError) as error:
            # TLS without close_notify, a reset, or garbage where TLS should be.
            self.cut_short = True
            self._end = f"the end of the connection ({getattr(error, 'strerror', '') or error})"
            return b""
        if not data:
            self._end = "the end of the connection"
        return data

    def _limit(self, length: int) -> float:
        return min(time.monotonic() + self.timeout + length / _BYTES_PER_SECOND, self._deadline)


def _remaining(limit: float) -> float:
    return max(limit - time.monotonic(), 0.001)
