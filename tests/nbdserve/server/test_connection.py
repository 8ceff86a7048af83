"""Connections from accept to close: handshake, hostile input, the orderly and the forced end."""

import asyncio
import errno
import logging
import socket
import struct
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .harness import serve, settle
from .memory_export import BLOCK, MemoryExport
from .nbd_client import (
    BLOCK_STATUS,
    DISC,
    FLUSH,
    FUA,
    READ,
    SIMPLE,
    STRUCTURED,
    STYLES,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    option,
    request,
    string,
)

GREETING = 18
FLAGS = struct.pack(">I", 3)
GO = option(7, string("disk") + b"\0\0")

hostile = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def no_tracebacks(caplog):
    return not [record for record in caplog.records if record.exc_info]


def test_list_describe_and_open_over_the_socket():
    async def test(harness):
        client = await harness.raw()
        await client.reader.readexactly(GREETING)
        client.writer.write(FLAGS)
        assert await client.option(3) == [string("disk"), string("disk@one")]
        await client.option(8)
        client.style = STRUCTURED
        export, description = await client.option(6, string("disk@one") + b"\0\1\0\2")
        assert struct.unpack(">HQ", export[:10]) == (0, 8192)
        assert description[2:] == b"in memory"
        assert harness.registry.opened == 0
        await client.option(7, string("disk@one") + b"\0\0")
        assert harness.registry.opened == 1
        assert (await client.call(READ, 8190, 2)).data == b"\0\0"

    serve(test, MemoryExport(), MemoryExport("disk@one", 8192, read_only=True))


def test_unknown_export():
    async def test(harness):
        with pytest.raises(AssertionError, match="there is no export 'nothing'"):
            await harness.connect("nothing")
        client = await harness.raw()
        client.writer.write(FLAGS + option(1, b"nothing"))
        assert len(await client.at_end()) == GREETING
        client = await harness.raw()
        client.writer.write(FLAGS + option(2))
        assert (await client.at_end())[GREETING:] == struct.pack(">QIII", 0x3E889045565A9, 2, 1, 0)

    serve(test)


def test_requests_right_behind_the_handshake_are_served():
    async def test(harness):
        client = await harness.raw()
        client.writer.write(FLAGS + option(1, b"disk") + request(WRITE, 5, data=b"hasty"))
        client.writer.write(request(READ, 5, 5, cookie=2) + request(DISC))
        answer = await client.at_end()
        assert (
            answer[GREETING + 10 :]
            == struct.pack(">IIQ", 0x67446698, 0, 1)
            + struct.pack(">IIQ", 0x67446698, 0, 2)
            + b"hasty"
        )

    serve(test)


def test_registry_that_fails_is_an_error_of_the_option(caplog):
    async def test(harness):
        harness.registry._find = lambda name: 1 / 0
        with pytest.raises(AssertionError, match="internal error"):
            await harness.connect(style=SIMPLE)

    serve(test)
    assert not no_tracebacks(caplog)  # a fault of ours is reported


@pytest.mark.parametrize("sent", [b"", FLAGS, FLAGS + GO[:-1], FLAGS + option(9, b"x" * 9)[:-1]])
def test_handshake_that_takes_too_long(sent, caplog):
    caplog.set_level(logging.INFO)

    async def test(harness):
        client = await harness.raw()
        client.writer.write(sent)
        assert len(await client.at_end()) == GREETING
        assert "took too long" in caplog.text

    serve(test, handshake_timeout=0.05)
    assert no_tracebacks(caplog)


def test_slow_opening_does_not_use_up_the_clients_time():
    async def test(harness):
        harness.registry.gate = asyncio.Event()
        opening = asyncio.create_task(harness.connect(style=SIMPLE))
        await asyncio.sleep(0.3)
        harness.registry.gate.set()
        assert (await (await opening).call(READ, 0, 1)).error == 0

    serve(test, handshake_timeout=0.1)


def test_client_that_does_not_read_the_list():
    """Options are answered one after the other: output cannot pile up."""

    async def test(harness):
        asked = []
        harness.registry.list_names = lambda: asked.append(1) or ["x" * 4000] * 100
        client = await harness.raw()
        for _ in range(100):
            client.writer.write(option(3) if asked else FLAGS + option(3) * 50)
        await settle()
        assert len(asked) < 10

    serve(test)


