"""Long WRITEs that are written piece by piece while they arrive."""

import asyncio
import errno
import os

import pytest

from nbdserve.server.transmission import MAX_REQUESTS, PIECE

from .harness import serve, settle
from .memory_export import MemoryExport
from .nbd_client import FUA, READ, WRITE, request

MIB = 1 << 20


class Pieces(MemoryExport):
    """Notes the pieces; ``refuse_from`` and ``fail_from`` are offsets."""

    def __init__(self, size=8 * MIB, *, refuse_from=None, fail_from=None):
        super().__init__(size=size)
        self.pieces = []
        self.refuse_from = refuse_from
        self.fail_from = fail_from

    def try_write(self, offset, data):
        if self.refuse_from is not None and offset + len(data) > self.refuse_from:
            return False
        if self.fail_from is not None and offset + len(data) > self.fail_from:
            raise OSError(errno.ENOSPC, "no space left")
        self.pieces.append((offset, len(data)))
        return super().try_write(offset, data)


async def send_slowly(client, message, step):
    for start in range(0, len(message), step):
        client.writer.write(message[start : start + step])
        await client.writer.drain()
        await asyncio.sleep(0)


@pytest.mark.parametrize("step", [5_000, 100_000, PIECE, 3 * MIB])
@pytest.mark.parametrize(
    ("offset", "size"), [(0, MIB), (4096 + 7, MIB), (3, PIECE + 1), (9, 3 * MIB)]
)
def test_a_long_write_is_cut_and_whole(step, offset, size):
    async def test(harness):
        export = harness.export
        client = await harness.connect()
        data = os.urandom(size)
        message = request(WRITE, offset, data=data, cookie=3)
        await send_slowly(client, message + request(READ, offset, size, cookie=4), step)
        assert (await client.reply()).cookie == 3
        client.lengths[4] = size
        reply = await client.reply()
        assert (reply.cookie, reply.data) == (4, data)
        assert b"".join((bytes(offset), data)) == export.content[: offset + size]
        assert sum(length for _, length in export.pieces) == size
        if step <= PIECE and size >= MIB:
            assert len(export.pieces) > 1
            assert all(at % PIECE == 0 for at, _ in export.pieces[1:])

    serve(test, Pieces())


@pytest.mark.parametrize("refuse_from", [0, PIECE, 5 * PIECE])
@pytest.mark.parametrize("flags", [0, FUA])
def test_what_is_refused_of_it_becomes_a_task(refuse_from, flags):
    async def test(harness):
        export = harness.export
        client = await harness.connect()
        data = os.urandom(MIB)
        await send_slowly(client, request(WRITE, 0, data=data, flags=flags, cookie=3), 50_000)
        reply = await client.reply()
        assert (reply.cookie, reply.error) == (3, 0)
        assert export.content[:MIB] == data
        calls = [call for call in export.calls if call[0] in ("write", "flush")]
        rest = ("write", refuse_from, MIB - refuse_from)
        assert calls == ([rest, ("flush", 0, 0)] if flags else [rest])
        assert (await client.call(READ, 5, 100)).data == data[5:105]

    serve(test, Pieces(refuse_from=refuse_from))


def test_fua_is_answered_after_a_flush():
    async def test(harness):
        client = await harness.connect()
        harness.export.gate = asyncio.Event()
        await send_slowly(client, request(WRITE, 0, data=bytes(MIB), flags=FUA, cookie=3), 50_000)
        await settle(lambda: harness.export.waiting)
        assert harness.export.calls[-1] == ("flush", 0, 0)
        assert (await client.call(READ, 0, 10, cookie=4)).cookie == 4
        harness.export.gate.set()
        assert (await client.reply()).cookie == 3

    serve(test, Pieces())


@pytest.mark.parametrize("fail_from", [0, 3 * PIECE])
def test_an_error_in_the_middle_reads_past_the_rest(fail_from):
    async def test(harness):
        client = await harness.connect()
        message = request(WRITE, 0, data=os.urandom(MIB), cookie=3)
        await send_slowly(client, message + request(READ, 4 * MIB, 50, cookie=4), 70_000)
        reply = await client.reply()
        assert (reply.cookie, reply.error) == (3, errno.ENOSPC)
        client.lengths[4] = 50
        reply = await client.reply()
        assert (reply.cookie, reply.data) == (4, bytes(50))
        assert sum(length for _, length in harness.export.pieces) == fail_from

    serve(test, Pieces(fail_from=fail_from))


def test_a_client_that_vanishes_in_the_middle():
    async def test(harness):
        client = await harness.connect()
        client.writer.write(request(WRITE, 0, data=bytes(MIB))[: MIB // 2])
        await settle(lambda: len(harness.export.pieces) >= 3)
        client.close()
        await harness.no_connections()
        other = await harness.connect()
        assert (await other.call(WRITE, 0, data=b"x" * MIB)).error == 0

    serve(test, Pieces())


def test_a_stalled_stream_goes_on():
    """Its rest needs memory that other tasks have; when they end it is written."""

    async def test(harness):
        export = harness.export
        client = await harness.connect()
        export.gate = asyncio.Event()
        export.refuse_from = 0
        for cookie in range(40):
            client.send(WRITE, MIB, data=bytes(MIB), cookie=cookie)
        await settle(lambda: export.waiting_bytes >= 30 * MIB)
        await settle()
        assert export.waiting < 40
        export.gate.set()
        assert {(await client.reply()).cookie for _ in range(40)} == set(range(40))

    serve(test, Pieces())


def test_flushes_of_many_long_writes_are_bounded():
    """As many as may run at once wait for a slow disk, however many the client sends."""

    async def test(harness):
        export = harness.export
        client = await harness.connect()
        export.gate = asyncio.Event()
        size = PIECE + 4096
        wanted = 2 * MAX_REQUESTS

        async def send():
            for cookie in range(wanted):
                message = request(WRITE, 0, data=bytes(size), flags=FUA, cookie=cookie)
                await send_slowly(client, message, size // 2)

        sending = asyncio.create_task(send())
        await settle(lambda: export.waiting > MAX_REQUESTS)
        await asyncio.sleep(0.5)
        assert MAX_REQUESTS - 1 <= export.waiting <= MAX_REQUESTS
        export.gate.set()
        assert {(await client.reply()).cookie for _ in range(wanted)} == set(range(wanted))
        await sending
        assert export.most_waiting <= MAX_REQUESTS

    serve(test, Pieces())
