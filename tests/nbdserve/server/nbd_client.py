"""A client that can do all that a client should not."""

import asyncio
import struct
from dataclasses import dataclass

from nbdserve.protocol.constants import ReplyStyle

SIMPLE, STRUCTURED, EXTENDED = ReplyStyle
STYLES = list(ReplyStyle)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32


@dataclass
class Reply:
    """A whole reply; ``chunks`` are (type, payload) of a structured one."""

    cookie: int
    error: int
    data: bytes = b""
    message: str = ""
    chunks: tuple = ()


def request(command, offset=0, length=0, *, flags=0, cookie=1, data=b""):
    length = length or len(data)
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data


def extended_request(command, offset=0, length=0, *, flags=0, cookie=1, data=b""):
    length = length or len(data)
    if data or command == WRITE:
        flags |= PAYLOAD_LEN
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + data


def option(kind, data=b""):
    return struct.pack(">8sII", b"IHAVEOPT", kind, len(data)) + data


def string(text):
    return struct.pack(">I", len(text)) + text.encode()


class Client:
    """One connection on asyncio streams."""

    def __init__(self, reader, writer, style=SIMPLE):
        self.reader = reader
        self.writer = writer
        self.style = style
        self.lengths = {}  # cookie -> length of the READ
        self.offsets = {}  # cookie -> offset, with extended headers
        self.chunks = {}  # cookie -> what came of its reply

    @classmethod
    async def raw(cls, path):
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 16)
        return cls(reader, writer)

    @classmethod
    async def connect(cls, path, name="disk", *, style=STRUCTURED, contexts=("base:allocation",)):
        client = await cls.raw(path)
        assert (await client.reader.readexactly(18)) == b"NBDMAGICIHAVEOPT\0\3"
        client.writer.write(struct.pack(">I", 3))
        await client.agree(name, style, contexts)
        return client

    async def agree(self, name, style, contexts=()):
        """Negotiate how replies come, and metadata contexts; begin the transmission phase."""
        self.style = style
        if style is not SIMPLE:
            await self.option(8 if style is STRUCTURED else 11)
            if contexts:
                query = string(name) + struct.pack(">I", len(contexts))
                await self.option(10, query + b"".join(map(string, contexts)))
        await self.option(7, string(name) + b"\0\0")

    async def option(self, kind, data=b""):
        """Send an option; returns the data of its replies, raises on an error."""
        self.writer.write(option(kind, data))
        found = []
        while True:
            header = await self.reader.readexactly(20)
            _, replied, reply, length = struct.unpack(">QIII", header)
            assert replied == kind
            payload = await self.reader.readexactly(length)
            if reply == 1:
                return found
            assert reply < 1 << 31, payload.decode()
            found.append(payload)

    def send(self, command, offset=0, length=0, **more):
        """Send a request without waiting."""
        make = extended_request if self.style is EXTENDED else request
        message = make(command, offset, length, **more)
        if command == READ:
            self.lengths[more.get("cookie", 1)] = length
        self.offsets[more.get("cookie", 1)] = offset
        self.writer.write(message)

    async def call(self, command, offset=0, length=0, **more):
        """Send a request and wait for its reply."""
        self.send(command, offset, length, **more)
        return await self.reply()

    async def reply(self):
        """Receive until a reply is whole; chunks of several may come mixed."""
        while True:
            (magic,) = struct.unpack(">I", await self.reader.readexactly(4))
            if magic == 0x67446698:
                assert self.style is not EXTENDED
                error, cookie = struct.unpack(">IQ", await self.reader.readexactly(12))
                assert cookie not in self.chunks
                length = self.lengths.pop(cookie, None)
                assert length is None or self.style is SIMPLE
                data = await self.reader.readexactly(0 if error or not length else length)
                return Reply(cookie, error, data)
            if self.style is EXTENDED:
                assert magic == 0x6E8A278C
                header = struct.unpack(">HHQQQ", await self.reader.readexactly(28))
                flags, kind, cookie, offset, length = header
                assert offset == self.offsets.get(cookie, offset)
            else:
                assert magic == 0x668E33EF
                assert self.style is STRUCTURED
                header = await self.reader.readexactly(16)
                flags, kind, cookie, length = struct.unpack(">HHQI", header)
            chunks = self.chunks.setdefault(cookie, [])
            chunks.append((kind, await self.reader.readexactly(length)))
            if flags & 1:
                self.lengths.pop(cookie, None)
                return _assemble(cookie, self.chunks.pop(cookie))

    async def at_end(self):
        """Read until the server's end of stream; returns what came."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    def close(self):
        self.writer.transport.abort()


def _assemble(cookie, chunks):
    reply = Reply(cookie, 0, chunks=tuple(chunks))
    parts = {}
    for kind, payload in chunks:
        if kind == 1:
            assert len(payload) > 8
            parts[struct.unpack_from(">Q", payload)[0]] = payload[8:]
        elif kind == 2:
            offset, size = struct.unpack(">QI", payload)
            assert size
            parts[offset] = bytes(size)
        elif kind & 1 << 15:
            reply.error, size = struct.unpack_from(">IH", payload)
            assert reply.error and len(payload) == 6 + size
            reply.message = payload[6:].decode()
    position = min(parts, default=0)
    for offset in sorted(parts):
        assert offset == position
        position += len(parts[offset])
    reply.data = b"".join(parts[offset] for offset in sorted(parts))
    return reply


def extents(reply):
    """Return the descriptors of a BLOCK_STATUS reply for one context: [(length, status)]."""
    ((_, descriptors),) = statuses(reply)
    return descriptors


def statuses(reply):
    """Return what a BLOCK_STATUS reply says of each context: [(ID, [(length, status)])]."""
    found = []
    for kind, payload in reply.chunks:
        assert kind in (5, 6), reply
        if kind == 5:
            (context,) = struct.unpack_from(">I", payload)
            descriptors = list(struct.iter_unpack(">II", payload[4:]))
        else:
            context, count = struct.unpack_from(">II", payload)
            descriptors = list(struct.iter_unpack(">QQ", payload[8:]))
            assert len(descriptors) == count
        assert descriptors
        found.append((context, descriptors))
    return found
