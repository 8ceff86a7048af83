"""Replies on their way out of one connection.

Two places hold them. The **buffer** takes the replies that are made in place, one behind the other,
so that one ``send`` carries many; it is filled from ``tail`` by the transmission's loop, sent from
``head``, and starts again at 0 whenever everything is sent. The **queue** takes replies that
come in memory of their own (large reads, reads that had to wait).

A reply in the queue may be a **loan**: its header, and pieces of files that sendfile(2) sends
without copying them.

Every entry of the queue, and the buffer between head and tail, is a row of whole replies. Replies
may go out in any order, but not inside each other: a piece that was sent in part is finished first.
"""

import errno
import mmap
import os
import socket
from collections import deque
from typing import Final

BUFFER_SIZE: Final = (1 << 20) + (128 << 10)
"""Bytes of the buffer: a reply of 1 MiB and small ones beside it. Untouched pages cost nothing."""

_WOULD_BLOCK = (BlockingIOError, InterruptedError)


def allocate(size: int) -> mmap.mmap:
    """Return ``size`` bytes of memory whose pages are taken when first touched."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class _Loan:
    """What is left to send of a loan: ``header``, then ``pieces``, the last one first."""

    __slots__ = ("header", "pieces")

    def __init__(self, header: bytes, pieces: list[tuple[int, int, int]]) -> None:
        self.header = header
        self.pieces = pieces[::-1]


class Output:
    """The unsent replies of one connection; ``sent`` counts the bytes that the socket has taken."""

    __slots__ = (
        "_partial",
        "_queue",
        "_send",
        "_sock",
        "buffer",
        "head",
        "queued",
        "sent",
        "tail",
        "view",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.buffer = allocate(BUFFER_SIZE)
        self.view = memoryview(self.buffer)
        self.head = 0
        self.tail = 0
        self.queued = 0  # bytes in the queue
        self.sent = 0
        self._queue: deque[memoryview | _Loan] = deque()
        self._partial = False  # the queue's first piece was sent in part
        self._sock = sock
        self._send = sock.send

    @property
    def empty(self) -> bool:
        """Whether everything is sent."""
        return self.head == self.tail and not self._queue

    def append(self, reply: bytes | bytearray) -> None:
        """Add a reply: small ones go into the buffer while there is room."""
        tail = self.tail
        size = len(reply)
        if size <= 4096 and tail + size <= BUFFER_SIZE:
            self.buffer[tail : tail + size] = reply
            self.tail = tail + size
        else:
            self.enqueue(reply)

    def enqueue(self, reply: bytes | bytearray) -> None:
        """Add a reply, or a chunk of one, behind what was added with this before."""
        self._queue.append(memoryview(reply))
        self.queued += len(reply)

    @property
    def end(self) -> int:
        """What ``sent`` will be when everything is sent."""
        return self.sent + self.tail - self.head + self.queued

    def append_loan(self, header: bytes, pieces: list[tuple[int, int, int]]) -> None:
        """Add a reply of ``header`` and pieces (descriptor, position, length) of files."""
        self._queue.append(_Loan(header, pieces))
        self.queued += len(header) + sum(length for _, _, length in pieces)

    def send(self) -> bool:
        """Send until all is sent (True) or the socket takes no more (False); raises OSError."""
        queue = self._queue
        try:
            while True:
                if not self._partial and self.head < self.tail:
                    sent = self._send(self.view[self.head : self.tail])
                    self.sent += sent
                    self.head += sent
                    if self.head < self.tail:
                        return False
                    self.head = self.tail = 0
                elif queue:
                    piece = queue[0]
                    self._partial = True
                    if isinstance(piece, _Loan):
                        self._send_loan(piece)
                    else:
                        sent = self._send(piece)
                        self.sent += sent
                        self.queued -= sent
                        if sent < len(piece):
                            queue[0] = piece[sent:]
                            return False
                    self._partial = False
                    queue.popleft()
                else:
                    return True
        except _WOULD_BLOCK:
            return False

    def _send_loan(self, loan: _Loan) -> None:
        """Send what is left of a loan, or raise BlockingIOError on the way."""
        while loan.header:
            sent = self._send(loan.header)
            self.sent += sent
            self.queued -= sent
            loan.header = loan.header[sent:]
        pieces = loan.pieces
        while pieces:
            descriptor, position, length = pieces[-1]
            sent = os.sendfile(self._sock.fileno(), descriptor, position, length)
            if not sent:
                # The reply cannot be taken back: the connection is lost.
                raise OSError(errno.EIO, "a layer's file has become shorter")
            self.sent += sent
            self.queued -= sent
            if sent < length:
                pieces[-1] = (descriptor, position + sent, length - sent)
            else:
                pieces.pop()

    def discard(self) -> None:
        """Forget everything: the connection is gone."""
        self._queue.clear()
        self._partial = False
        self.queued = 0
        self.head = self.tail = 0
