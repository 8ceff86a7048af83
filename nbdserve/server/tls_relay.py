"""The relay between an encrypted connection and the rest of the server.

The rest of the server gets ``inner``, one end of a socket pair, as if it were a client's plain
socket, and may hand it to another process. The relay has the client's socket and the other end::

    client --ciphertext--> recv, decrypt --plain--> send --> inner     upstream
    client <--ciphertext-- send <-- encrypt <--plain-- recv <-- inner  downstream

TLS records are small (a request of 28 bytes has one of its own, 16 KiB are the most), so each
wake-up receives up to CHUNK bytes, takes all the records in them, and sends the result with one
call. In the middle of something long it tries to receive again first: the client encrypts about as
fast as we decrypt, and would have us pass on every record by itself. Records are read from memory,
not from the socket: that would take two system calls for each.

Back-pressure: upstream receives nothing while the pair takes no more; downstream encrypts nothing
while the client takes no more. So each way holds one chunk, besides what the kernel's buffers hold.
(A client that sends nothing but key updates is read no more once their answers exceed MAX_UNSENT.)

The end. Each way ends by itself:

- The client's close_notify or end of stream is passed on as the end of ``inner``'s stream; replies
  still go out.
- ``inner``'s end of stream, when it is closed or shut down: what it sent is delivered, then
  close_notify and the end of our stream. Nobody wants what the client still sends: it is read and
  thrown away, since closing the socket on it could destroy replies on their way. The client has
  DELIVERY_TIMEOUT seconds for each piece of what is delivered, and LINGER_TIMEOUT for its own end.
- A broken record or a lost connection ends both at once: ``inner`` sees an end of stream.

``closed`` is done when both sockets of the relay are closed.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Final, cast

from nbdserve.server.listening import UNIX_SEND_BUFFER
from nbdserve.server.polling import Polling
from nbdserve.server.session import LINGER_TIMEOUT
from nbdserve.server.tls import TlsSession, describe_error

CHUNK: Final = 256 << 10
"""Most bytes that one wake-up takes from either side."""

MAX_UNSENT: Final = 1 << 20
"""Bytes of unsent ciphertext beyond which no more is received from the client."""

DELIVERY_TIMEOUT: Final = 30.0
"""Seconds that a client may take nothing of what is left for it once the connection is over."""

_BULK: Final = 8 << 10  # received at once, after which more is on its way
_RECORD: Final = 17 << 10  # more than the longest record, of which OpenSSL may hold a part
_WOULD_BLOCK: Final = (BlockingIOError, InterruptedError)

# Used within one callback each, hence shared by all relays: there is one event loop.
_received = memoryview(bytearray(CHUNK))
_decrypted = memoryview(bytearray(2 * CHUNK + _RECORD))
_replies = memoryview(bytearray(CHUNK))

log = logging.getLogger(__name__)


class Relay:
    """Relays from its creation until ``closed``; takes over the client's socket.

    ``about`` is the ``extra`` of its lines in the log.
    """

    def __init__(
        self, sock: socket.socket, session: TlsSession, about: Mapping[str, object]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._sock = sock
        self._stream = session.stream
        # What it returns is a count when it is given a buffer.
        self._read = cast(Callable[[int, memoryview], int], session.stream.read)
        self._incoming = session.incoming
        self._outgoing = session.outgoing
        self.about = about
        self._pair, self.inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self._pair, self.inner):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER)
        # Numbers, since looking up a socket that is not registered makes a text of it first.
        self._sock_number, self._pair_number = sock.fileno(), self._pair.fileno()
        self._undelivered = memoryview(b"")  # decrypted, not yet taken by inner
        self._unsent = memoryview(b"")  # encrypted, not yet taken by the client
        self._client_ended = False
        self._inner_ended = False  # seen behind all that it sent
        self._over = False  # it is known to have ended
        self._finished = False  # our end of stream is sent
        self._timer: asyncio.TimerHandle | None = None
        self._receiving = self._writing = self._taking = self._delivering = False
        self._pass_on(self._decrypt(0))  # what came behind the TLS handshake
        self._settle()

    async def finish(self) -> None:
        """``inner`` is closed: wait until the client has what is left for it, or is given up."""
        if not self.closed.done():
            self._over = True
            self._arm(DELIVERY_TIMEOUT)
        await self.closed

    def abort(self) -> None:
        """Close both sides now."""
        self._close()

    # Upstream

    def _on_client_readable(self) -> None:
        Polling.disturb()
        filled = 0
        while filled < CHUNK // 2 and not self._client_ended:
            try:
                received = self._sock.recv_into(_received)
            except _WOULD_BLOCK:
                break
            except OSError as error:
                self._lost(error)
                return
            if not received:
                self._client_ended = True
            elif self._inner_ended:
                break
            else:
                self._incoming.write(_received[:received])
                filled = self._decrypt(filled)
                if received < _BULK:
                    break
        self._pass_on(filled)
        self._settle()

    def _pass_on(self, filled: int) -> None:
        """Let ``inner`` have what was decrypted, and see the client's end behind it."""
        if filled:
            self._deliver(_decrypted[:filled])
        if self._client_ended:
            self._end_upstream()

    def _decrypt(self, filled: int) -> int:
        """Take all whole records that were received; returns how far ``_decrypted`` is filled."""
        incoming, read, target = self._incoming, self._read, _decrypted
        try:
            while incoming.pending:
                count = read(CHUNK, target[filled:])
                if not count:
                    self._client_ended = True
                    break
                filled += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._client_ended = True
        except ssl.SSLError as error:
            self._fail(error)
            self._client_ended = True
        return filled

    def _deliver(self, data: memoryview) -> None:
        """Send decrypted bytes to ``inner``; keeps what it does not take."""
        try:
            sent = self._pair.send(data)
        except _WOULD_BLOCK:
            sent = 0
        except OSError:  # closed; that is noticed downstream
            return
        if sent < len(data):
            self._undelivered = memoryview(bytes(data[sent:]))

    def _on_pair_writable(self) -> None:
        data, self._undelivered = self._undelivered, memoryview(b"")
        self._deliver(data)
        if self._client_ended:
            self._end_upstream()
        self._settle()

    def _end_upstream(self) -> None:
        """Pass on the end of the client's stream, once what came before is delivered."""
        if not self._undelivered:
            with contextlib.suppress(OSError):
                self._pair.shutdown(socket.SHUT_WR)

    # Downstream

    def _on_pair_readable(self) -> None:
        Polling.disturb()
        try:
            received = self._pair.recv_into(_replies)
        except _WOULD_BLOCK:
            return
        except OSError:  # closed with unread requests
            received = 0
        try:
            if received:
                self._encrypt(_replies[:received])
            else:
                self._end_downstream()
        except ssl.SSLError as error:
            self._fail(error)
            return
        self._send()
        self._settle()

    def _encrypt(self, data: memoryview) -> None:
        while data:
            data = data[self._stream.write(data) :]

    def _end_downstream(self) -> None:
        """``inner`` has ended: close_notify goes behind what it sent."""
        self._inner_ended = self._over = True
        self._undelivered = memoryview(b"")
        self._arm(DELIVERY_TIMEOUT)
        with contextlib.suppress(ssl.SSLError):
            self._stream.unwrap()  # raises because it also wants the client's close_notify at once

    def _send(self) -> None:
        """Send ciphertext until the client takes no more."""
        outgoing = self._outgoing
        while self._unsent or outgoing.pending:
            data = self._unsent or memoryview(outgoing.read())
            try:
                sent = self._sock.send(data)
            except _WOULD_BLOCK:
                sent = 0
            except OSError as error:
                self._lost(error)
                return
            self._unsent = data[sent:]
            if self._over and sent:
                self._arm(DELIVERY_TIMEOUT)
            if self._unsent:
                return

    def _on_client_writable(self) -> None:
        self._send()
        self._settle()

    # Both

    def _settle(self) -> None:
        """Wait for what can come next, after anything that may have changed it."""
        if self.closed.done():
            return
        if self._outgoing.pending and not self._unsent:  # an alert, the answer to a key update
            self._send()
            if self.closed.done():
                return
        unsent = bool(self._unsent)
        if self._inner_ended and not unsent and not self._finished:
            self._finished = True
            self._arm(LINGER_TIMEOUT)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        if self._finished and self._client_ended:
            self._close()
            return
        crowded = len(self._unsent) + self._outgoing.pending > MAX_UNSENT
        loop, sock, pair = self._loop, self._sock_number, self._pair_number
        wanted = not (self._client_ended or self._undelivered or crowded)
        if wanted != self._receiving:
            self._receiving = wanted
            if wanted:
                loop.add_reader(sock, self._on_client_readable)
            else:
                loop.remove_reader(sock)
        if unsent != self._writing:
            self._writing = unsent
            if unsent:
                loop.add_writer(sock, self._on_client_writable)
            else:
                loop.remove_writer(sock)
        wanted = not (self._inner_ended or unsent)
        if wanted != self._taking:
            self._taking = wanted
            if wanted:
                loop.add_reader(pair, self._on_pair_readable)
            else:
                loop.remove_reader(pair)
        wanted = bool(self._undelivered)
        if wanted != self._delivering:
            self._delivering = wanted
            if wanted:
                loop.add_writer(pair, self._on_pair_writable)
            else:
                loop.remove_writer(pair)

    # The end

    def _arm(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._expired)

    def _expired(self) -> None:
        if not self._finished:
            log.info("the client did not take what was left for it", extra=self.about)
        self._close()

    def _fail(self, error: ssl.SSLError) -> None:
        """The session is broken: tell the client why, as far as it listens."""
        log.info("TLS failed: %s", describe_error(error), extra=self.about)
        with contextlib.suppress(OSError):
            if not self._unsent:
                self._sock.send(self._outgoing.read())
        self._close()

    def _lost(self, error: OSError) -> None:
        log.info("connection lost: %s", error.strerror or error, extra=self.about)
        self._close()

    def _close(self) -> None:
        if self.closed.done():
            return
        if self._timer is not None:
            self._timer.cancel()
        for number in (self._sock_number, self._pair_number):
            self._loop.remove_reader(number)
            self._loop.remove_writer(number)
        self._sock.close()
        self._pair.close()
        self._undelivered = self._unsent = memoryview(b"")
        self.closed.set_result(None)
