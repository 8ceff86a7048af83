"""Extended headers, several metadata contexts, and BLOCK_STATUS with a payload, over a socket."""

import asyncio
import errno
import struct
from typing import ClassVar

import pytest

from nbdserve.protocol.constants import MAX_PAYLOAD

from .harness import serve
from .memory_export import BLOCK, MemoryExport
from .nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    EXTENDED,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    statuses,
)

CONTEXTS = ("base:allocation", "x-test:parity", "x-test:wide")
TIB = 1 << 40


class Wide(MemoryExport):
    """Says that it is huge; only its beginning may be read and written."""

    def __init__(self):
        super().__init__()
        self.size = 8 * TIB

    def extents(self, offset, length, limit):
        return [(length, False)]

    async def trim(self, offset, length):
        await self._pass("trim", offset, length)

    async def write_zeroes(self, offset, length, *, no_hole):
        await self._pass("write_zeroes", offset, length)


def test_every_reply_has_an_extended_header():
    async def test(harness):
        client = await harness.connect(style=EXTENDED)
        for command in (WRITE, READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
            data = b"x" * 512 if command == WRITE else b""
            length = 0 if command == FLUSH else 512
            offset = 0 if command == FLUSH else 1024
            reply = await client.call(command, offset, length, data=data)
            assert reply.error == 0
            assert len(reply.chunks) == 1
        assert (await client.call(READ, 99, 0)).chunks == ((0, b""),)
        assert (await client.call(WRITE, 99, 0)).chunks == ((0, b""),)
        assert (await client.call(WRITE, 99, data=b"y", flags=FUA)).chunks == ((0, b""),)
        assert (await client.call(77, 99, 1)).error == errno.EINVAL
        client.send(DISC)
        assert await client.at_end() == b""

    serve(test)


def test_effects_have_64_bits():
    async def test(harness):
        client = await harness.connect(style=EXTENDED)
        size = harness.export.size
        for command in (TRIM, WRITE_ZEROES, CACHE):
            harness.export.calls.clear()
            if command != CACHE:
                assert (await client.call(command, 4096, size - 4096)).error == 0
                assert harness.export.calls[0][1:] == (4096, size - 4096)
        ((_, descriptors),) = statuses(await client.call(BLOCK_STATUS, 0, size))
        assert descriptors == [(size, 3)]
        assert (await client.call(TRIM, 4096, size)).error == errno.EINVAL
        assert (await client.call(WRITE_ZEROES, 1, 2**64 - 1)).error == errno.ENOSPC
        assert (await client.call(READ, 0, 1 << 33)).error == errno.EOVERFLOW

    serve(test, Wide())


def test_fast_zero():
    async def test(harness):
        client = await harness.connect()
        reply = await client.call(WRITE_ZEROES, 0, 4096, flags=FAST_ZERO)
        assert reply.error == 0
        assert harness.export.calls == [("write_zeroes", 0, 4096)]
        reply = await client.call(WRITE_ZEROES, 0, 4096, flags=FAST_ZERO | NO_HOLE)
        assert reply.error == errno.ENOTSUP
        assert len(harness.export.calls) == 1

    serve(test)


@pytest.mark.parametrize("size", [1, 77, 5000, 3 << 20])
@pytest.mark.parametrize("command", [READ, TRIM, CACHE, WRITE_ZEROES, FLUSH, 99])
def test_payloads_that_do_not_belong_are_read_past(command, size):
    async def test(harness):
        client = await harness.connect(style=EXTENDED)
        data = b"\x21\xe4\x1c\x71" * (size // 4) + b"x" * (size % 4)
        reply = await client.call(command, 0, data=data)
        assert reply.error == errno.EINVAL
        assert (await client.call(READ, 0, 5)).data == bytes(5)

    serve(test)


@pytest.mark.parametrize("size", [512, 300_000])
def test_write_without_payload_len_as_qemu_sends_it(size):
    async def test(harness):
        client = await harness.connect(style=EXTENDED)
        data = bytes(range(1, 251)) * (size // 250 + 1)
        client.writer.write(struct.pack(">IHHQQQ", 0x21E41C71, 0, WRITE, 5, 0, size) + data[:size])
        reply = await client.reply()
        assert (reply.cookie, reply.error) == (5, 0)
        assert (await client.call(READ, 0, size)).data == data[:size]

    serve(test)


@pytest.mark.parametrize("command", [WRITE, READ, BLOCK_STATUS])
@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 2**32, 2**64 - 1])
def test_a_payload_that_is_too_large_ends_the_connection(command, length):
    async def test(harness):
        client = await harness.connect(style=EXTENDED)
        assert (await client.call(WRITE, 0, data=b"before")).error == 0
        client.send(WRITE, 6, data=b"also", cookie=2)
        header = struct.pack(">IHHQQQ", 0x21E41C71, PAYLOAD_LEN, command, 3, 0, length)
        client.writer.write(header + b"x" * 100)
        assert (await client.reply()).cookie == 2
        assert await client.at_end() == b""
        assert harness.export.content[:10] == b"beforealso"

    serve(test)


def test_compact_and_extended_requests_are_not_mixed():
    async def test(harness):
        client = await harness.connect(style=EXTENDED)
        client.writer.write(struct.pack(">IHHQQI", 0x25609513, 0, READ, 1, 0, 512) + bytes(9))
        assert await client.at_end() == b""
        client = await harness.connect(style=STRUCTURED)
        client.writer.write(struct.pack(">IHHQQQ", 0x21E41C71, 0, READ, 1, 0, 512))
        assert await client.at_end() == b""

    serve(test)


@pytest.mark.parametrize("style", [STRUCTURED, EXTENDED])
def test_one_chunk_for_each_context(style):
    async def test(harness):
        client = await harness.connect(style=style, contexts=CONTEXTS)
        await client.call(WRITE, BLOCK, data=b"x")
        found = statuses(await client.call(BLOCK_STATUS, 0, 3 * BLOCK))
        assert found == [
            (1, [(BLOCK, 3), (BLOCK, 0), (BLOCK, 3)]),
            (2, [(BLOCK, 0), (BLOCK, 1), (BLOCK, 0)]),
            (3, [(3 * BLOCK, 5)]),
        ]
        first = statuses(await client.call(BLOCK_STATUS, 100, 3 * BLOCK, flags=REQ_ONE))
        assert first == [(1, [(BLOCK - 100, 3)]), (2, [(BLOCK - 100, 0)]), (3, [(3 * BLOCK, 5)])]
        harness.export.error = OSError(errno.EIO, "Input/output error")
        reply = await client.call(BLOCK_STATUS, 0, BLOCK)
        assert reply.error == errno.EIO
        assert len(reply.chunks) == 1

    serve(test)


def test_contexts_that_were_not_chosen_are_not_reported():
    async def test(harness):
        client = await harness.connect(contexts=("x-test:wide",))
        assert statuses(await client.call(BLOCK_STATUS, 0, BLOCK)) == [(1, [(BLOCK, 5)])]

    serve(test)


def payload(length, *contexts):
    return struct.pack(f">Q{len(contexts)}I", length, *contexts)


def test_status_payload_chooses_contexts():
    async def test(harness):
        client = await harness.connect(style=EXTENDED, contexts=CONTEXTS)
        for wanted in ((2,), (3, 1), (3, 2, 1)):
            data = payload(BLOCK, *wanted)
            found = statuses(await client.call(BLOCK_STATUS, BLOCK, data=data))
            assert [context for context, _ in found] == sorted(wanted)
        data = payload(4 * BLOCK, 2)
        one = statuses(await client.call(BLOCK_STATUS, 0, data=data, flags=REQ_ONE))
        assert one == [(2, [(BLOCK, 0)])]

    serve(test)


@pytest.mark.parametrize(
    "data",
    [
        payload(BLOCK, 4),
        payload(BLOCK, 0),
        payload(BLOCK, 1, 1),
        payload(BLOCK),
        payload(0, 1),
        payload(2**64 - 1, 1),
        payload(BLOCK, 1)[:-1],
        payload(BLOCK, 1) + b"?",
        payload(BLOCK, 1, 2, 3, 4),
        payload(BLOCK, *range(5000)),
        b"?",
    ],
)
def test_wrong_status_payloads_are_refused(data):
    async def test(harness):
        client = await harness.connect(style=EXTENDED, contexts=CONTEXTS)
        assert (await client.call(BLOCK_STATUS, 0, data=data)).error == errno.EINVAL
        assert (await client.call(READ, 0, 5)).data == bytes(5)

    serve(test)


def test_expensive_statuses_leave_turns_to_others():
    """One context in a turn of the loop, however many requests ask for however many."""
    turns = 0

    class Expensive(MemoryExport):
        asked: ClassVar[list[int]] = []

        def status(self, context, offset, length, limit):
            self.asked.append(turns)
            return super().status(context, offset, length, limit)

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def test(harness):
        client = await harness.connect(style=EXTENDED, contexts=CONTEXTS)
        counting = asyncio.ensure_future(count())
        for cookie in range(100):
            client.send(BLOCK_STATUS, 0, 64 * BLOCK, cookie=cookie)
        replies = [await client.reply() for _ in range(100)]
        counting.cancel()
        assert {reply.cookie for reply in replies} == set(range(100))
        assert all(len(statuses(reply)) == 3 for reply in replies)
        assert len(Expensive.asked) == 200
        assert len(set(Expensive.asked)) == 200

    serve(test, Expensive())
