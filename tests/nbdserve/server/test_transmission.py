"""The transmission phase over real sockets: what is answered, in which order, and its bounds."""

import asyncio
import errno
import os
import socket

import pytest

from nbdserve.server.transmission import MAX_BYTES, MAX_REQUESTS

from .harness import serve, settle
from .memory_export import BLOCK, MemoryExport
from .nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EXTENDED,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    SIMPLE,
    STRUCTURED,
    STYLES,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    extents,
    request,
)

MIB = 1 << 20
both_replies = pytest.mark.parametrize("style", STYLES)
both_ways = pytest.mark.parametrize("slow", [False, True], ids=["in place", "as tasks"])


def refusing(slow, **options):
    export = MemoryExport(**options)
    export.refuse_reads = export.refuse_writes = slow
    return export


@both_replies
@both_ways
@pytest.mark.parametrize("size", [1, 511, 4096, 100_000, MIB, MIB + 1, 3 * MIB, 32 * MIB])
def test_write_and_read_back(style, slow, size):
    async def test(harness):
        client = await harness.connect(style=style)
        data = os.urandom(size)
        assert (await client.call(WRITE, 7, data=data)).error == 0
        reply = await client.call(READ, 7, size)
        assert (reply.error, reply.data) == (0, data)

    serve(test, refusing(slow, size=size + 10))


@both_replies
@both_ways
def test_each_command(style, slow):
    async def test(harness):
        client = await harness.connect(style=style)
        export = harness.export
        await client.call(WRITE, 0, data=b"x" * 65536)
        assert (await client.call(WRITE, 0, data=b"y" * 10, flags=FUA)).error == 0
        assert export.calls[-1][0] == "flush"
        for command, flags, name in [
            (TRIM, 0, "trim"),
            (CACHE, 0, "cache"),
            (CACHE, FUA, "cache"),
            (WRITE_ZEROES, 0, "write_zeroes"),
            (WRITE_ZEROES, NO_HOLE, "write_zeroes no_hole"),
        ]:
            export.calls.clear()
            assert (await client.call(command, 4096, 8192, flags=flags)).error == 0
            assert export.calls[0] == (name, 4096, 8192)
        for command in (TRIM, WRITE_ZEROES):
            export.calls.clear()
            await client.call(command, 4096, 8192, flags=FUA)
            assert [call[0] for call in export.calls][1:] == ["flush"]
        export.calls.clear()
        assert (await client.call(FLUSH, flags=FUA)).error == 0
        assert export.calls == [("flush", 0, 0)]
        assert (await client.call(READ, 0, 12)).data == b"y" * 10 + b"xx"

    serve(test, refusing(slow))


@both_replies
@both_ways
def test_what_is_answered_was_noted(style, slow):
    async def test(harness):
        client = await harness.connect(style=style)
        export = harness.export
        for command, flags, more in [
            (WRITE, 0, {"data": b"a" * 4096}),
            (WRITE, FUA, {"data": b"b" * 65536}),
            (WRITE, 0, {"data": b"c" * (700 << 10)}),
            (TRIM, 0, {"length": 4096}),
            (WRITE_ZEROES, 0, {"length": 4096}),
        ]:
            await client.call(command, 4096, flags=flags, **more)
            assert export.noted

    serve(test, refusing(slow))


@both_replies
def test_requests_of_no_bytes_succeed(style):
    async def test(harness):
        client = await harness.connect(style=style)
        for command in (READ, WRITE, TRIM, CACHE, WRITE_ZEROES):
            for flags in (0, FUA):
                reply = await client.call(command, 100, 0, flags=flags)
                assert (reply.error, reply.data) == (0, b"")
        assert {call[0] for call in harness.export.calls} <= {"flush"}

    serve(test)


