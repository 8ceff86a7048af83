"""The transmission phase of one connection: the path that every request takes.

One ``recv_into`` takes as many requests as the client has sent; a loop goes through them::

    input   |..done..|REQUEST|REQUEST payload|REQU      one receive buffer, parsed in place
                     start                       end
    output  |..sent..|reply|reply data|reply|           one send carries many replies
                     head                   tail

- What can be done at once is done in the loop: ``try_read`` puts data directly behind its reply
  header in the output buffer, ``try_write`` takes a view of the receive buffer. No copy, no task.
- What ``try_*`` refuses, and whatever may take long, becomes a task with memory of its own; its
  reply is sent when it is ready, so replies overtake each other and nothing waits for a slow disk.
- But a short READ that was refused is tried once more in the next turn of the loop: the first try
  made the kernel begin to read, and a task costs more than a quick disk takes.
- A READ beyond MAX_IN_PLACE that may come in chunks is read piece by piece, each when the client
  has taken most of what came before; so it takes the memory of a piece.
- With extended headers it is the same, requests and replies are just longer.
- A long WRITE is **streamed**: what has come of it is written in pieces of PIECE bytes while the
  rest is on its way, still in the processor's cache. What ``try_write`` refuses of it is received
  into memory of its own, for a task. A refused WRITE's payload is read past, and only then is the
  refusal sent: clients do not expect a reply to what they have not yet sent.

Bounds. At most MAX_REQUESTS tasks and about MAX_BYTES of their memory and of unsent replies, beside
the two buffers. A connection at a bound is **stalled**: it keeps what it has received, reads no
more, and goes on when a task ends or the client takes its replies. Memory that is over the bound
alone (a request of the largest payload) is granted when nothing else is in flight. A client
that has sent very many requests is stalled for one turn of the loop, for others to have theirs.

Limits. Where the export has any (see throttle.py), only requests that were admitted are gone
through; with others behind them, the connection is stalled. ``finish`` ends that: what was received
is answered.

End. DISC, the client's end of stream and ``finish`` let everything that was received be answered;
a wrong magic, an error of the socket and ``abort`` drop the connection at once. Tasks are never
cancelled, for a thread may be writing on their behalf: ``closed`` is done when the last one is.
"""

import asyncio
import fcntl
import logging
import socket
import termios
from bisect import bisect_left
from collections import deque
from collections.abc import Coroutine, Sequence
from struct import Struct
from time import perf_counter
from typing import Any, Final

from nbdserve.logs import about
from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FUA,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_READ,
    CMD_WRITE,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REPLY_FLAG_DONE,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ReplyStyle,
)
from nbdserve.protocol.replies import (
    DATA_HEADER,
    EXTENDED_CHUNK,
    SIMPLE_REPLY,
    data_header,
    empty_read_reply,
)
from nbdserve.protocol.requests import (
    EXTENDED_REQUEST,
    REQUEST,
    Request,
    payload_length,
)
from nbdserve.server.exports import Export
from nbdserve.server.meter import BOUNDS, WITHOUT_BYTES, CommandNumbers, Meter, describe
from nbdserve.server.operations import (
    MIN_SPARSE_READ,
    STATUS_SIZE,
    Operations,
    reply_size,
)
from nbdserve.server.output import BUFFER_SIZE, Output, allocate
from nbdserve.server.polling import LONGEST, TURN, Polling
from nbdserve.server.throttle import Throttle
from snapshots.lending import MIN_LOAN

INPUT_SIZE: Final = (1 << 20) + (64 << 10)
"""Bytes of the receive buffer: a WRITE of 1 MiB and what follows it."""

PIECE: Final = 128 << 10
"""Bytes that a longer WRITE is cut into, at multiples of it, unless all of it has come at once."""

MAX_IN_PLACE: Final = 1 << 20
"""Longest READ, in bytes, that is tried in place."""

MAX_REQUESTS: Final = 256
"""Most tasks of one connection."""

MAX_LONG_READS: Final = 4
"""Most READs of one connection that are read piece by piece at the same time."""

MAX_UNMEASURED: Final = 1024
"""Most answers of one connection whose way to the kernel is followed."""

MAX_BYTES: Final = 8 << 20
"""Most bytes of payloads, of replies being made and of unsent replies outside the buffers."""

