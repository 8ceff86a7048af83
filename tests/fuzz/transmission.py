"""Target: the transmission phase, given any requests, over an export that refuses and fails.

Input: 8 bytes of terms (framing, what the export refuses, how it ends), then records of one byte
and what it takes:

    0-7  a request of that command, bits above: its flags; 4 bytes: length, twists, offset
    8    RAW: a byte n, then n bytes that are sent as they are
    9    CUT: what was made so far is sent; the server has some turns
    10   SETTLE: the client reads until all is answered
    11   HOLD: what the export does not do at once waits, until RELEASE (12) or SETTLE
    13   READ: the client, if it is a lazy one, takes some of the replies
    14   REPEAT: a byte n: the last request n times, side by side
    15   START: all before it came behind the handshake

The whole stream is known before any of it is sent; a second reading of it (wire.py) tells which
requests there are, and a model (model.py) what each must be answered. Requests that touch the same
blocks, or bear the same cookie, may be carried out in any order: before such a one all others are
settled, so that the model is exact.

Rules:

- Every whole request but DISC gets one whole reply, the right one, and nothing else is sent; a
  dropped connection and an aborted one are excused.
- All of that within TURNS turns of the event loop without progress.
- In the end ``closed`` is done, no task is left, the export holds what the model holds.
- Tasks, their memory and the unsent replies stay within the bounds of transmission.py.
- Nothing is logged as an error, and no exception reaches the event loop.
- When the reply to FUA has come, what it changed is flushed.
"""

import asyncio
import contextlib
import logging
import random
import socket
import struct
from dataclasses import dataclass, field

from nbdserve.protocol.constants import ReplyStyle
from nbdserve.server import polling
from nbdserve.server import transmission as server
from nbdserve.server.transmission import MAX_BYTES, MAX_REQUESTS, Transmission

from . import messages, wire
from .export import DEPTH, Behaviour, FuzzExport
from .model import BLOCK, ENOTSUP, Model, faults
from .wire import check

TERMS = 8
TURNS = 400
TOUCHING = (wire.READ, wire.WRITE, wire.TRIM, wire.WRITE_ZEROES, wire.CACHE)
MOST = 40 << 20  # bytes of one stream
SMALL_REPLY = 4200  # bytes that a reply has beside data
SIZES = (4 << 20, 1 << 40)
LENGTHS = (*messages.LENGTHS, *messages.LENGTHS, *messages.LONG, *messages.MOST)
RAW, CUT, SETTLE, HOLD, RELEASE, TAKE, REPEAT, START = range(8, 16)
DISC, EOF, FINISH, ABORT, RESET, EXPIRE = range(6)
CONTEXTS = ((1, "base:allocation"), (7, DEPTH))
POOL = random.Random(1).randbytes(1 << 20)


@dataclass
class Terms:
    """What the first bytes of the input say."""

    framing: str
    behaviour: Behaviour
    size: int
    contexts: tuple
    lazy: bool  # reads only when told
    relayed: bool
    ending: int

    @classmethod
    def of(cls, data):
        kind, reads, writes, export, ending, client, _, _ = data[:TERMS].ljust(TERMS, b"\0")
        framing = wire.FRAMINGS[kind % 3]
        behaviour = Behaviour(
            reads, writes, 5 if export & 1 else None, bool(export & 2), bool(export & 0x1C == 0x1C)
        )
        contexts = CONTEXTS[: kind >> 4 & 3] if framing != wire.SIMPLE_REPLIES else ()
        return cls(
            framing,
            behaviour,
            SIZES[export >> 5 & 1],
            contexts,
            bool(client & 1),
            bool(client & 2),
            ending % 6,
        )


@dataclass
class Stream:
    """What is sent, and what happens on the way: (place in it, record, argument)."""

    data: bytearray = field(default_factory=bytearray)
    events: list = field(default_factory=list)


def split(data):
    """The records of an input; the last one may lack something."""
    at = TERMS
    while at < len(data):
        tag = data[at] & 15
        size = 1
        if tag < RAW:
            size = 5
        elif tag == RAW:
            size = 2 + int.from_bytes(data[at + 1 : at + 2], "big")
        elif tag == REPEAT:
            size = 2
        yield data[at : at + size]
        at += size