def test_revoked_during_the_handshake_and_right_after():
    async def test(harness):
        harness.registry.gate = asyncio.Event()
        client = await harness.raw()
        client.writer.write(FLAGS + GO)
        await settle()
        harness.registry.gate.set()
        await settle(lambda: harness.registry.revokes)
        harness.registry.revokes[0]()
        await client.at_end()
        await harness.no_connections()
        assert harness.registry.closed == 1

    serve(test)


def test_drain_answers_what_was_received_and_closes():
    async def test(harness):
        harness.export.refuse_writes = True
        harness.export.gate = asyncio.Event()
        busy, idle = await harness.connect(), await harness.connect()
        handshaking = await harness.raw()
        busy.send(WRITE, 0, data=b"in flight", cookie=9)
        await settle(lambda: harness.export.waiting == 1)
        draining = asyncio.create_task(harness.server.drain(10))
        assert await idle.at_end() == b""
        assert len(await handshaking.at_end()) == GREETING
        with pytest.raises(OSError):
            await harness.raw()
        busy.send(WRITE, 100, data=b"too late", cookie=10)
        await settle()
        harness.export.gate.set()
        reply = await busy.reply()
        assert (reply.cookie, reply.error) == (9, 0)
        assert await busy.at_end() == b""
        busy.close()
        assert await draining is True
        assert harness.export.content[:200] == b"in flight" + bytes(191)

    serve(test)


def test_drain_refuses_options_that_come_too_late():
    async def test(harness):
        harness.registry.gate = asyncio.Event()
        client = await harness.raw()
        client.writer.write(FLAGS + option(6, string("nothing") + b"\0\0") + option(3))
        await settle()
        draining = asyncio.create_task(harness.server.drain(10))
        await settle()
        harness.registry.gate.set()
        answer = (await client.at_end())[GREETING:]
        assert b"there is no export 'nothing'" in answer
        assert b"the server is shutting down" in answer
        client.close()
        assert await draining is True

    serve(test)


def test_drain_while_an_export_is_opened():
    async def test(harness):
        harness.registry.gate = asyncio.Event()
        client = await harness.raw()
        client.writer.write(FLAGS + GO)
        await settle()
        draining = asyncio.create_task(harness.server.drain(10))
        await settle()
        harness.registry.gate.set()
        await client.at_end()
        client.close()
        assert await draining is True
        assert harness.registry.closed == 1

    serve(test)


def test_drain_gives_up_at_its_time_out():
    async def test(harness):
        harness.export.refuse_reads = True
        harness.export.gate = asyncio.Event()
        clients = [await harness.connect(style=style) for style in STYLES]
        for number, client in enumerate(clients, 1):
            client.send(READ, 0, 512, cookie=7)
            client.send(FLUSH, cookie=8)
            await settle(lambda number=number: harness.export.waiting == 2 * number)
        waiting = await harness.raw()
        assert await harness.server.drain(0.05) is False
        for client in clients:  # whoever comes again asks again; an error would reach a guest
            assert await client.at_end() == b""
        await waiting.at_end()
        assert harness.registry.closed == 0
        harness.export.gate.set()
        await harness.no_connections()

    serve(test)


def test_many_connections_at_once():
    async def test(harness):
        clients = await asyncio.gather(*(harness.connect() for _ in range(60)))
        assert harness.server.connections == 60
        for number, client in enumerate(clients):
            client.send(WRITE, number * 512, data=bytes([number]) * 512)
        for client in clients:
            assert (await client.reply()).error == 0
        for number, client in enumerate(reversed(clients)):
            reply = await client.call(READ, number * 512, 512)
            assert reply.data == bytes([number]) * 512

    serve(test)


@hostile
@given(st.binary(max_size=300))
def test_garbage_in_the_handshake(caplog, data):
    async def test(harness):
        client = await harness.raw()
        client.writer.write(data)
        client.writer.write_eof()
        await client.at_end()
        assert (await (await harness.connect()).call(READ, 0, 1)).error == 0

    serve(test)
    assert no_tracebacks(caplog)


@hostile
@given(
    st.lists(
        st.binary(max_size=60)
        | st.builds(
            request,
            st.integers(0, 9),
            st.integers(0, 2**64 - 1) | st.integers(0, 1 << 20),
            st.integers(0, 2**32 - 1) | st.integers(0, 1 << 16),
            flags=st.integers(0, 31) | st.just(0),
        ),
        max_size=12,
    ),
    st.sampled_from(STYLES),
    st.booleans(),
)
def test_garbage_in_the_transmission(caplog, messages, style, slow):
    async def test(harness):
        harness.export.refuse_reads = harness.export.refuse_writes = slow
        client = await harness.connect(style=style)
        client.writer.write(b"".join(messages))
        client.writer.write_eof()
        await client.at_end()
        await harness.no_connections()

    serve(test)
    assert no_tracebacks(caplog)