# What plain requests and their replies begin with, as one number instead of three.
_PLAIN_UNPACK: Final = Struct(">QQQI").unpack_from  # magic, flags, command; cookie; offset; length
_PLAIN_READ: Final = REQUEST_MAGIC << 32 | CMD_READ
_PLAIN_WRITE: Final = REQUEST_MAGIC << 32 | CMD_WRITE
_PLAIN_REPLY: Final = Struct(">QQ")  # magic, error; cookie
_PLAIN_SUCCESS: Final = SIMPLE_REPLY_MAGIC << 32
_PLAIN_DATA: Final = Struct(">QQIQ")  # magic, flags, type; cookie; length; offset
_PLAIN_CHUNK: Final = STRUCTURED_REPLY_MAGIC << 32 | REPLY_FLAG_DONE << 16 | REPLY_TYPE_OFFSET_DATA
# The same with extended headers.
_EXTENDED_UNPACK: Final = Struct(">QQQQ").unpack_from
_EXTENDED_READ: Final = EXTENDED_REQUEST_MAGIC << 32 | CMD_READ
_EXTENDED_WRITE: Final = EXTENDED_REQUEST_MAGIC << 32 | CMD_FLAG_PAYLOAD_LEN << 16 | CMD_WRITE
_UNFLAGGED_WRITE: Final = EXTENDED_REQUEST_MAGIC << 32 | CMD_WRITE  # qemu's (see requests.py)
_EXTENDED_REPLY: Final = Struct(">QQQQ")  # magic, flags, type; cookie; offset; length
_EXTENDED_DONE: Final = EXTENDED_REPLY_MAGIC << 32 | REPLY_FLAG_DONE << 16
_EXTENDED_SUCCESS: Final = _EXTENDED_DONE | REPLY_TYPE_NONE
_EXTENDED_DATA: Final = Struct(">QQQQQ")  # the same; offset
_EXTENDED_CONTENT: Final = _EXTENDED_DONE | REPLY_TYPE_OFFSET_DATA

_INT: Final = Struct("i")
_SIMPLE_SIZE: Final = SIMPLE_REPLY.size
_EXTENDED_SIZE: Final = EXTENDED_CHUNK.size
_MAX_BATCH: Final = 1024  # requests of one turn of the event loop
_FLUSH_AT: Final = 128 << 10  # replies that are worth a send of their own
_FULL: Final = 1 << 20  # of the output buffer: beyond, room only for what is under way
_MIN_ROOM: Final = 256 << 10  # of the receive buffer: below, what is left moves to its front
_SHORT: Final = 64 << 10  # READs that are tried again
_WOULD_BLOCK: Final = (BlockingIOError, InterruptedError)

log = logging.getLogger(__name__)


