"""Layouts of the protocol as a client sees them, and readers that believe nothing.

Everything that a reader raises is a ``ProtocolError``: the server sent what the specification does
not allow.
"""

import struct
from dataclasses import dataclass, field

INIT = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
OPTION_REPLY = 0x0003E889045565A9

EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    range(1, 12)
)
ACK, SERVER, INFORMATION, META_CONTEXT = range(1, 5)
ERROR_BIT = 1 << 31
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG = (
    ERROR_BIT + number for number in range(1, 10)
)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))

MAX_STRING = 4096
MAX_OPTION = 64 << 10
MAX_PAYLOAD = 32 << 20

OPTION_HEADER = struct.Struct(">8sII")
REPLY_HEADER = struct.Struct(">QIII")

SIMPLE_MAGIC, CHUNK_MAGIC, EXTENDED_MAGIC = 0x67446698, 0x668E33EF, 0x6E8A278C
REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC = 0x25609513, 0x21E41C71

# Framings of the transmission phase
SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS = "simple", "structured", "extended"
FRAMINGS = (SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS)

_COMPACT = struct.Struct(">IHHQQI")
_WIDE = struct.Struct(">IHHQQQ")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_WIDE_CHUNK = struct.Struct(">IHHQQQ")

NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 0x8001, 0x8002
DONE = 1


class ProtocolError(AssertionError):
    """The server broke the protocol."""


def check(condition, message):
    if not condition:
        raise ProtocolError(message)


# The handshake


def option(kind, data=b"", length=None, magic=IHAVEOPT):
    """One option; ``length`` when it is to lie."""
    length = len(data) if length is None else length
    return OPTION_HEADER.pack(magic, kind & 0xFFFFFFFF, length & 0xFFFFFFFF) + data


def string(text, length=None):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack(">I", len(data) if length is None else length) + data


def info(name, *wanted):
    """Data of INFO and GO."""
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def queries(name, *names):
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return string(name) + struct.pack(">I", len(names)) + b"".join(map(string, names))


