"""READs beyond what is read in place: in chunks as the client takes them, or as a whole."""

import asyncio
import errno
import struct

import pytest

from nbdserve.server.transmission import MAX_BYTES, MAX_IN_PLACE, MAX_LONG_READS

from .harness import serve, settle
from .memory_export import BLOCK, MemoryExport
from .nbd_client import DF, DISC, EXTENDED, READ, SIMPLE, STRUCTURED

MIB = 1 << 20
SIZE = 32 * MIB
both_chunked = pytest.mark.parametrize("style", [STRUCTURED, EXTENDED])


def full(size=SIZE):
    """An export that holds data everywhere, different in every block."""
    export = MemoryExport(size=size)
    export.held = set(range(size // BLOCK))
    for block in range(size // BLOCK):
        struct.pack_into(">Q", export.content, block * BLOCK, block + 1)
    return export


@both_chunked
def test_chunks_are_whole_pieces_in_order(style):
    async def test(harness):
        client = await harness.connect(style=style)
        offset, length = 7, 5 * MIB + 3
        reply = await client.call(READ, offset, length)
        assert reply.data == harness.export.content[offset : offset + length]
        places = [struct.unpack_from(">Q", payload)[0] for _, payload in reply.chunks]
        assert places == [offset + index * MAX_IN_PLACE for index in range(6)]

    serve(test, full())


@both_chunked
def test_holes_are_not_cut(style):
    async def test(harness):
        export = harness.export
        export.held -= set(range(MIB // BLOCK, 20 * MIB // BLOCK))
        export.content[MIB : 20 * MIB] = bytes(19 * MIB)
        client = await harness.connect(style=style)
        reply = await client.call(READ, 0, 22 * MIB)
        assert reply.data == export.content[: 22 * MIB]
        assert [(kind, len(payload)) for kind, payload in reply.chunks] == [
            (1, MIB + 8),
            (2, 12),
            (1, MIB + 8),
            (1, MIB + 8),
        ]
        hole = await client.call(READ, MIB, 19 * MIB)
        assert hole.chunks == ((2, struct.pack(">QI", MIB, 19 * MIB)),)

    serve(test, full())


@both_chunked
def test_chunks_of_holes_do_not_overtake_those_of_data(style):
    async def test(harness):
        export = harness.export
        export.held -= set(range(16, SIZE // BLOCK)) - set(range(32, 48))
        for block in set(range(SIZE // BLOCK)) - export.held:
            export.content[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
        client = await harness.connect(style=style)
        reply = await client.call(READ, 0, 2 * MIB)
        assert reply.data == export.content[: 2 * MIB]
        assert [kind for kind, _ in reply.chunks] == [1, 2, 1, 2]

    serve(test, full())


@pytest.mark.parametrize(("style", "flags"), [(SIMPLE, 0), (STRUCTURED, DF), (EXTENDED, DF)])
def test_what_must_not_be_cut_comes_as_a_whole(style, flags):
    async def test(harness):
        client = await harness.connect(style=style)
        reply = await client.call(READ, 5, SIZE - 5, flags=flags)
        assert reply.data == harness.export.content[5:]
        assert len(reply.chunks) == (style is not SIMPLE)

    serve(test, full())


@both_chunked
def test_a_client_that_takes_nothing_costs_the_memory_of_pieces(style):
    async def test(harness):
        client = await harness.connect(style=style)
        for cookie in range(20):
            client.send(READ, 0, SIZE, cookie=cookie)
        await settle()
        export = harness.export
        # Read, but not sent: one piece a READ and what the queue may hold; and the socket's buffer.
        pieces = sum(1 for what, _, _ in export.calls if what == "read")
        assert MAX_LONG_READS <= pieces <= 2 * MAX_LONG_READS + 4
        assert export.most_waiting_bytes <= MAX_LONG_READS * MAX_IN_PLACE <= MAX_BYTES
        client.send(DISC)
        for _ in range(20):
            assert (await client.reply()).data == export.content
        assert await client.at_end() == b""

    serve(test, full())


@both_chunked
def test_an_error_in_the_middle_ends_the_reply(style):
    async def test(harness):
        export = harness.export
        reads = export.read

        async def fail_in_the_middle(offset, buffer):
            if offset >= 3 * MIB:
                raise OSError(errno.EIO, "Input/output error")
            await reads(offset, buffer)

        export.read = fail_in_the_middle
        client = await harness.connect(style=style)
        reply = await client.call(READ, 0, 8 * MIB)
        assert (reply.error, reply.message) == (errno.EIO, "Input/output error")
        assert len(reply.chunks) == 4
        assert (await client.call(READ, 0, 2 * MIB)).data == export.content[: 2 * MIB]

    serve(test, full())


@both_chunked
@pytest.mark.parametrize("held", [False, True])
def test_a_client_that_goes_in_the_middle_leaves_nothing(style, held):
    async def test(harness):
        export = harness.export
        if held:  # while a piece is read; otherwise while nobody takes it
            export.gate = asyncio.Event()
        client = await harness.connect(style=style)
        for cookie in range(6):
            client.send(READ, 0, SIZE, cookie=cookie)
        await settle(lambda: export.calls)
        await settle()
        client.close()
        await asyncio.sleep(0.01)
        if held:
            export.gate.set()
        await harness.no_connections()
        assert len([call for call in export.calls if call[0] == "read"]) < 12

    serve(test, full())


@both_chunked
def test_other_replies_come_between(style):
    async def test(harness):
        client = await harness.connect(style=style)
        client.send(READ, 0, SIZE, cookie=1)
        for cookie in range(2, 50):
            client.send(READ, cookie * BLOCK, BLOCK, cookie=cookie)
        replies = [await client.reply() for _ in range(49)]
        assert {reply.cookie for reply in replies} == set(range(1, 50))
        assert replies[-1].cookie == 1
        for reply in replies[:-1]:
            start = reply.cookie * BLOCK
            assert reply.data == harness.export.content[start : start + BLOCK]

    serve(test, full())
