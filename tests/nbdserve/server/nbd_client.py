"""A client that can do all that a client should not."""

import asyncio
import struct
from dataclasses import dataclass

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8


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


def option(kind, data=b""):
    return struct.pack(">8sII", b"IHAVEOPT", kind, len(data)) + data


def string(text):
    return struct.pack(">I", len(text)) + text.encode()


class Client:
    """One connection on asyncio streams."""

    def __init__(self, reader, writer, *, structured):
        self.reader = reader
        self.writer = writer
        self.structured = structured
        self.lengths = {}  # cookie -> length of the READ

    @classmethod
    async def raw(cls, path):
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 16)
        return cls(reader, writer, structured=False)

    @classmethod
    async def connect(cls, path, name="disk", *, structured=True, context=True):
        client = await cls.raw(path)
        client.structured = structured
        assert (await client.reader.readexactly(18)) == b"NBDMAGICIHAVEOPT\0\3"
        client.writer.write(struct.pack(">I", 3))
        if structured:
            await client.option(8)
            if context:
                query = string(name) + struct.pack(">I", 1) + string("base:allocation")
                await client.option(10, query)
        await client.option(7, string(name) + b"\0\0")
        return client

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
        message = request(command, offset, length, **more)
        if command == READ:
            self.lengths[more.get("cookie", 1)] = length
        self.writer.write(message)

    async def call(self, command, offset=0, length=0, **more):
        """Send a request and wait for its reply."""
        self.send(command, offset, length, **more)
        return await self.reply()

    async def reply(self):
        """Receive one whole reply."""
        chunks = []
        while True:
            (magic,) = struct.unpack(">I", await self.reader.readexactly(4))
            if magic == 0x67446698:
                assert not chunks
                error, cookie = struct.unpack(">IQ", await self.reader.readexactly(12))
                length = self.lengths.pop(cookie, None)
                assert length is None or not self.structured
                data = await self.reader.readexactly(0 if error or not length else length)
                return Reply(cookie, error, data)
            assert magic == 0x668E33EF
            assert self.structured
            flags, kind, cookie, length = struct.unpack(">HHQI", await self.reader.readexactly(16))
            chunks.append((kind, await self.reader.readexactly(length)))
            if flags & 1:
                self.lengths.pop(cookie, None)
                return _assemble(cookie, chunks)

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
    """Return the descriptors of a BLOCK_STATUS reply: [(length, flags)]."""
    ((kind, payload),) = reply.chunks
    assert kind == 5
    return list(struct.iter_unpack(">II", payload[4:]))