class Transmission:
    """Serves the requests of one connection from ``start`` until ``closed`` is done.

    ``closed``'s result tells whether the client may still be sending: then the socket should be
    read until its end before it is closed, lest the replies are lost.
    """

    def __init__(
        self,
        sock: socket.socket,
        export: Export,
        *,
        style: ReplyStyle,
        contexts: Sequence[tuple[int, str]],
        peer: str,
        relayed: bool = False,
        connection: int | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[bool] = self._loop.create_future()
        self._sock = sock
        self._descriptor = sock.fileno()  # the loop looks up a socket by asking for its addresses
        self._export = export
        self._style = style
        self._layout, self._magic = (
            (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC)
            if style is ReplyStyle.EXTENDED
            else (REQUEST, REQUEST_MAGIC)
        )
        # Elsewhere nobody can tell when the client has received what refers to the page cache.
        self._loan_from = MAX_PAYLOAD + 1
        if sock.family == socket.AF_UNIX:
            self._loan_from = MIN_LOAN
            export.borrowers.add(self)
        self._contexts = len(contexts)
        self._about = about(connection=connection, client=peer, export=export.name)
        self._meter = meter = Meter() if meter is None else meter
        meter.connections.add(self)
        self._slow = meter.slow
        self._slow_from = float("inf") if meter.slow is None else meter.slow.seconds
        self._told: set[asyncio.Task[None]] = set()  # that their requests are slow
        self._reads, self._writes = meter.command(CMD_READ), meter.command(CMD_WRITE)
        self._operations = Operations(
            export, style=style, contexts=contexts, about=self._about, meter=meter
        )
        self._output = Output(sock)
        self._note = export.note
        self._polling = Polling()
        self._relayed = relayed
        self._input = allocate(INPUT_SIZE)
        self._view = memoryview(self._input)
        self._start = 0
        self._end = 0
        # A WRITE that is being streamed, and how much of it is written.
        self._stream: Request | None = None
        self._streamed = 0
        # What is left of a WRITE, on its way into memory of its own: the request, the memory, and
        # the part of it that is missing.
        self._large: tuple[Request, bytearray] | None = None
        self._missing = self._view[:0]
        # A refused WRITE: how much of its payload is still to come, and what is then answered.
        self._skip = 0
        self._skip_reply = b""
        self._skip_counts = (CMD_WRITE, 0)  # its command, and its bytes that count
        # READs: cookie, offset, length, when they came.
        self._missed: list[tuple[int, int, int, float]] = []
        # What tasks have not answered yet, and when they began with it.
        self._tasks: dict[asyncio.Task[None], tuple[Request, float]] = {}
        # Answers on their way: where they end in the stream of replies, what counts them, their
        # number and bytes, and when the requests came.
        self._unmeasured: deque[tuple[int, CommandNumbers, int, int, float]] = deque()
        self._admitted = 0  # bytes from ``start`` on, of requests that the limits let through
        self._received_at = 0.0  # the last time that something was received
        self._sent_at = 0.0  # the last time that answers were seen to be on their way
        self._long_reads = 0
        self._room: asyncio.Future[None] | None = None  # what long READs wait for
        self._running = 0  # tasks, and what was missed
        self._bytes = 0  # memory of tasks and of the large WRITE
        self._stalled = False
        self._ending = False  # no more is received
        self._linger = False
        self._gone = False  # the socket is not to be touched any more
        self._reading = False
        self._writing = False
        self._wake_planned = False

    def start(self, received: bytes) -> None:
        """Begin; ``received`` is what came behind the handshake."""
        self._view[: len(received)] = received
        self._end = len(received)
        self._received_at = perf_counter()
        self._process()

    def finish(self) -> None:
        """Receive no more; answer what was received, then end."""
        if not self._ending and not self._gone:
            self._ending = self._linger = True
            if self._stalled:
                self._plan_wake()  # what the limits held up
            self._settle()

    def abort(self) -> None:
        """Drop the connection now; what runs is finished, but not answered."""
        if self._gone:
            return
        self._gone = True
        self._stop_reading()
        self._stop_writing()
        self._sock.close()
        self._leave_throttle()
        self._measure(self._output.end)
        self._output.discard()
        self._large = self._stream = None
        self._wake_long_reads()
        self._check_closed()

    @property
    def in_flight(self) -> int:
        """Requests that were received and are not answered, or whose replies are not sent."""
        incoming = self._stream is not None or self._large is not None
        return self._running + incoming + sum(entry[2] for entry in self._unmeasured)

    def mark(self) -> int:
        """Where the stream of replies ends now, in bytes."""
        return self._output.end

    def has_passed(self, mark: int) -> bool:
        """Whether the client has received its replies up to ``mark``."""
        if self._gone:
            return True
        (unread,) = _INT.unpack(fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(_INT.size)))
        # The kernel counts at least the bytes that are in the queue, and the last ones are there.
        return bool(self._output.sent - mark >= unread)

    # Receiving

    def _on_readable(self) -> None:
        alone = self._polling.woken()
        # A relay of ours needs the processor that waiting for it would take.
        if self._receive() and not self._relayed:
            if alone and self._is_amid():
                self._receive_rest()
            if self._answered() and self._polling.replied(self._sent_at):
                self._poll()

    def _receive(self) -> bool:
        """Receive once, and do what can be done with it; False when there was nothing."""
        missing = self._missing
        try:
            received = self._sock.recv_into(missing or self._view[self._end :])
        except _WOULD_BLOCK:
            return False
        except OSError as error:
            self._lost(error)
            return True
        if not received:
            self._ending = True
            self._settle()
            return True
        self._received_at = perf_counter()
        if missing:
            self._missing = missing[received:]
            if not self._missing:
                self._launch_large()
                self._settle()
        else:
            self._end += received
            self._process()
        return True

    def _answered(self) -> bool:
        """Whether all that was received is answered and sent, and more may come."""
        return (
            self._reading
            and not (self._running or self._stalled or self._is_amid())
            and self._output.empty
        )

    def _is_amid(self) -> bool:
        """Whether more of a request must come."""
        return bool(
            self._missing or self._skip or self._stream is not None or self._start != self._end
        )

    def _receive_rest(self) -> None:
        """Wait a little for the rest of a request: it is being sent right now."""
        now = perf_counter()
        turn_ends = now + TURN
        give_up = now + LONGEST
        while self._reading and not self._stalled and self._is_amid():
            received = self._receive()
            now = perf_counter()
            if received:
                give_up = now + LONGEST
            if now > turn_ends or now > give_up:
                return

    def _poll(self) -> None:
        """Wait a little for the next request without the event loop (see polling.py)."""
        now = perf_counter()
        turn_ends = now + TURN
        give_up = now + LONGEST
        while now < turn_ends:
            if self._receive():
                if not self._answered():
                    return
                self._polling.hit()
                now = self._sent_at
                self._polling.replied(now)
                give_up = now + LONGEST
            else:
                now = perf_counter()
                if now > give_up:
                    self._polling.missed()
                    return

    def _process(self) -> None:
        """Go through the requests in the receive buffer, then send."""
        if self._skip:
            self._skip_payload()
        self._stalled = False
        if self._stream is not None and not self._write_stream():
            self._make_room()
            self._settle()
            return
        output = self._output
        export = self._export
        source, source_view = self._input, self._view
        target, target_view = output.buffer, output.view
        try_read, try_write, is_data = export.try_read, export.try_write, export.is_data
        layout = self._layout
        request_size = layout.size
        extended = layout is EXTENDED_REQUEST
        structured = self._style is ReplyStyle.STRUCTURED
        if extended:
            unpack, plain_read = _EXTENDED_UNPACK, _EXTENDED_READ
            plain_writes: tuple[int, ...] = (_EXTENDED_WRITE, _UNFLAGGED_WRITE)
        else:
            unpack, plain_read = _PLAIN_UNPACK, _PLAIN_READ
            plain_writes = (_PLAIN_WRITE,)
        pack_simple, pack_data = _PLAIN_REPLY.pack_into, _PLAIN_DATA.pack_into
        pack_extended, pack_extended_data = _EXTENDED_REPLY.pack_into, _EXTENDED_DATA.pack_into
        header = DATA_HEADER[self._style]
        sparse = MIN_SPARSE_READ if structured or extended else MAX_IN_PLACE + 1
        loan_from = self._loan_from
        size = export.size
        writable = -1 if export.read_only else size
        flush_at = _FLUSH_AT
        start, end, tail = self._start, self._end, output.tail
        throttle = self._meter.throttle
        if throttle is not None:
            end = self._admit_more(throttle)
        reads = read_bytes = writes = written_bytes = 0  # answered here
        for _ in range(_MAX_BATCH):
            if end - start < request_size:
                break
            kind, cookie, offset, length = unpack(source, start)
            # The two branches here are the plain cases of what validate_request lets through.
            if kind == plain_read and offset + length <= size and (0 < length <= MAX_IN_PLACE):
                if length >= loan_from and self._lend(cookie, offset, length, tail):
                    tail = output.tail
                    start += request_size
                    reads += 1
                    read_bytes += length
                    continue
                if length < sparse or is_data(offset, length):
                    stop = tail + header + length
                    if stop > flush_at:
                        output.tail = tail
                        flush_at = _FLUSH_AT if self._send() else BUFFER_SIZE
                        tail = output.tail
                        stop = tail + header + length
                        if stop > BUFFER_SIZE:
                            self._stalled = True
                            break
                    try:
                        done = try_read(offset, target_view[tail + header : stop])
                    except Exception as error:
                        output.tail = tail
                        output.append(self._operations.failed(CMD_READ, cookie, offset, error))
                        tail = output.tail
                        start += request_size
                        reads += 1
                        read_bytes += length
                        continue
                    if done:
                        if structured:
                            pack_data(target, tail, _PLAIN_CHUNK, cookie, 8 + length, offset)
                        elif extended:
                            pack_extended_data(
                                target, tail, _EXTENDED_CONTENT, cookie, offset, 8 + length, offset
                            )
                        else:
                            pack_simple(target, tail, _PLAIN_SUCCESS, cookie)
                        tail = stop
                        reads += 1
                        read_bytes += length
                    elif not self._read_later(cookie, offset, length):
                        break
                    start += request_size
                    continue
            elif kind in plain_writes and offset + length <= writable and length:
                payload = start + request_size
                stop = payload + length
                if stop <= end and tail <= _FULL:
                    try:
                        done = try_write(offset, source_view[payload:stop])
                    except Exception as error:
                        output.tail = tail
                        output.append(self._operations.failed(CMD_WRITE, cookie, offset, error))
                        tail = output.tail
                        start = stop
                        writes += 1
                        written_bytes += length
                        continue
                    if done:
                        if extended:
                            pack_extended(target, tail, _EXTENDED_SUCCESS, cookie, offset, 0)
                            tail += _EXTENDED_SIZE
                        else:
                            pack_simple(target, tail, _PLAIN_SUCCESS, cookie)
                            tail += _SIMPLE_SIZE
                        writes += 1
                        written_bytes += length
                    elif not self._defer(
                        Request(0, CMD_WRITE, cookie, offset, length),
                        length,
                        source_view[payload:stop],
                    ):
                        break
                    start = stop
                    continue
            output.tail = tail
            request = layout.unpack_from(source, start)
            if request[0] != self._magic:
                self._drop(f"bad request magic {request[0]:#010x}")
                tail = output.tail
                break
            taken = self._take(Request(*request[1:]), start, end)
            tail = output.tail
            if not taken:
                break
            start += taken
            if self._stream is not None:  # what follows is its payload
                break
            if self._ending and request[2] == CMD_DISC:
                start = self._end
        else:  # other connections have their turn
            self._stalled = True
            self._plan_wake()
        output.tail = tail
        if throttle is not None:
            incoming = self._stream is not None or self._skip or self._large is not None
            self._admitted = 0 if incoming else max(0, self._admitted - start + self._start)
        self._start = start
        self._make_room()
        self._settle()
        if reads or writes:
            self._sent_at = now = perf_counter()
            if output.head == output.tail and not output.queued:
                seconds = now - self._received_at
                place = bisect_left(BOUNDS, seconds)
                if seconds >= self._slow_from and throttle is None:
                    what = f"{reads} READ and {writes} WRITE, received together,"
                    self._tell_slow(what, seconds, ended=True)
                if reads:
                    numbers = self._reads
                    numbers.buckets[place] += reads
                    numbers.bytes += read_bytes
                    numbers.seconds += reads * seconds
                if writes:
                    numbers = self._writes
                    numbers.buckets[place] += writes
                    numbers.bytes += written_bytes
                    numbers.seconds += writes * seconds
            else:
                self._expect(self._reads, reads, read_bytes, self._received_at)
                self._expect(self._writes, writes, written_bytes, self._received_at)

    def _lend(self, cookie: int, offset: int, length: int, tail: int) -> bool:
        """Answer a READ from the page cache without a copy; False when that cannot be done."""
        output = self._output
        if output.queued >= MAX_BYTES:
            return False
        pieces = self._export.try_lend(offset, length)
        if pieces is None:
            return False
        output.tail = tail
        output.append_loan(data_header(self._style, cookie, offset, length), pieces)
        self._send()
        return True

    def _make_room(self) -> None:
        """Let the receive buffer have room for what is to come, moving as little as possible."""
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = 0
        elif start and INPUT_SIZE - end < _MIN_ROOM:
            self._view[: end - start] = self._view[start:end]
            self._start, self._end = 0, end - start

    def _skip_payload(self) -> None:
        skipped = min(self._skip, self._end - self._start)
        self._start += skipped
        self._skip -= skipped
        if not self._skip:
            self._output.append(self._skip_reply)
            self._count(*self._skip_counts)

    # Limits (see throttle.py)

    def next_request(self) -> int | None:
        """Bytes that the first request moves which is not admitted; None: it has not come."""
        place = self._start + self._admitted
        if self._gone or self._end - place < self._layout.size:
            return None
        request = self._layout.unpack_from(self._input, place)
        return min(request[5], MAX_PAYLOAD) if request[2] in (CMD_READ, CMD_WRITE) else 0

    def admit(self) -> None:
        """That request may be carried out."""
        place = self._start + self._admitted
        request = Request(*self._layout.unpack_from(self._input, place)[1:])
        self._admitted += self._layout.size + payload_length(request, self._style)

    def resume(self) -> None:
        """Go on with what was admitted."""
        if self._stalled and not self._gone:
            self._process()

    def look_for_slow(self) -> None:
        """Tell of requests that are slow already."""
        assert self._slow is not None
        now = perf_counter()
        for task, (request, begun) in self._tasks.items():
            if now - begun >= self._slow.seconds and task not in self._told and not task.done():
                self._told.add(task)
                task.add_done_callback(self._told.discard)
                self._tell_slow(describe(request), now - begun, ended=False)

    def _tell_slow(self, what: str, seconds: float, *, ended: bool) -> None:
        assert self._slow is not None
        self._slow.report(self._export.name, self._about, what, seconds, ended=ended)

    def limits_changed(self) -> None:
        """There are other limits, or none any more."""
        self._admitted = 0
        if self._stalled:
            self._plan_wake()

    def _admit_more(self, throttle: Throttle) -> int:
        """Where the requests end that may be gone through; with more behind, this is stalled."""
        if self._linger:
            self._admitted = 0
            return self._end
        if self.next_request() is not None:
            throttle.enter(self)
            self._stalled = self.next_request() is not None
        return min(self._end, self._start + self._admitted)

    def _leave_throttle(self) -> None:
        if self._meter.throttle is not None:
            self._meter.throttle.leave(self)

    # Requests that are not the plain case

    def _take(self, request: Request, start: int, end: int) -> int:
        """Take one request at ``start``; returns the bytes used up, 0 when it cannot be done yet.

        Then either more must be received, or the connection is stalled.
        """
        output, operations = self._output, self._operations
        if (output.tail > _FULL or output.queued >= MAX_BYTES) and not self._send():
            self._stalled = True
            return 0
        size = self._layout.size
        if request.command == CMD_DISC:
            self._ending = True
            return size
        payload = payload_length(request, self._style)
        if payload > MAX_PAYLOAD and self._style is ReplyStyle.EXTENDED:
            self._drop(f"a payload of {payload} bytes is announced")
            return 0
        refusal = operations.validate(request)
        if refusal is not None:
            reply = operations.refused(request, refusal)
            buffered = min(payload, end - start - size)
            if buffered < payload:
                self._skip = payload - buffered
                self._skip_reply = reply
                self._skip_counts = (request.command, 0)
            else:
                output.append(reply)
                self._count(request.command, 0)
            return size + buffered
        if request.command == CMD_WRITE:
            return self._take_write(request, start, end)
        if request.command == CMD_BLOCK_STATUS:
            if end - start < size + payload:
                return 0
            memory = self._contexts * STATUS_SIZE
            if not self._may_start(memory):
                return 0
            named = bytes(self._view[start + size : start + size + payload])
            self._launch(request, operations.block_status(request, named), memory)
            return size + payload
        taken = self._take_read(request) if request.command == CMD_READ else self._defer(request, 0)
        return size if taken else 0

    def _take_read(self, request: Request) -> bool:
        """READ with flags, of a length that may hold holes, or too long to be done in place."""
        output, operations = self._output, self._operations
        offset, length, cookie = request.offset, request.length, request.cookie
        if not length:
            output.append(empty_read_reply(self._style, cookie, offset))
            self._count(CMD_READ, 0)
            return True
        if length >= self._loan_from and self._lend(cookie, offset, length, output.tail):
            self._count(CMD_READ, length)
            return True
        if length > MAX_IN_PLACE:
            simple = self._style is ReplyStyle.SIMPLE
            whole = simple or request.flags & CMD_FLAG_DF
            return self._defer(request, length) if whole else self._read_in_pieces(request)
        try:
            chunks = operations.cut_read(request, length)
            size = reply_size(chunks)
            if output.tail and output.tail + size > _FLUSH_AT:
                self._send()
                if output.tail + size > BUFFER_SIZE:
                    self._stalled = True
                    return False
            place = output.tail
            for header, begin, run in chunks:
                data = place + len(header)
                output.view[place:data] = header
                place = data + run
                if run and not self._export.try_read(begin, output.view[data:place]):
                    return self._defer(request, length)
        except Exception as error:
            output.append(operations.failed(CMD_READ, cookie, offset, error))
        else:
            output.tail = place
        self._count(CMD_READ, length)
        return True

    def _take_write(self, request: Request, start: int, end: int) -> int:
        """WRITE with FUA, of no bytes, or whose payload is not all there."""
        length = request.length
        size = self._layout.size
        total = size + length
        payload = self._view[start + size : min(start + total, end)]
        if not length:
            self._output.append(self._operations.succeeded(request))
            self._count(CMD_WRITE, 0)
            return total
        if end - start < total:
            if length <= PIECE:
                return 0
            # Its flush will be a task, however little memory that takes.
            if request.flags & CMD_FLAG_FUA and not self._may_start(0):
                return 0
            self._stream, self._streamed = request, 0
            self._start = start + size
            self._write_stream()
            return self._start - start
        if not self._may_start(length):
            return 0
        try:
            done = self._export.try_write(request.offset, payload)
        except Exception as error:
            self._output.append(
                self._operations.failed(CMD_WRITE, request.cookie, request.offset, error)
            )
            self._count(CMD_WRITE, length)
            return total
        if done:
            self._written(request)
        else:
            self._launch(request, self._operations.perform(request, bytes(payload)), length)
        return total

    def _written(self, request: Request) -> None:
        """Answer a WRITE that is done, but for the flush that FUA asks for."""
        if request.flags & CMD_FLAG_FUA:
            self._launch(request, self._operations.flush(request), 0)
        else:
            self._output.append(self._operations.succeeded(request))
            self._count(CMD_WRITE, request.length)

    def _write_stream(self) -> bool:
        """Write what has come of a streamed WRITE; whether what follows it can be looked at."""
        request = self._stream
        assert request is not None
        offset = request.offset + self._streamed
        left = request.length - self._streamed
        while left:
            piece = min(left, PIECE - offset % PIECE)
            if self._end - self._start < piece:
                return False
            try:
                done = self._export.try_write(offset, self._view[self._start : self._start + piece])
            except Exception as error:
                self._stream = None
                self._skip = left
                self._skip_reply = self._operations.failed(
                    CMD_WRITE, request.cookie, request.offset, error
                )
                self._skip_counts = (CMD_WRITE, request.length)
                self._skip_payload()
                return not self._skip
            if not done:
                return self._receive_large(request, left)
            self._start += piece
            self._streamed += piece
            offset += piece
            left -= piece
        self._stream = None
        self._written(request)
        return True

    def _receive_large(self, request: Request, left: int) -> bool:
        """Have a task write what is left of a stream; False while its payload is not all there."""
        if not self._may_start(left):
            return False
        self._stream = None
        memory = bytearray(left)
        payload = self._view[self._start : min(self._start + left, self._end)]
        memory[: len(payload)] = payload
        self._start += len(payload)
        self._large = (request, memory)
        self._missing = memoryview(memory)[len(payload) :]
        self._bytes += left
        if self._missing:
            return False
        self._launch_large()
        return True

    # Short reads that were not in the page cache

    def _read_later(self, cookie: int, offset: int, length: int) -> bool:
        """Have a READ tried again, or done by a task; unless that stalls."""
        if length > _SHORT:
            return self._defer(Request(0, CMD_READ, cookie, offset, length), length)
        if not self._may_start(length):
            return False
        if not self._missed:
            self._loop.call_soon(self._read_again)
        self._missed.append((cookie, offset, length, self._received_at))
        self._bytes += length  # should it become a task
        self._running += 1
        return True

    def _read_again(self) -> None:
        missed, self._missed = self._missed, []
        self._running -= len(missed)
        output = self._output
        size = DATA_HEADER[self._style]
        self._bytes -= sum(length for _, _, length, _ in missed)
        for cookie, offset, length, received_at in () if self._gone else missed:
            place = output.tail + size
            stop = place + length
            try:
                done = stop <= BUFFER_SIZE and self._export.try_read(
                    offset, output.view[place:stop]
                )
            except Exception as error:
                output.append(self._operations.failed(CMD_READ, cookie, offset, error))
                self._count(CMD_READ, length, received_at)
                continue
            if not done:
                request = Request(0, CMD_READ, cookie, offset, length)
                self._launch(request, self._operations.perform(request), length, received_at)
                continue
            header = data_header(self._style, cookie, offset, length)
            output.view[place - size : place] = header
            output.tail = stop
            self._count(CMD_READ, length, received_at)
        self._wake()

    # Long reads

    def _read_in_pieces(self, request: Request) -> bool:
        """Let a task send a READ chunk by chunk, unless that stalls."""
        if self._long_reads >= MAX_LONG_READS:
            self._stalled = True
            return False
        if not self._may_start(MAX_IN_PLACE):
            return False
        self._long_reads += 1
        self._launch(request, self._send_pieces(request), MAX_IN_PLACE)
        return True

    async def _send_pieces(self, request: Request) -> bytes:
        try:
            for header, offset, length in self._operations.cut_read(request, MAX_IN_PLACE):
                reply = bytearray(len(header) + length)
                reply[: len(header)] = header
                if length:
                    await self._export.read(offset, memoryview(reply)[len(header) :])
                while self._output.queued > MAX_IN_PLACE and not self._gone:
                    if self._room is None:
                        self._room = self._loop.create_future()
                    await self._room
                if self._gone:
                    break
                self._output.enqueue(reply)
                self._plan_wake()
        except Exception as error:
            if not self._gone:
                self._output.enqueue(
                    self._operations.failed(CMD_READ, request.cookie, request.offset, error)
                )
        finally:
            self._long_reads -= 1
        return b""

    def _wake_long_reads(self) -> None:
        """Let long READs go on, when there is room for their next piece, or no use in it."""
        if self._room is not None and (self._gone or self._output.queued <= MAX_IN_PLACE):
            self._room.set_result(None)
            self._room = None

    # Tasks

    def _may_start(self, size: int) -> bool:
        """Whether a task with ``size`` bytes of memory may start; otherwise stalls."""
        taken = self._bytes + self._output.queued
        if self._running < MAX_REQUESTS and (not taken or taken + size <= MAX_BYTES):
            return True
        self._stalled = True
        return False

    def _defer(self, request: Request, size: int, payload: memoryview | None = None) -> bool:
        """Let a task carry out the request, unless that stalls."""
        if not self._may_start(size):
            return False
        data = None if payload is None else bytes(payload)
        self._launch(request, self._operations.perform(request, data), size)
        return True

    def _launch_large(self) -> None:
        assert self._large is not None
        request, memory = self._large
        self._large = None
        self._bytes -= len(memory)
        self._launch(request, self._operations.perform(request, memory), len(memory))

    def _launch(
        self,
        request: Request,
        operation: Coroutine[Any, Any, bytes | bytearray],
        size: int,
        received_at: float | None = None,
    ) -> None:
        if received_at is None:
            received_at = self._received_at
        self._bytes += size
        self._running += 1
        begun = perf_counter()
        task = self._loop.create_task(self._answer(request, operation, size, received_at, begun))
        self._tasks[task] = request, begun
        task.add_done_callback(self._tasks.__delitem__)

    async def _answer(
        self,
        request: Request,
        operation: Coroutine[Any, Any, bytes | bytearray],
        size: int,
        received_at: float,
        begun: float,
    ) -> None:
        try:
            reply = await operation
            seconds = perf_counter() - begun
            if seconds >= self._slow_from:
                self._tell_slow(describe(request), seconds, ended=True)
            if not self._gone:
                self._output.append(reply)
            self._count(request.command, request.length, received_at)
        finally:
            self._bytes -= size
            self._running -= 1
            self._plan_wake()

    def _plan_wake(self) -> None:
        if not self._wake_planned:  # once for all that happens in this turn of the loop
            self._wake_planned = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._wake_planned = False
        if self._gone:
            self._check_closed()
        elif self._stalled:
            self._process()
        else:
            self._settle()

    # Measuring (see meter.py)

    def _count(self, command: int, length: int, received_at: float | None = None) -> None:
        """Count a request whose reply was just made; by itself it came with what came last."""
        size = 0 if command in WITHOUT_BYTES else length
        numbers = self._meter.command(command)
        self._expect(numbers, 1, size, self._received_at if received_at is None else received_at)

    def _expect(self, numbers: CommandNumbers, count: int, size: int, received_at: float) -> None:
        """Count requests when all that is now to be sent is sent."""
        if self._gone or len(self._unmeasured) >= MAX_UNMEASURED:
            numbers.add(count, size, perf_counter() - received_at)
        elif count:
            self._unmeasured.append((self._output.end, numbers, count, size, received_at))

    def _measure(self, sent: int) -> None:
        """Count what is answered in the first ``sent`` bytes of all replies."""
        now = self._sent_at = perf_counter()
        unmeasured = self._unmeasured
        while unmeasured and unmeasured[0][0] <= sent:
            _, numbers, count, size, received_at = unmeasured.popleft()
            numbers.add(count, size, now - received_at)

    # Sending

    def _send(self) -> bool:
        """Send; False when the client is to take something first, or when it is gone."""
        self._note()
        try:
            sent = self._output.send()
        except OSError as error:
            self._loop.call_soon(self._lost, error)
            return False
        if self._unmeasured:
            self._measure(self._output.sent)
        if self._room is not None:
            self._wake_long_reads()
        return sent

    def _on_writable(self) -> None:
        if self._send():
            if self._stalled:
                self._process()
            else:
                self._settle()

    def _settle(self) -> None:
        """Send what there is, then wait for what can come next: input, room for output, the end."""
        if self._gone:
            return
        pending = not self._output.empty
        if self._send():
            self._stop_writing()
            if pending and self._stalled:  # the client has just taken what there was no room for
                self._plan_wake()
        elif not self._writing:
            self._writing = True
            self._loop.add_writer(self._descriptor, self._on_writable)
        if self._stalled or self._ending:
            self._stop_reading()
        elif not self._reading:
            self._reading = True
            self._loop.add_reader(self._descriptor, self._on_readable)
        self._check_closed()

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._descriptor)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._descriptor)

    # The end

    def _drop(self, why: str) -> None:
        """The client has broken the protocol, and there is no going on from where it did."""
        log.info("%s, connection dropped", why, extra=self._about)
        self._send()
        self.abort()

    def _lost(self, error: OSError) -> None:
        if not self._gone:
            log.info("connection lost: %s", error.strerror or error, extra=self._about)
            self.abort()

    def _check_closed(self) -> None:
        if self._running or self.closed.done():
            return
        if self._gone:
            self.closed.set_result(False)
        elif self._ending and not self._stalled and self._output.empty:
            self._gone = True
            self._stop_reading()
            self._stop_writing()
            self.closed.set_result(self._linger)
        if self._gone:
            self._export.borrowers.discard(self)
            self._meter.connections.discard(self)
            self._leave_throttle()