def read_text(data, what):
    """A string that the server sent."""
    check(len(data) <= MAX_STRING, f"{what} of {len(data)} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"{what} is not UTF-8") from None
    check("\0" not in text, f"{what} has a NUL in it")
    return text


def read_option_reply(data, at, kind):
    """Read one reply to option ``kind``; returns (reply, payload, where it ends)."""
    check(len(data) - at >= REPLY_HEADER.size, f"{len(data) - at} bytes of a reply's header")
    magic, answered, reply, length = REPLY_HEADER.unpack_from(data, at)
    check(magic == OPTION_REPLY, f"reply magic {magic:#x}")
    check(answered == kind, f"a reply to option {answered}, not {kind}")
    end = at + REPLY_HEADER.size + length
    check(end <= len(data), f"a reply of {length} bytes is cut")
    payload = bytes(data[at + REPLY_HEADER.size : end])
    if reply & ERROR_BIT:
        check(UNSUP <= reply <= TOO_BIG + 1, f"error {reply:#x}")
        check(read_text(payload, "an error's text"), "an error without a text")
    elif reply == ACK:
        check(not payload, "ACK with data")
    elif reply == SERVER:
        check(kind == LIST and len(payload) >= 4, "SERVER")
        (size,) = struct.unpack_from(">I", payload)
        check(4 + size <= len(payload), "SERVER: the name is longer than the reply")
        read_text(payload[4 : 4 + size], "an export's name")
    elif reply == INFORMATION:
        check(kind in (INFO, GO), f"INFO as a reply to option {kind}")
        _read_information(payload)
    elif reply == META_CONTEXT:
        check(kind in (LIST_META, SET_META) and len(payload) > 4, "META_CONTEXT")
        check(":" in read_text(payload[4:], "a context"), "a context without a namespace")
    else:
        raise ProtocolError(f"reply {reply:#x}")
    return reply, payload, end


def _read_information(payload):
    check(len(payload) >= 2, "INFO of less than two bytes")
    (kind,) = struct.unpack_from(">H", payload)
    if kind == 0:
        check(len(payload) == 12, "NBD_INFO_EXPORT's length")
        check(struct.unpack_from(">H", payload, 10)[0] & 1, "HAS_FLAGS is not set")
    elif kind in (1, 2):
        read_text(payload[2:], "a name or description")
    elif kind == 3:
        check(len(payload) == 14, "NBD_INFO_BLOCK_SIZE's length")
        least, preferred, most = struct.unpack_from(">III", payload, 2)
        check(least <= preferred <= most, "block sizes")
        check(not least & (least - 1) and not preferred & (preferred - 1), "block sizes")
    else:
        raise ProtocolError(f"information {kind}")


# The transmission phase


@dataclass(frozen=True)
class Request:
    """One request; ``payload`` is the length of what follows its header."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: int = 0


def request_size(framing):
    return (_WIDE if framing == EXTENDED_HEADERS else _COMPACT).size


def request_magic(framing):
    return EXTENDED_REQUEST_MAGIC if framing == EXTENDED_HEADERS else REQUEST_MAGIC


def pack_request(framing, flags, command, cookie, offset, length, magic=None):
    """The header of a request; the payload is the caller's."""
    layout = _WIDE if framing == EXTENDED_HEADERS else _COMPACT
    magic = request_magic(framing) if magic is None else magic
    mask = (1 << 64) - 1
    most = mask if framing == EXTENDED_HEADERS else (1 << 32) - 1
    return layout.pack(
        magic, flags & 0xFFFF, command & 0xFFFF, cookie & mask, offset & mask, length & most
    )


def unpack_request(framing, data, at):
    """Read the header at ``at``; returns (magic, Request)."""
    layout = _WIDE if framing == EXTENDED_HEADERS else _COMPACT
    magic, flags, command, cookie, offset, length = layout.unpack_from(data, at)
    announced = framing == EXTENDED_HEADERS and flags & PAYLOAD_LEN
    payload = length if announced or command == WRITE else 0
    return magic, Request(flags, command, cookie, offset, length, payload)


@dataclass
class Reply:
    """All that answers one request."""

    cookie: int
    error: int = 0
    text: str = ""
    simple: bool = False
    pieces: list = field(default_factory=list)  # (offset, data) or (offset, length of a hole)
    status: list = field(default_factory=list)  # (context, [(length, status)])


class ReplyReader:
    """Takes the server's bytes apart; a whole reply at a time comes out of ``take``.

    ``lengths`` says how many bytes a successful simple READ brings, by cookie; ``cookies`` has
    those of the requests that are not answered yet.
    """

    def __init__(self, framing, cookies):
        self.framing = framing
        self.cookies = cookies
        self.lengths = {}
        self._input = bytearray()
        self._at = 0
        self._open = {}  # replies of which a chunk has come

    @property
    def amid(self):
        """Whether a reply has begun."""
        return self._at < len(self._input) or bool(self._open)

    def feed(self, data):
        self._input += data

    def take(self):
        """The next whole reply, or None."""
        while True:
            found = self._message()
            if found is None:
                if self._at > 1 << 16 or self._at == len(self._input):
                    del self._input[: self._at]
                    self._at = 0
                return None
            if isinstance(found, Reply):
                return found

    def _message(self):
        """A Reply when one is whole, True when there was a chunk of one, None."""
        left = len(self._input) - self._at
        if left < 4:
            return None
        (magic,) = struct.unpack_from(">I", self._input, self._at)
        if magic == SIMPLE_MAGIC:
            check(self.framing != EXTENDED_HEADERS, "a simple reply with extended headers")
            return self._simple(left)
        if magic == CHUNK_MAGIC:
            check(self.framing == STRUCTURED_REPLIES, "a structured reply")
            layout = _CHUNK
        else:
            check(magic == EXTENDED_MAGIC, f"reply magic {magic:#x}")
            check(self.framing == EXTENDED_HEADERS, "an extended reply")
            layout = _WIDE_CHUNK
        if left < layout.size:
            return None
        if layout is _CHUNK:
            _, flags, kind, cookie, length = layout.unpack_from(self._input, self._at)
            offset = None
        else:
            _, flags, kind, cookie, offset, length = layout.unpack_from(self._input, self._at)
        check(length <= MAX_PAYLOAD + 8, f"a chunk of {length} bytes")
        if left < layout.size + length:
            return None
        start = self._at + layout.size
        self._at = start + length
        payload = bytes(memoryview(self._input)[start : self._at])
        return self._chunk(flags, kind, cookie, offset, payload)

    def _simple(self, left):
        if left < _SIMPLE.size:
            return None
        _, error, cookie = _SIMPLE.unpack_from(self._input, self._at)
        check(cookie in self.cookies, "a reply to nothing")
        check(cookie not in self._open, "a simple reply amid chunks of the same cookie")
        length = 0
        if cookie in self.lengths:
            check(
                self.framing == SIMPLE_REPLIES,
                "a simple reply to READ, though structured ones were agreed on",
            )
            length = 0 if error else self.lengths[cookie]
        if left < _SIMPLE.size + length:
            return None
        start = self._at + _SIMPLE.size
        self._at = start + length
        reply = Reply(cookie, error, simple=True)
        if length:
            reply.pieces.append((None, bytes(memoryview(self._input)[start : self._at])))
        return reply

    def _chunk(self, flags, kind, cookie, offset, payload):
        check(cookie in self.cookies, "a chunk in answer to nothing")
        check(not flags & ~DONE, f"reply flags {flags:#x}")
        key = cookie if offset is None else (cookie, offset)
        reply = self._open.setdefault(key, Reply(cookie))
        if kind == NONE:
            check(flags & DONE and not payload, "NONE that is not the end, or has data")
        elif kind == OFFSET_DATA:
            check(len(payload) > 8, "OFFSET_DATA without data")
            check(len(payload) - 8 <= MAX_PAYLOAD, "OFFSET_DATA beyond the largest payload")
            reply.pieces.append((struct.unpack_from(">Q", payload)[0], payload[8:]))
        elif kind == OFFSET_HOLE:
            check(len(payload) == 12, "OFFSET_HOLE's length")
            where, size = struct.unpack(">QI", payload)
            check(size, "OFFSET_HOLE of no bytes")
            reply.pieces.append((where, size))
        elif kind in (STATUS, STATUS_EXT):
            reply.status.append(self._status(kind, payload))
        elif kind in (ERROR, ERROR_OFFSET):
            check(len(payload) >= 6, "an error chunk's length")
            error, size = struct.unpack_from(">IH", payload)
            check(error, "an error chunk without an error")
            rest = 8 if kind == ERROR_OFFSET else 0
            check(len(payload) == 6 + size + rest, "an error chunk's length")
            reply.error = reply.error or error
            reply.text = read_text(payload[6 : 6 + size], "an error's text")
            check(reply.text, "an error without a text")
        else:
            raise ProtocolError(f"chunk type {kind:#x}")
        if not flags & DONE:
            return True
        return self._open.pop(key)

    def _status(self, kind, payload):
        wide = self.framing == EXTENDED_HEADERS
        check(kind == (STATUS_EXT if wide else STATUS), f"status chunk type {kind}")
        head, each = (8, 16) if wide else (4, 8)
        check(len(payload) > head and (len(payload) - head) % each == 0, "a status chunk's length")
        (context,) = struct.unpack_from(">I", payload)
        if wide:
            (count,) = struct.unpack_from(">I", payload, 4)
            check(count * 16 + 8 == len(payload), "a status chunk's count")
        runs = list(struct.iter_unpack(">QQ" if wide else ">II", payload[head:]))
        check(len(runs) <= 1 << 20, "too many descriptors")
        check(all(length for length, _ in runs), "a descriptor of no bytes")
        return context, runs
