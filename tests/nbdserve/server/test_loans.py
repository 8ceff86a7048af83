"""Reads that are sent from files with sendfile, and how long what was lent stays on loan."""

import asyncio
import os
import socket
import tempfile

import pytest

from nbdserve.protocol.constants import ReplyStyle
from nbdserve.server.transmission import MAX_BYTES, Transmission
from snapshots.lending import MIN_LOAN

from .harness import serve, settle
from .memory_export import MemoryExport
from .nbd_client import DF, READ, SIMPLE, STYLES, request

MIB = 1 << 20
both_replies = pytest.mark.parametrize("style", STYLES)


class LendingExport(MemoryExport):
    """Lends everything, in pieces of ``piece`` bytes, from a file of the same content."""

    def __init__(self, size=8 * MIB, piece=MIB, **options):
        super().__init__(size=size, **options)
        self.content[:] = os.urandom(size)
        self.held.update(range(size // 4096))
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the export
        self.file.write(self.content)
        self.file.flush()
        self.piece = piece
        self.lent = 0

    def try_lend(self, offset, length):
        self.lent += 1
        end = offset + length
        return [
            (self.file.fileno(), at, min(self.piece, end - at))
            for at in range(offset, end, self.piece)
        ]


@both_replies
@pytest.mark.parametrize("size", [MIN_LOAN, MIN_LOAN + 1, 100_000, MIB, MIB + 1, 3 * MIB + 5])
def test_lent_reads_are_the_same_bytes(style, size):
    async def test(harness):
        export = harness.export
        client = await harness.connect(style=style)
        for offset in (0, 4096, 7, export.size - size):
            for flags in (0, DF) if style is not SIMPLE else (0,):
                reply = await client.call(READ, offset, size, flags=flags)
                assert (reply.error, reply.data) == (0, export.content[offset : offset + size])
        assert export.lent == (8 if style is not SIMPLE else 4)

    serve(test, LendingExport(piece=300_000))


def test_short_reads_are_copied():
    async def test(harness):
        client = await harness.connect()
        reply = await client.call(READ, 5, MIN_LOAN - 1)
        assert reply.data == harness.export.content[5 : 5 + MIN_LOAN - 1]
        assert harness.export.lent == 0

    serve(test, LendingExport())


def test_what_is_on_loan_is_bounded():
    """A client that asks and asks but takes nothing; later it gets everything."""

    async def test(harness):
        export = harness.export
        client = await harness.connect(style=SIMPLE)
        most = MAX_BYTES // MIB + 4  # and what the socket took
        wanted = 3 * most
        client.writer.write(b"".join(request(READ, 0, MIB, cookie=i) for i in range(wanted)))
        await settle()
        assert MAX_BYTES // MIB <= export.lent <= most
        cookies = set()
        for _ in range(wanted):
            header = await client.reader.readexactly(16)
            cookies.add(header[8:])
            assert await client.reader.readexactly(MIB) == export.content[:MIB]
        assert len(cookies) == wanted

    serve(test, LendingExport())


def test_a_file_that_has_become_shorter_ends_the_connection():
    async def test(harness):
        client = await harness.connect()
        harness.export.file.truncate(MIB)
        client.writer.write(request(READ, 0, 2 * MIB))
        with pytest.raises(asyncio.IncompleteReadError):
            await client.reader.readexactly(2 * MIB + 28)
        await harness.no_connections()

    serve(test, LendingExport(piece=4 * MIB))


async def _transmission(export, family=socket.AF_UNIX):
    ours, theirs = socket.socketpair(family, socket.SOCK_STREAM)
    ours.setblocking(False)
    theirs.setblocking(False)
    transmission = Transmission(ours, export, style=ReplyStyle.SIMPLE, contexts=(), peer="test")
    transmission.start(b"")
    return transmission, theirs


def test_a_mark_is_passed_when_the_client_has_received_all_up_to_it():
    async def main():
        export = LendingExport()
        transmission, client = await _transmission(export)
        loop = asyncio.get_running_loop()
        assert export.borrowers == {transmission}
        start = transmission.mark()
        assert transmission.has_passed(start)
        await loop.sock_sendall(client, request(READ, 0, MIB) * 5)
        await settle(lambda: transmission.mark() == start + 5 * (16 + MIB))
        first = transmission.mark()
        assert not transmission.has_passed(first)
        got = 0
        while got < 5 * (16 + MIB) - 1:
            got += len(await loop.sock_recv(client, min(MIB, 5 * (16 + MIB) - 1 - got)))
            assert not transmission.has_passed(first)
        await loop.sock_sendall(client, request(READ, 0, MIB) * 5)  # lent after the mark
        await settle(lambda: transmission.mark() > first)
        assert not transmission.has_passed(first)
        assert len(await loop.sock_recv(client, 1)) == 1
        await settle()
        assert not transmission.has_passed(transmission.mark())
        # What is in the queue by now was all sent after the mark; the kernel's count of it may be
        # too large to tell before some of it is gone.
        while not transmission.has_passed(first):
            assert await loop.sock_recv(client, MIB)
        client.close()
        assert await transmission.closed in (False, True)
        assert not export.borrowers
        assert transmission.has_passed(1 << 60)

    asyncio.run(main())


def test_nothing_is_lent_over_tcp():
    async def main():
        export = LendingExport()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        ours.setblocking(False)
        client.setblocking(False)
        transmission = Transmission(ours, export, style=ReplyStyle.SIMPLE, contexts=(), peer="test")
        transmission.start(b"")
        assert not export.borrowers
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, request(READ, 0, MIB))
        data = b""
        while len(data) < 16 + MIB:
            data += await loop.sock_recv(client, MIB)
        assert data[16:] == export.content[:MIB]
        assert not export.lent
        client.close()
        await transmission.closed
        ours.close()

    asyncio.run(main())