@both_replies
def test_refusals_carry_the_specified_error_and_keep_the_stream_in_step(style):
    size = 1 << 20
    cases = [
        (READ, size - 1, 2, 0, errno.EINVAL),
        (READ, 2**64 - 1, 2**32 - 1, 0, errno.EINVAL),
        (READ, 0, 512, NO_HOLE, errno.EINVAL),
        (TRIM, size, 1, 0, errno.EINVAL),
        (CACHE, size, 1, 0, errno.EINVAL),
        (WRITE_ZEROES, size, 1, 0, errno.ENOSPC),
        (WRITE_ZEROES, 0, 1, NO_HOLE | FAST_ZERO, errno.ENOTSUP),
        (BLOCK_STATUS, size, 1, 0, errno.EINVAL),
        (FLUSH, 0, 1, 0, errno.EINVAL),
        (99, 0, 0, 0, errno.EINVAL),
    ]

    async def test(harness):
        client = await harness.connect(style=style)
        for command, offset, length, flags, error in cases:
            reply = await client.call(command, offset, length, flags=flags, cookie=offset)
            assert (reply.error, reply.cookie) == (error, offset)
            assert bool(reply.message) == (style is not SIMPLE)
        for payload in (1, 5000, 2 * MIB):
            data = request(READ) * (payload // 28) + b"\xff" * (payload % 28)
            reply = await client.call(WRITE, size - 1, data=data + b"?")
            assert reply.error == errno.ENOSPC
            reply = await client.call(WRITE, 0, data=data, flags=DF)
            assert reply.error == errno.EINVAL
            assert (await client.call(READ, 0, 3)).data == bytes(3)
        assert harness.export.content == bytes(size)

    serve(test)


def test_payload_beyond_the_largest_is_refused_and_read_past():
    async def test(harness):
        client = await harness.connect()
        assert (await client.call(READ, 0, 32 * MIB + 1)).error == errno.EOVERFLOW
        client.send(WRITE, 0, 32 * MIB + 1)
        for _ in range(32):
            client.writer.write(bytes(MIB))
            await client.writer.drain()
        await settle()
        assert client.writer.transport.get_write_buffer_size() == 0
        client.writer.write(b"\0")
        assert (await client.reply()).error == errno.EINVAL
        assert (await client.call(READ, 0, 1)).error == 0

    serve(test, MemoryExport(size=40 * MIB))


def test_read_only_export():
    async def test(harness):
        client = await harness.connect("disk@one")
        for command in (TRIM, WRITE_ZEROES):
            assert (await client.call(command, 0, 512)).error == errno.EPERM
        for size in (1, 512, 2 * MIB):
            assert (await client.call(WRITE, 0, data=b"x" * size)).error == errno.EPERM
        assert (await client.call(FLUSH)).error == 0
        assert (await client.call(READ, 0, 512)).data == bytes(512)

    serve(test, MemoryExport("disk@one", size=4 * MIB, read_only=True))


@both_ways
def test_holes_are_sent_as_holes(slow):
    async def test(harness):
        client = await harness.connect()
        harness.export.held = {1, 2, 5}
        harness.export.content[BLOCK : 3 * BLOCK] = b"a" * 2 * BLOCK
        harness.export.content[5 * BLOCK : 6 * BLOCK] = b"b" * BLOCK
        reply = await client.call(READ, 100, 8 * BLOCK)
        assert [kind for kind, _ in reply.chunks] == [2, 1, 2, 1, 2]
        assert reply.data == harness.export.content[100 : 100 + 8 * BLOCK]
        reply = await client.call(READ, 100, 8 * BLOCK, flags=DF)
        assert [kind for kind, _ in reply.chunks] == [1]
        assert reply.data == harness.export.content[100 : 100 + 8 * BLOCK]
        reply = await client.call(READ, 6 * BLOCK, 64 * BLOCK)
        assert [kind for kind, _ in reply.chunks] == [2]
        harness.export.held = set(range(0, 64, 2))
        reply = await client.call(READ, 0, 64 * BLOCK)
        assert [kind for kind, _ in reply.chunks] == [1]
        assert reply.data == harness.export.content[: 64 * BLOCK]

    serve(test, refusing(slow))


def test_block_status():
    async def test(harness):
        client = await harness.connect()
        harness.export.held = {1, 2}
        reply = await client.call(BLOCK_STATUS, 0, 5 * BLOCK)
        assert extents(reply) == [(BLOCK, 3), (2 * BLOCK, 0), (2 * BLOCK, 3)]
        reply = await client.call(BLOCK_STATUS, 10, 5 * BLOCK, flags=REQ_ONE)
        assert extents(reply) == [(BLOCK - 10, 3)]
        reply = await client.call(BLOCK_STATUS, 0, 0)
        assert reply.error == errno.EINVAL

    serve(test)


@pytest.mark.parametrize("style", STYLES)
def test_block_status_without_a_context(style):
    async def test(harness):
        client = await harness.connect(style=style, contexts=())
        assert (await client.call(BLOCK_STATUS, 0, 512)).error == errno.EINVAL

    serve(test)


@both_replies
@both_ways
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "Quota exceeded"), errno.ENOSPC),
        (OSError(errno.EIO, "Input/output error"), errno.EIO),
        (ValueError("a fault of ours"), errno.EIO),
    ],
)
def test_errors_of_the_export(style, slow, error, expected):
    async def test(harness):
        client = await harness.connect(style=style)
        harness.export.error = error
        lengths = {READ: [512, 65536, 3 * MIB], WRITE: [512, 3 * MIB]}
        for command in (READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
            if command == BLOCK_STATUS and style is SIMPLE:
                continue
            for length in lengths.get(command, [0 if command == FLUSH else 512]):
                data = b"x" * length if command == WRITE else b""
                for flags in (0, FUA):
                    reply = await client.call(command, 0, length, data=data, flags=flags)
                    assert (reply.error, reply.data) == (expected, b"")
                    assert bool(reply.message) == (style is not SIMPLE)
                    assert "fault" not in reply.message
        harness.export.error = None
        assert (await client.call(READ, 0, 512)).error == 0

    serve(test, refusing(slow, size=4 * MIB))


@both_replies
def test_a_slow_read_holds_up_nothing(style):
    async def test(harness):
        export = harness.export
        export.gate, export.gated = asyncio.Event(), 4096
        export.refuse_reads = True
        client = await harness.connect(style=style)
        client.send(READ, 4096, 512, cookie=1)
        client.send(WRITE, 0, data=b"x" * 512, cookie=2)
        client.send(READ, 0, 512, cookie=3)
        client.send(FLUSH, cookie=4)
        found = [await client.reply() for _ in range(3)]
        assert sorted(reply.cookie for reply in found) == [2, 3, 4]
        assert export.waiting == 1
        other = await harness.connect(style=style)
        assert (await other.call(READ, 0, 1)).data == b"x"
        export.gate.set()
        reply = await client.reply()
        assert (reply.cookie, reply.error, reply.data) == (1, 0, bytes(512))

    serve(test)


def test_slow_operations_run_at_the_same_time():
    async def test(harness):
        harness.export.gate = asyncio.Event()
        client = await harness.connect()
        for cookie in range(100):
            client.send(WRITE, cookie * 512, data=bytes([cookie]) * 512, cookie=cookie)
        await settle(lambda: harness.export.waiting == 100)
        assert harness.export.waiting == 100
        harness.export.gate.set()
        assert {(await client.reply()).cookie for _ in range(100)} == set(range(100))
        assert harness.export.content[99 * 512 : 100 * 512] == b"c" * 512

    serve(test, refusing(True))


@pytest.mark.parametrize("size", [512, 2 * MIB])
def test_disconnect_behind_pipelined_writes_finishes_and_answers_them(size):
    async def test(harness):
        harness.export.gate = asyncio.Event()
        client = await harness.connect()
        for cookie in range(10):
            client.send(WRITE, cookie * size, data=b"w" * size, cookie=cookie)
        client.send(DISC)
        await settle(lambda: harness.export.waiting == 10)
        assert harness.registry.closed == 0
        harness.export.gate.set()
        found = [await client.reply() for _ in range(10)]
        assert sorted((reply.cookie, reply.error) for reply in found) == [
            (cookie, 0) for cookie in range(10)
        ]
        assert await client.at_end() == b""
        await harness.no_connections()
        assert harness.registry.closed == 1
        assert harness.export.content == b"w" * 10 * size

    serve(test, refusing(True, size=10 * size))


def test_end_of_stream_answers_what_was_sent():
    async def test(harness):
        harness.export.gate = asyncio.Event()
        client = await harness.connect()
        client.send(WRITE, 0, data=b"abc", cookie=5)
        client.writer.write(request(WRITE, 0, 100)[:20])  # cut off
        client.writer.write_eof()
        await settle(lambda: harness.export.waiting == 1)
        harness.export.gate.set()
        assert (await client.reply()).cookie == 5
        assert await client.at_end() == b""

    serve(test, refusing(True))


def test_nothing_behind_disconnect_is_carried_out():
    async def test(harness):
        client = await harness.connect()
        client.writer.write(request(DISC) + request(WRITE, data=b"late"))
        assert await client.at_end() == b""
        assert harness.export.content == bytes(harness.export.size)

    serve(test)


def test_wrong_magic_drops_the_connection(caplog):
    async def test(harness):
        client = await harness.connect()
        await client.call(READ, 0, 1)
        client.writer.write(b"\0" * 28 + request(WRITE, data=b"late"))
        assert await client.at_end() == b""
        await harness.no_connections()
        assert harness.export.content == bytes(harness.export.size)

    serve(test)
    assert not [record for record in caplog.records if record.exc_info]


@both_replies
@pytest.mark.parametrize("length", [4096, 65536, MIB])
def test_client_that_never_reads_stops_being_served(style, length):
    """In place: the answers pile up in the output buffer and nowhere else."""

    async def test(harness):
        client = await harness.connect(style=style)
        harness.export.held = set(range(2 * MIB // BLOCK))
        requests = 64 * MIB // length
        for cookie in range(requests):
            client.send(READ, 0, length, cookie=cookie)
        await settle()
        done = sum(size for call, _, size in harness.export.calls if call == "try_read")
        assert done < 8 * MIB  # the server's buffer, and those of the socket and the client
        found = {(await client.reply()).cookie for _ in range(requests)}
        assert found == set(range(requests))

    serve(test, MemoryExport(size=2 * MIB))


@pytest.mark.parametrize("length", [512, 65536, MIB, 8 * MIB, 32 * MIB])
def test_reads_in_flight_are_bounded(length):
    async def test(harness):
        client = await harness.connect()
        harness.export.held = set(range(40 * MIB // BLOCK))
        requests = max(600, MAX_BYTES // length * 3) if length < 8 * MIB else 12
        requests = min(requests, 1000) if length < MIB else min(requests, 100)
        for cookie in range(requests):
            client.send(READ, 0, length, cookie=cookie)
        await settle()
        export = harness.export
        assert export.most_waiting <= MAX_REQUESTS
        assert export.most_waiting_bytes <= MAX_BYTES
        reads = sum(size for call, _, size in export.calls if call == "read")
        assert reads <= 2 * MAX_BYTES + 8 * MIB
        for _ in range(requests):
            assert (await client.reply()).error == 0

    serve(test, refusing(True, size=40 * MIB))


@pytest.mark.parametrize("length", [512, 65536, 3 * MIB, 32 * MIB])
def test_writes_in_flight_are_bounded(length):
    async def test(harness):
        harness.export.gate = asyncio.Event()
        client = await harness.connect()
        requests = 600 if length < MIB else 40 if length < 32 * MIB else 3
        for cookie in range(requests):
            client.send(WRITE, 0, data=b"x" * length, cookie=cookie)
        await settle()
        assert 0 < harness.export.waiting <= MAX_REQUESTS
        most = max(MAX_BYTES, length)
        assert harness.export.waiting_bytes <= most
        harness.export.gate.set()
        assert {(await client.reply()).cookie for _ in range(requests)} == set(range(requests))
        assert harness.export.most_waiting_bytes <= most

    serve(test, refusing(True, size=32 * MIB))


def test_small_requests_of_a_client_that_never_reads_are_bounded():
    async def test(harness):
        harness.export.held = set(range(0, 1024, 2))
        client = await harness.connect()
        requests = 3000
        for cookie in range(requests):
            client.send(BLOCK_STATUS, 0, 4 * MIB, cookie=cookie)
        await settle()
        served = len(harness.export.calls)
        assert served * 8192 < MAX_BYTES + 8 * MIB
        client.send(DISC)
        found = {(await client.reply()).cookie for _ in range(requests)}
        assert found == set(range(requests))

    serve(test, MemoryExport(size=4 * MIB))


def test_revoked_while_a_read_runs():
    async def test(harness):
        harness.export.gate = asyncio.Event()
        client = await harness.connect()
        client.send(READ, 0, 512)
        await settle(lambda: harness.export.waiting == 1)
        harness.registry.revokes[0]()
        assert await client.at_end() == b""
        await settle()
        assert harness.registry.closed == 0  # not while the read still runs on it
        harness.export.gate.set()
        await harness.no_connections()
        assert harness.registry.closed == 1
        harness.registry.revokes[0]()  # too late, harmless

    serve(test, refusing(True))


def test_client_that_vanishes():
    async def test(harness):
        harness.export.gate = asyncio.Event()
        client = await harness.connect()
        for cookie in range(20):
            client.send(READ, 0, MIB, cookie=cookie)
        await settle(lambda: harness.export.waiting == 20)
        client.close()
        harness.export.gate.set()
        await harness.no_connections()
        assert harness.registry.closed == 1

    serve(test, refusing(True))


def test_export_that_grows_can_be_used_to_its_new_end():
    async def test(harness):
        client = await harness.connect()
        assert (await client.call(READ, 1 << 20, 512)).error == errno.EINVAL
        harness.export.content += bytes(1 << 20)
        harness.export.size *= 2
        assert (await client.call(READ, 1 << 20, 512)).error == 0

    serve(test)


@both_replies
def test_client_that_reads_while_the_server_sends(style):
    """Room may come at any moment, also between the send that found none and the wait for it."""
    requests = 300

    def read_all(sock):
        sock.setblocking(True)
        sock.settimeout(5)
        header = {SIMPLE: 16, STRUCTURED: 28, EXTENDED: 40}[style]
        missing = requests * (header + MIB)
        memory = bytearray(256 << 10)
        while missing:
            received = sock.recv_into(memory)
            assert received
            missing -= received

    async def test(harness):
        client = await harness.connect(style=style)
        harness.export.held = set(range(MIB // BLOCK))
        sock = socket.socket(fileno=os.dup(client.writer.get_extra_info("socket").fileno()))
        reading = asyncio.to_thread(read_all, sock)
        client.writer.transport.pause_reading()
        for cookie in range(requests):
            client.send(READ, 0, MIB, cookie=cookie)
        await reading
        sock.close()

    serve(test)


def test_flood_of_small_requests_lets_others_have_their_turn():
    async def test(harness):
        client = await harness.connect()
        loop = asyncio.get_running_loop()
        most = seen = 0

        def count():
            nonlocal most, seen
            most = max(most, len(harness.export.calls) - seen)
            seen = len(harness.export.calls)
            turn[0] = loop.call_soon(count)

        turn = [loop.call_soon(count)]
        requests = 10_000
        client.writer.write(request(READ, 0, 1) * requests)
        client.lengths = dict.fromkeys(range(requests), 1)
        for _ in range(requests):
            assert (await client.reply()).error == 0
        turn[0].cancel()
        assert len(harness.export.calls) == requests
        assert most <= 1024

    serve(test)