def program(data, terms):
    """Turn the records of an input into a stream."""
    stream = Stream()
    cookie = 0
    last = None
    for record in split(data):
        if len(stream.data) >= MOST:
            break
        tag, high = record[0] & 15, record[0] >> 4
        if tag < RAW:
            last = (tag, high, record[1:].ljust(4, b"\0"))
            cookie += 1
            _request(stream, terms, cookie, *last, 0)
        elif tag == REPEAT:
            for number in range(int.from_bytes(record[1:], "big") if last else 0):
                if len(stream.data) > MOST // 16:
                    break
                cookie += 1
                _request(stream, terms, cookie, *last, number + 1)
        elif tag == RAW:
            stream.data += record[2:]
        elif tag == START:
            if not stream.events and len(stream.data) <= 1 << 16:
                stream.events.append((len(stream.data), START, 0))
        else:
            stream.events.append((len(stream.data), tag, high))
    return stream


def _request(stream, terms, cookie, command, flags, fields, repeat):
    choice, twists, place = struct.unpack(">BBH", fields)
    length = LENGTHS[choice % len(LENGTHS)]
    align = (BLOCK, 512, 1, BLOCK)[twists >> 4 & 3]
    offset = (place * align + repeat * length) % terms.size
    how = twists >> 6
    if how == 1:
        offset = max(0, terms.size - length) // align * align
    elif how == 2:
        offset = terms.size - length // 2
    elif how == 3:
        offset = (1 << 64) - max(1, place)
    if twists & 1:
        flags |= wire.FAST_ZERO
    if terms.framing == wire.EXTENDED_HEADERS:
        if (command == wire.WRITE) != bool(twists & 2):
            flags |= wire.PAYLOAD_LEN
    elif twists & 10 == 10:
        flags |= wire.PAYLOAD_LEN
    if twists & 4:
        flags |= 0x8000
    if twists & 9 == 9:
        command += 8
    payload = b""
    if command == wire.FLUSH and not choice & 64:
        offset = length = 0
    elif command == wire.DISC and not choice & 64:
        command = wire.READ
    extended = terms.framing == wire.EXTENDED_HEADERS
    if extended and flags & wire.PAYLOAD_LEN and command == wire.BLOCK_STATUS:
        numbers = [CONTEXTS[place & 1][0], CONTEXTS[~place & 1][0], 7, 9][: place >> 1 & 3]
        payload = struct.pack(f">Q{len(numbers)}I", length, *numbers) + bytes(place >> 3 & 1)
        length = len(payload)
    elif (extended and flags & wire.PAYLOAD_LEN) or command == wire.WRITE:
        # A client may announce more than it sends; beyond the largest payload this one does.
        sent = min(length, wire.MAX_PAYLOAD + 1)
        start = cookie * 8191 % (len(POOL) // 2)
        payload = POOL[start : start + sent]
        payload += POOL * (-(-(sent - len(payload)) // len(POOL)))
        payload = payload[:sent]
    stream.data += wire.pack_request(terms.framing, flags, command, cookie, offset, length)
    stream.data += payload


@dataclass
class Expected:
    """One request of the stream, and what is allowed in answer to it."""

    request: wire.Request
    start: int
    end: int
    payload: memoryview
    errors: set  # 0: success
    length: int  # that it is about
    contexts: tuple
    settle: bool = False  # all before it must be answered before it is sent

    @property
    def range(self):
        """The blocks that it looks at or changes."""
        first = self.request.offset // BLOCK
        return first, -(-(self.request.offset + self.length) // BLOCK)

    @property
    def changes(self):
        return self.request.command in (wire.WRITE, wire.TRIM, wire.WRITE_ZEROES)

    @property
    def looks(self):
        return self.request.command in (wire.READ, wire.BLOCK_STATUS)


def read_requests(stream, terms, export):
    """Read the stream; returns what is expected, and where it ends for the server.

    That is the place of a DISC, of what is no request or of what cannot be kept ("disc", "drop"),
    or the end of the stream.
    """
    data = memoryview(stream)
    size = wire.request_size(terms.framing)
    numbers = tuple(number for number, _ in terms.contexts)
    found = []
    batch = _Batch()
    at = 0
    while len(data) - at >= size:
        magic, request = wire.unpack_request(terms.framing, data, at)
        if magic != wire.request_magic(terms.framing):
            return found, at, "drop"
        if request.command == wire.DISC:
            return found, at, "disc"
        if terms.framing == wire.EXTENDED_HEADERS and request.payload > wire.MAX_PAYLOAD:
            return found, at, "drop"
        end = at + size + request.payload
        payload = data[at + size : end]
        errors, length, contexts = faults(
            terms.framing, request, payload, export.size, export.read_only, numbers
        )
        expected = Expected(request, at, end, payload, errors, length, contexts)
        if not errors:
            errors.add(0)
            if request.command in TOUCHING and export.fails(request.offset, length):
                errors.add(5)
            if request.flags & wire.FAST_ZERO:
                errors.add(ENOTSUP)
        expected.settle = batch.meets(expected)
        found.append(expected)
        at = end
    return found, len(data), "end"


class _Batch:
    """The requests that are under way together; they are made not to meet."""

    def __init__(self):
        self._cookies = set()
        self._changed = []
        self._seen = []

    def meets(self, one):
        """Add a request; whether all before it must be settled first."""
        # Cookies are told apart by what the reply brings, which is not known of both.
        meets = one.request.cookie in self._cookies
        first, last = one.range
        if 0 in one.errors and one.length and not meets:
            if one.changes or one.looks:
                meets = any(a < last and first < b for a, b in self._changed)
            if one.changes and not meets:
                meets = any(a < last and first < b for a, b in self._seen)
        if meets:
            self.__init__()
        self._cookies.add(one.request.cookie)
        if 0 in one.errors and one.length:
            if one.changes:
                self._changed.append((first, last))
            elif one.looks:
                self._seen.append((first, last))
        return meets


class _Faults(logging.Handler):
    """Gathers what the server and the event loop complain about."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if record.levelno >= logging.ERROR or record.exc_info:
            self.found.append(self.format(record))


class _Clock:
    """Each look at it takes 20 µs: the server's short waits depend on nothing else."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 20e-6
        return self.now


_loop = None


@contextlib.contextmanager
def _watched():
    """Catch what is logged; a clock that tells the same time in every run."""
    handler = _Faults()
    loggers = [logging.getLogger(name) for name in ("nbdserve", "asyncio")]
    before = [(one.level, one.propagate) for one in loggers]
    for one in loggers:
        one.addHandler(handler)
        one.setLevel(logging.WARNING)
        one.propagate = False
    real = server.perf_counter, polling.perf_counter
    server.perf_counter = polling.perf_counter = _Clock()
    polling.Polling.disturb()
    try:
        yield handler.found
    finally:
        server.perf_counter, polling.perf_counter = real
        for one, (level, propagate) in zip(loggers, before, strict=True):
            one.removeHandler(handler)
            one.setLevel(level)
            one.propagate = propagate


def run(data):
    """Check one input."""
    global _loop  # noqa: PLW0603 - a loop for each input would take most of the time
    if _loop is None:
        _loop = asyncio.new_event_loop()
    terms = Terms.of(data)
    with _watched() as faults_found:
        loop, _loop = _loop, None  # what fails leaves things behind in it
        try:
            loop.run_until_complete(_Scene(terms, data).play())
        except BaseException as error:
            for fault in faults_found:
                error.add_note(f"logged: {fault}")
            raise
        _loop = loop
    check(not faults_found, "\n".join(faults_found))


class _Scene:
    """One connection from its first request to its end."""

    def __init__(self, terms, data):
        self.terms = terms
        stream = program(data, terms)
        self.data = bytes(stream.data)
        self.events = stream.events
        self.export = FuzzExport(terms.size, terms.behaviour)
        self.model = Model(terms.size)
        self.expected, self.stop, self.why = read_requests(self.data, terms, self.export)
        self.under_way = {}
        self.reader = wire.ReplyReader(terms.framing, self.under_way)
        self.next = 0  # of the expected
        self.sent = 0
        self.over = False  # the server may have stopped answering
        self.ours, self.theirs = socket.socketpair()
        for end in (self.ours, self.theirs):
            end.setblocking(False)
        if terms.lazy:
            self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)

    async def play(self):
        try:
            async with asyncio.timeout(60):
                await self._play()
        finally:
            self.export.gate.set()
            self.ours.close()
            self.theirs.close()

    async def _play(self):
        terms = self.terms
        self.transmission = Transmission(
            self.theirs,
            self.export,
            style=ReplyStyle(terms.framing),
            contexts=terms.contexts,
            peer="fuzz",
            relayed=terms.relayed,
        )
        received = b""
        events = self.events
        if events and events[0][1] == START:
            # What must not be under way together is not sent together.
            settled = [one.start for one in self.expected if one.settle]
            self.sent = min([events[0][0], self.stop, *settled])
            self._ask_for(self.sent)
            received = self.data[: self.sent]
        self.transmission.start(received)
        for place, what, argument in events:
            await self._push(min(place, self.stop))
            if what == CUT:
                await self._turns(1 + argument)
            elif what == SETTLE:
                await self._settle()
            elif what == HOLD:
                self.export.gate.clear()
            elif what == RELEASE:
                self.export.gate.set()
            elif what == TAKE:
                self._receive(1 + argument * 3000)
        await self._push(self.stop)
        await self._end()

    # Sending and receiving

    def _ask_for(self, place):
        """Note the requests whose last byte lies before ``place``."""
        while self.next < len(self.expected) and self.expected[self.next].end <= place:
            one = self.expected[self.next]
            self.under_way[one.request.cookie] = one
            if one.request.command == wire.READ:
                self.reader.lengths[one.request.cookie] = one.length
            self.next += 1

    async def _push(self, place):
        """Send up to ``place``, settling where the model needs it."""
        borders = [
            one.start for one in self.expected[self.next :] if one.settle and one.start < place
        ]
        for border in borders:
            if border >= self.sent:
                await self._send(border)
                await self._settle()
        await self._send(place)

    async def _send(self, place):
        idle = 0
        view = memoryview(self.data)
        while self.sent < place:
            try:
                self.sent += self.ours.send(view[self.sent : min(place, self.sent + (1 << 17))])
                idle = 0
            except BlockingIOError:
                idle += 1
                if idle > 20:  # a client that waits for room reads its replies
                    self.export.gate.set()
                    self._receive()
                check(idle < TURNS, "the server takes nothing more")
            except ConnectionError:
                check(self.over, "the server has closed the connection")
                return
            self._ask_for(self.sent)
            await self._turn()

    async def _turns(self, number):
        for _ in range(number):
            await self._turn()

    async def _turn(self):
        await asyncio.sleep(0)
        if not self.terms.lazy:
            self._receive()
        self._check_bounds()

    def _receive(self, most=1 << 20):
        """Take what has come, at most that much; returns how much it was."""
        try:
            data = self.ours.recv(most)
        except BlockingIOError:
            return 0
        except ConnectionError:
            check(self.over, "the server has closed the connection")
            return 0
        self.reader.feed(data)
        while (reply := self.reader.take()) is not None:
            self._judge(reply)
        return len(data)

    async def _settle(self):
        """Read until all that was sent whole is answered."""
        self.export.gate.set()
        idle = 0
        while self.under_way:
            idle = 0 if self._receive() else idle + 1
            if idle > TURNS:
                check(self.over, f"no reply to {next(iter(self.under_way.values()))}")
                return
            await asyncio.sleep(0)
            self._check_bounds()
        # What lends must learn that the client has all its replies.
        one = self.transmission
        check(self.over or one.has_passed(one.mark()), "what was received does not count as passed")

    def _check_bounds(self):
        export, one = self.export, self.transmission
        memory = one._bytes + one._output.queued
        tasks = len(one._tasks)
        if tasks > MAX_REQUESTS:  # some may have ended in this turn of the loop
            tasks = sum(not task.done() for task in one._tasks)
        most = MAX_BYTES
        if memory > most:  # a request that is over the bound alone has it for itself
            sent = [*self.under_way.values(), *self.expected[self.next : self.next + 1]]
            most = max([most, *(one.length for one in sent)])
            most = min(most, wire.MAX_PAYLOAD) + MAX_REQUESTS * SMALL_REPLY
        if not (
            tasks <= MAX_REQUESTS
            and export.waiting <= MAX_REQUESTS
            and export.waiting_bytes <= most
            and memory <= most
        ):
            raise wire.ProtocolError(
                f"{tasks} tasks, {memory} bytes of memory; in the export {export.waiting}"
                f" operations with {export.waiting_bytes} bytes"
            )

    # Judging

    def _judge(self, reply):
        one = self.under_way.pop(reply.cookie)
        self.reader.lengths.pop(reply.cookie, None)
        if reply.error not in one.errors:
            raise wire.ProtocolError(f"error {reply.error} ({reply.text}) in answer to {one}")
        request = one.request
        simple = self.terms.framing == wire.SIMPLE_REPLIES
        check(simple <= reply.simple, "a chunk in answer to a client of simple replies")
        check(not reply.error or simple or reply.text, "an error without a text")
        if reply.error:
            check(not reply.status, "status, though it failed")
            if one.changes and 0 in one.errors:
                self._doubt(one)
            return
        if request.command == wire.READ:
            self._judge_read(one, reply)
            return
        check(not reply.pieces, "data in answer to no READ")
        if request.command == wire.BLOCK_STATUS:
            self._judge_status(one, reply)
            return
        check(not reply.status, "status in answer to no BLOCK_STATUS")
        self._apply(one)
        if request.flags & wire.FUA and one.changes and one.length:
            end = request.offset + one.length
            unflushed = [
                change for change in self.export.unflushed
                if change[0] < end and request.offset < change[1]
            ]  # fmt: skip
            check(not unflushed, f"FUA: {unflushed} is not flushed")

    def _apply(self, one):
        offset, length = one.request.offset, one.length
        if not length:
            return
        if one.request.command == wire.WRITE:
            self.model.write(offset, bytes(one.payload))
        elif one.request.command == wire.TRIM:
            self.model.discard(offset, length, edges=False)
        elif one.request.command == wire.WRITE_ZEROES:
            if one.request.flags & wire.NO_HOLE and length <= 1 << 20:
                self.model.write(offset, bytes(length))
            else:
                self.model.discard(offset, length, edges=True)

    def _doubt(self, one):
        self.model.doubt(one.request.offset, one.request.offset + one.length)

    def _judge_read(self, one, reply):
        offset, length = one.request.offset, one.length
        if self.terms.framing == wire.SIMPLE_REPLIES:
            found = [(offset, data) for _, data in reply.pieces]
        else:
            found = sorted(reply.pieces, key=lambda piece: piece[0])
            check(not one.request.flags & wire.DF or len(found) <= 1, "DF, and more than one chunk")
        at = offset
        for start, piece in found:
            if start != at:
                raise wire.ProtocolError(
                    f"a chunk at {start}, {at} was to come in answer to {one.request}"
                )
            at += piece if isinstance(piece, int) else len(piece)
        if at != offset + length:
            raise wire.ProtocolError(f"{at - offset} bytes of {one.request}")
        if not self.model.is_sure(offset, offset + length):
            return
        content = self.model.read(offset, length)
        for start, piece in found:
            data = bytes(piece) if isinstance(piece, int) else piece
            if content[start - offset : start - offset + len(data)] != data:
                raise wire.ProtocolError(
                    f"other data than was written, in {one.request} from {start} on"
                )

    def _judge_status(self, one, reply):
        offset, length = one.request.offset, one.length
        numbers = [number for number, _ in reply.status]
        check(sorted(numbers) == sorted(one.contexts), f"contexts {numbers} of {one.contexts}")
        for number, runs in reply.status:
            check(
                not one.request.flags & wire.REQ_ONE or len(runs) == 1, "REQ_ONE, and several runs"
            )
            total = sum(size for size, _ in runs)
            check(total <= length, f"status of {total} bytes in answer to {one.request}")
            if self.model.is_sure(offset, offset + length):
                known = self.model.runs(offset, length)
                data, hole = (0, 3) if number == 1 else (1, 0)
                wanted = [(size, data if held else hole) for size, held in known]
                # No rule says how far it must go, nor that a run is told in one piece.
                short = runs[:-1] == wanted[: len(runs) - 1]
                (size, flags), (most, right) = runs[-1], wanted[len(runs) - 1]
                check(
                    short and flags == right and size <= most, f"status {runs} instead of {wanted}"
                )

    # The end

    async def _end(self):
        ending = self.terms.ending
        one = self.transmission
        partial = self.next < len(self.expected)
        if partial:  # of a WRITE that is not all there some may be written
            unfinished = self.expected[self.next]
            if unfinished.changes and 0 in unfinished.errors:
                self._doubt(unfinished)
        if self.why == "drop":
            await self._settle()
            self.over = True
            await self._rest()
            await self._closed()
            check(one.closed.result() is False, "lingering after a drop")
        elif ending == DISC or self.why == "disc":
            await self._disconnect(partial)
        elif ending == EOF:
            self.ours.shutdown(socket.SHUT_WR)
            await self._settle()
            await self._closed()
        else:
            await self._leave(ending)
        if ending in (DISC, EOF) or self.why == "drop":
            check(not self.reader.amid, "a reply was not finished")
        self._check_content()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        check(not others, f"tasks are left: {others}")
        check(not self.export.borrowers and not self.export.waiting, "the export is still in use")

    async def _rest(self):
        """Send what lies behind the server's end of the stream: it may read or drop that."""
        self.stop = min(len(self.data), self.stop + (1 << 17))
        expected, self.expected = self.expected, []
        self.next = 0
        for _ in range(20):
            if self.sent >= self.stop:
                break
            with contextlib.suppress(BlockingIOError, ConnectionError):
                view = memoryview(self.data)[self.sent : self.stop]
                self.sent += self.ours.send(view)
            await asyncio.sleep(0)
        self.expected = expected

    async def _disconnect(self, partial):
        """DISC behind whatever is under way, unless it would be taken for a payload."""
        if not partial and self.why == "end" and self.sent == self._last_end():
            self.data += wire.pack_request(self.terms.framing, 0, wire.DISC, 0, 0, 0)
        elif self.why == "end":
            self.ours.shutdown(socket.SHUT_WR)
        if self.why == "disc" or len(self.data) > self.stop:
            await self._rest()
        await self._settle()
        await self._closed()

    def _last_end(self):
        return self.expected[-1].end if self.expected else 0

    async def _leave(self, ending):
        """The server ends it, or the client without a word: some requests stay unanswered."""
        self.over = True
        if ending == FINISH:
            self.transmission.finish()
            self.transmission.finish()
        elif ending == EXPIRE:
            self.transmission.finish()
            self.transmission.abort()
        elif ending == ABORT:
            self.transmission.abort()
            self.transmission.finish()
        else:
            self.ours.close()
        self.export.gate.set()
        await self._closed(reading=ending != RESET)
        if ending == FINISH:
            check(self.transmission.closed.result() is True, "finished without lingering")
        for one in self.under_way.values():
            if one.changes and 0 in one.errors:
                self._doubt(one)

    async def _closed(self, *, reading=True):
        """Wait for the end."""
        idle = 0
        while not self.transmission.closed.done():
            await asyncio.sleep(0)
            idle = 0 if reading and self._receive() else idle + 1
            check(idle < TURNS, "the transmission does not end")
        while reading and self._receive():
            pass
        await asyncio.sleep(0)

    def _check_content(self):
        """The export holds what the model holds."""
        held = self.export._map.blocks.keys() | self.model.blocks.keys()
        for block in held:
            start = block * BLOCK
            if self.model.is_sure(start, start + BLOCK):
                content = self.export.read_all(start, BLOCK)
                check(content == bytes(self.model.read(start, BLOCK)), f"block {block} differs")
                known = block in self.model.blocks
                check(known == (block in self.export._map.blocks), f"block {block}: a hole or not")
