"""Replies on their way out of one connection.

Two places hold them. The **buffer** takes the replies that are made in place, one behind the other,
so that one ``send`` carries many; it is filled from ``tail`` by the transmission's loop, sent from
``head``, and starts again at 0 whenever everything is sent. The **queue** takes replies that
come in memory of their own (large reads, reads that had to wait).

Every entry of the queue, and the buffer between head and tail, is a row of whole replies. Replies
may go out in any order, but not inside each other: a piece that was sent in part is finished first.
"""

import mmap
import socket
from collections import deque
from typing import Final

BUFFER_SIZE: Final = (1 << 20) + (128 << 10)
"""Bytes of the buffer: a reply of 1 MiB and small ones beside it. Untouched pages cost nothing."""

_WOULD_BLOCK = (BlockingIOError, InterruptedError)


def allocate(size: int) -> mmap.mmap:
    """Return ``size`` bytes of memory whose pages are taken when first touched."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Output:
    """The unsent replies of one connection."""

    __slots__ = ("_partial", "_queue", "_send", "buffer", "head", "queued", "tail", "view")

    def __init__(self, sock: socket.socket) -> None:
        self.buffer = allocate(BUFFER_SIZE)
        self.view = memoryview(self.buffer)
        self.head = 0
        self.tail = 0
        self.queued = 0  # bytes in the queue
        self._queue: deque[memoryview] = deque()
        self._partial = False  # the queue's first piece was sent in part
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
            self._queue.append(memoryview(reply))
            self.queued += size

    def send(self) -> bool:
        """Send until all is sent (True) or the socket takes no more (False); raises OSError."""
        queue = self._queue
        try:
            while True:
                if not self._partial and self.head < self.tail:
                    self.head += self._send(self.view[self.head : self.tail])
                    if self.head < self.tail:
                        return False
                    self.head = self.tail = 0
                elif queue:
                    piece = queue[0]
                    sent = self._send(piece)
                    self.queued -= sent
                    self._partial = sent < len(piece)
                    if self._partial:
                        queue[0] = piece[sent:]
                        return False
                    queue.popleft()
                else:
                    return True
        except _WOULD_BLOCK:
            return False

    def discard(self) -> None:
        """Forget everything: the connection is gone."""
        self._queue.clear()
        self.queued = 0
        self.head = self.tail = 0
