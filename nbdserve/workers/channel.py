"""The channel between the daemon and a worker: one Unix socket pair, calls and events on it.

A frame is its length (4 bytes, big endian, at most MAX_FRAME) and a msgpack array::

    [CALL, id, method, arguments]      answered by one of the next two, in any order
    [ANSWER, id, result]
    [ERROR, id, error]                 as errors.py packs it
    [EVENT, name, arguments]           not answered
    [HANDOVER, name, arguments]        an event that brings a socket (SCM_RIGHTS)

The socket of a HANDOVER travels with the first byte of its frame, so it is there when the frame is
complete, and sockets come in the order of their frames. When the receiver has no descriptor left
for it, the event comes without.

Either side may rely on frames being taken in the order in which they were sent. What is no frame
ends the channel: the other side is another program, or broken.
"""

import array
import asyncio
import errno
import socket
import struct
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, Protocol

import msgpack

from backends.errors import InvalidError
from nbdserve.workers.errors import pack_error, unpack_error

MAX_FRAME: Final = 256 << 20
"""Bytes: a list of some ten million changed extents."""

CALL, ANSWER, ERROR, EVENT, HANDOVER = range(5)

_LENGTH: Final = struct.Struct(">I")
_CHUNK: Final = 256 << 10
_DESCRIPTOR: Final = array.array("i").itemsize
_WOULD_BLOCK: Final = (BlockingIOError, InterruptedError)


class Receiver(Protocol):
    """What one end does with what comes."""

    def call(self, method: str, arguments: list[Any]) -> Coroutine[Any, Any, Any]:
        """Carry out a call; begun in the order of the calls."""

    def event(self, name: str, arguments: list[Any], sock: socket.socket | None) -> None:
        """Something happened, or a socket is handed over."""

    def closed(self, wrong: str | None) -> None:
        """Nothing more comes; calls that were not answered still wait (``fail_calls``).

        ``wrong`` is what made this side end it; None when the other side did.
        """


class Channel:
    """One end of a channel; all methods on the event loop's thread."""

    def __init__(self, sock: socket.socket, receiver: Receiver) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._receiver = receiver
        self._input = bytearray()
        self._sockets: deque[socket.socket | None] = deque()
        self._unsent: deque[tuple[memoryview, socket.socket | None]] = deque()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 0
        self._error: Exception | None = None
        self.open = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._on_readable)

    # Sending

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call the other side; raises what it raises, or what ``fail_calls`` is given."""
        if self._error is not None:
            raise self._error
        self._next += 1
        answer = self._calls[self._next] = self._loop.create_future()
        self._send([CALL, self._next, method, arguments])
        try:
            return await answer
        finally:
            answer.cancel()  # when the caller was cancelled

    def event(self, name: str, *arguments: Any) -> None:
        """Tell the other side."""
        self._send([EVENT, name, arguments])

    def hand_over(self, sock: socket.socket, name: str, *arguments: Any) -> None:
        """Give a socket away: it is closed here when it is on its way."""
        self._send([HANDOVER, name, arguments], sock)

    def fail_calls(self, error: Exception) -> None:
        """Let calls that were not answered fail, and all later ones."""
        self._error = error
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        self._calls.clear()

    def close(self) -> None:
        """Send and receive no more."""
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, sock in self._unsent:
            if sock is not None:
                sock.close()
        self._unsent.clear()
        for received in self._sockets:
            if received is not None:
                received.close()
        self._sockets.clear()

    async def sent(self) -> None:
        """Wait until everything is on its way."""
        while self._unsent:  # noqa: ASYNC110 - at the end of a worker only
            await asyncio.sleep(0.01)

    def _send(self, message: list[Any], sock: socket.socket | None = None) -> None:
        body = msgpack.packb(message)
        if len(body) > MAX_FRAME:
            raise InvalidError(f"the answer has {len(body)} bytes, {MAX_FRAME} are the most")
        if not self.open:
            if sock is not None:
                sock.close()
            return
        self._unsent.append((memoryview(_LENGTH.pack(len(body)) + body), sock))
        if len(self._unsent) == 1:
            self._on_writable()
            if self._unsent:
                self._loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        while self._unsent:
            data, sock = self._unsent[0]
            rights = []
            if sock is not None:
                descriptors = array.array("i", [sock.fileno()])
                rights.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors))
            try:
                sent = self._sock.sendmsg([data], rights)
            except _WOULD_BLOCK:
                return
            except OSError as error:
                self._unsent.clear()
                self._loop.call_soon(self._end, _why(error))
                break
            if sock is not None:
                sock.close()
            if sent < len(data):
                self._unsent[0] = (data[sent:], None)
                return
            self._unsent.popleft()
        self._loop.remove_writer(self._sock)

    # Receiving

    def _on_readable(self) -> None:
        try:
            data, rights, flags, _ = self._sock.recvmsg(
                _CHUNK, socket.CMSG_SPACE(_DESCRIPTOR), socket.MSG_CMSG_CLOEXEC
            )
        except _WOULD_BLOCK:
            return
        except OSError as error:
            self._end(_why(error))
            return
        for level, kind, content in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i", content[: len(content) // _DESCRIPTOR * _DESCRIPTOR])
                self._sockets.extend(socket.socket(fileno=found) for found in descriptors)
        if flags & socket.MSG_CTRUNC:
            self._sockets.append(None)
        if not data:
            self._end(None)
            return
        self._input += data
        try:
            self._take_frames()
        except (ValueError, TypeError, LookupError, msgpack.UnpackException) as error:
            self._end(f"what was received is no message: {error!r}")

    def _take_frames(self) -> None:
        position = 0
        view = memoryview(self._input)
        try:
            while self.open and len(view) - position >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, position)
                if length > MAX_FRAME:
                    raise ValueError(f"a message of {length} bytes")
                end = position + _LENGTH.size + length
                if end > len(view):
                    break
                message = msgpack.unpackb(view[position + _LENGTH.size : end])
                position = end
                self._take(message)
        finally:
            view.release()
        del self._input[:position]

    def _take(self, message: Any) -> None:
        if not isinstance(message, list):
            raise TypeError("not an array")
        kind, *rest = message
        if kind == CALL:
            number, method, arguments = rest
            operation = self._receiver.call(method, arguments)
            task = self._loop.create_task(self._answer(number, operation))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind in (ANSWER, ERROR):
            number, result = rest
            error = unpack_error(result) if kind == ERROR else None
            answer = self._calls.pop(number)  # what raises above leaves it to ``fail_calls``
            if not answer.done():
                if error is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(error)
        elif kind in (EVENT, HANDOVER):
            name, arguments = rest
            sock = self._sockets.popleft() if kind == HANDOVER else None
            self._receiver.event(name, arguments, sock)
        else:
            raise ValueError(f"message of kind {kind!r}")

    async def _answer(self, number: int, operation: Coroutine[Any, Any, Any]) -> None:
        try:
            self._send([ANSWER, number, await operation])
        except Exception as error:
            self._send([ERROR, number, pack_error(error)])

    def _end(self, wrong: str | None) -> None:
        if self.open:
            self.close()
            self._receiver.closed(wrong)


def _why(error: OSError) -> str | None:
    """What is wrong; nothing when the other side is just gone."""
    return (
        None if error.errno in (errno.EPIPE, errno.ECONNRESET) else f"its channel: {error.strerror}"
    )