def script():
    """Requests of all kinds whose answers do not depend on how they arrive."""
    messages = [
        request(WRITE, 0, data=bytes(range(200)), cookie=1),
        request(READ, 0, 200, cookie=2),
        request(WRITE, 1 << 20, data=b"beyond the end", cookie=3),
        request(WRITE, 10, data=b"flagged", flags=FUA, cookie=4),
        request(WRITE, 30, data=request(READ), flags=2, cookie=5),
        request(READ, 5, 20, flags=4, cookie=6),
        request(77, cookie=7),
        request(BLOCK_STATUS, 0, 8192, cookie=8),
        request(READ, 0, 5 * BLOCK, cookie=9),
        request(FLUSH, cookie=10),
        request(DISC),
    ]
    return b"".join(messages)


def run_script(pieces, style, slow):
    """Send the pieces one by one; returns the replies by cookie."""
    found = {}

    async def test(harness):
        harness.export.refuse_reads = harness.export.refuse_writes = slow
        client = await harness.connect(style=style)
        client.lengths = {2: 200, 6: 20, 9: 5 * BLOCK}
        sock = client.writer.get_extra_info("socket")
        assert sock.type == socket.SOCK_STREAM
        for piece in pieces:
            client.writer.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        for _ in range(10):
            reply = await client.reply()
            found[reply.cookie] = (reply.error, reply.data)
        assert await client.at_end() == b""

    serve(test)
    assert sorted(found) == list(range(1, 11))
    return found


@pytest.mark.parametrize("style", [SIMPLE, STRUCTURED])
def test_stream_cut_at_every_byte(style):
    whole = script()
    expected = run_script([whole], style, False)
    assert expected[2] == (0, bytes(range(200)))
    assert [expected[cookie][0] for cookie in (3, 4, 5, 7)] == [
        errno.ENOSPC,
        0,
        errno.EINVAL,
        errno.EINVAL,
    ]
    bytewise = run_script([whole[i : i + 1] for i in range(len(whole))], style, False)
    assert bytewise == expected


@hostile
@given(
    st.sets(st.integers(1, len(script()) - 1), max_size=12), st.sampled_from([SIMPLE, STRUCTURED])
)
def test_stream_cut_anywhere(cuts, style):
    whole = script()
    edges = [0, *sorted(cuts), len(whole)]
    pieces = [whole[a:b] for a, b in pairwise(edges)]
    assert run_script(pieces, style, False) == run_script([whole], style, False)


SIZE = 3 << 20
steps = st.tuples(
    st.sampled_from([READ, WRITE, WRITE_ZEROES, FLUSH, TRIM]),
    st.integers(0, SIZE),
    st.integers(0, 20_000) | st.integers(0, SIZE) | st.just(1 << 20),
    st.sampled_from([0, FUA]),
    st.booleans(),
)


@hostile
@given(st.lists(steps, max_size=25), st.sampled_from(STYLES), st.integers(0, 255))
def test_against_a_bytearray(todo, style, fill):
    async def test(harness):
        client = await harness.connect(style=style)
        model = bytearray(SIZE)
        for command, offset, wanted, flags, slow in todo:
            harness.export.refuse_reads = harness.export.refuse_writes = slow
            length = min(wanted, SIZE - offset)
            if command == WRITE:
                data = bytes((fill + i) % 256 for i in range(256)) * (length // 256 + 1)
                reply = await client.call(WRITE, offset, data=data[:length], flags=flags)
                model[offset : offset + length] = data[:length]
            elif command == FLUSH:
                reply = await client.call(FLUSH)
            elif command == TRIM:
                reply = await client.call(TRIM, offset, 0)
            elif command == WRITE_ZEROES:
                reply = await client.call(WRITE_ZEROES, offset, length, flags=flags)
                model[offset : offset + length] = bytes(length)
            else:
                reply = await client.call(READ, offset, length, flags=flags)
                assert reply.data == model[offset : offset + length]
            assert reply.error == 0
        harness.export.refuse_reads = False
        for offset in range(0, SIZE, 1 << 20):
            reply = await client.call(READ, offset, 1 << 20)
            assert reply.data == model[offset : offset + (1 << 20)]

    serve(test, MemoryExport(size=SIZE))
