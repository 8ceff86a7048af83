"""What is counted of requests, and when it counts."""

import asyncio
import errno
import os
import time

from nbdserve.server import slow
from nbdserve.server.meter import BOUNDS, CommandNumbers, Meters, Numbers
from nbdserve.server.slow import LINES
from snapshots.limits import Limits

from .harness import serve, settle
from .memory_export import BLOCK, MemoryExport
from .nbd_client import DF, FLUSH, READ, TRIM, WRITE, request

MIB = 1 << 20


def test_a_latency_is_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    numbers = CommandNumbers()
    numbers.add(3, 100, BOUNDS[4])
    numbers.add(1, 50, BOUNDS[4] * 1.01)
    numbers.add(1, 0, BOUNDS[-1] + 1)
    numbers.add(1, 0, 0.0)
    assert numbers.buckets == [1, 0, 0, 0, 3, 1, *[0] * (len(BOUNDS) - 6), 1]
    assert (numbers.count, numbers.bytes) == (6, 150)
    assert list(BOUNDS) == sorted(set(BOUNDS))


def test_numbers_of_an_export_survive_its_connections() -> None:
    kept: dict[str, Numbers] = {}

    def retire(key: str, numbers: Numbers) -> None:
        kept.setdefault(key, Numbers()).include(Numbers.unpack(numbers.pack()))

    meters = Meters(retire)
    for size in (10, 20):
        first, second = meters.enter("a"), meters.enter("a")
        assert first is second
        first.command(WRITE).add(1, size, 0.1)
        second.command(99).add(1, 0, 0.1)
        meters.leave(first)
        assert set(meters.read()) == {"a"}
        meters.leave(second)
        assert meters.read() == {}
    found = kept["a"].commands
    assert {name: (own.count, own.bytes) for name, own in found.items()} == {
        "write": (2, 30),
        "other": (2, 0),
    }


def test_requests_in_flight_are_told_until_their_replies_are_sent():
    async def test(harness):
        client = await harness.connect()
        meters = harness.server.meters
        export = harness.export
        export.gate = asyncio.Event()
        export.refuse_reads = True
        client.writer.write(
            request(READ, 0, BLOCK) + request(TRIM, 0, BLOCK) + request(WRITE, 0, data=b"x" * 10)
        )
        await client.reply()  # of the write
        (numbers,) = meters.read().values()
        assert (numbers.connections, numbers.in_flight) == (1, 2)
        assert set(numbers.commands) == {"write"}
        export.gate.set()
        await client.reply()
        await client.reply()
        await settle(lambda: meters.read()[export.key].in_flight == 0)
        (numbers,) = meters.read().values()
        assert numbers.in_flight == 0
        counted = {name: (own.count, own.bytes) for name, own in numbers.commands.items()}
        assert counted == {"write": (1, 10), "read": (1, BLOCK), "trim": (1, BLOCK)}

    serve(test)


def test_replies_that_a_client_does_not_take_are_in_flight():
    async def test(harness):
        client = await harness.connect()
        client.writer.transport.pause_reading()
        for _ in range(8):
            client.send(READ, 0, MIB, flags=DF)
        await client.writer.drain()
        meters = harness.server.meters
        key = harness.export.key
        await settle(lambda: meters.read()[key].in_flight > 0)
        assert meters.read()[key].in_flight > 0
        client.writer.transport.resume_reading()
        for _ in range(8):
            assert (await client.reply()).error == 0
        await settle(lambda: meters.read()[key].in_flight == 0)
        numbers = meters.read()[key]
        assert (numbers.in_flight, numbers.commands["read"].count) == (0, 8)

    serve(test, MemoryExport(size=MIB))


def test_what_was_answered_counts_though_the_client_left_without_its_reply():
    async def test(harness):
        told = {}
        harness.server.meters._retire = told.__setitem__
        client = await harness.connect()
        harness.export.gate = asyncio.Event()
        client.send(FLUSH)
        await settle(lambda: harness.export.waiting)
        client.writer.transport.abort()
        await asyncio.sleep(0.01)
        harness.export.gate.set()
        await harness.no_connections()
        assert told[harness.export.key].commands["flush"].count == 1

    serve(test)


def test_what_was_answered_counts_though_rubbish_came_behind_it():
    async def test(harness):
        told = {}
        harness.server.meters._retire = told.__setitem__
        client = await harness.connect()
        client.writer.write(request(READ, 0, 1) + request(WRITE, 0, data=b"x") + b"?" * 28)
        assert (await client.reply()).error == 0
        await harness.no_connections()
        commands = told[harness.export.key].commands
        assert {name: own.count for name, own in commands.items()} == {"read": 1, "write": 1}

    serve(test)


def test_errors_by_their_name():
    async def test(harness):
        client = await harness.connect()
        await client.call(READ, MIB, 1)
        harness.export.error = OSError(errno.ENOSPC, "full")
        await client.call(WRITE, 0, data=b"x")
        await client.call(TRIM, 0, BLOCK)
        await client.call(99)
        commands = harness.server.meters.read()[harness.export.key].commands
        assert {name: dict(own.errors) for name, own in commands.items()} == {
            "read": {"EINVAL": 1},
            "write": {"ENOSPC": 1},
            "trim": {"ENOSPC": 1},
            "other": {"EINVAL": 1},
        }

    serve(test, MemoryExport(size=MIB))


def test_slow_requests_are_told_while_they_hang_and_when_they_end(caplog, monkeypatch):
    async def test(harness):
        harness.server.meters = Meters(slow_seconds=0.05)
        client = await harness.connect()
        export = harness.export
        export.gate = asyncio.Event()
        client.send(TRIM, 4096, 8192)
        await settle(lambda: caplog.messages)
        (line,) = caplog.messages
        assert line.startswith("slow request: TRIM of 8192 bytes at 4096 is under way for 0.")
        assert caplog.records[0].fields["export"] == "disk"
        assert caplog.records[0].fields["client"].startswith(f"unix:pid={os.getpid()},")
        await asyncio.sleep(0.1)
        assert caplog.messages == [line]
        export.gate.set()
        await client.reply()
        assert "request: TRIM of 8192 bytes at 4096 took 0." in caplog.messages[1]
        caplog.clear()
        await client.call(FLUSH)
        await client.call(READ, 0, 1)
        assert caplog.messages == []

        export.gate = asyncio.Event()
        for cookie in range(2, 22):
            client.send(FLUSH, cookie=cookie)
        await asyncio.sleep(0.2)
        export.gate.set()
        for _ in range(20):
            await client.reply()
        assert len(caplog.messages) == LINES - 2
        caplog.clear()
        monkeypatch.setattr(slow, "INTERVAL", 0.0)
        export.gate = asyncio.Event()
        client.send(FLUSH)
        await settle(lambda: len(caplog.messages) == 2)
        left_out = 40 - (LINES - 2)
        assert caplog.messages[0] == f"slow request: {left_out} more lines"
        export.gate.set()
        await client.reply()

    with caplog.at_level("WARNING"):
        serve(test)


def test_a_request_that_blocked_the_loop_is_slow(caplog):
    async def test(harness):
        harness.server.meters = Meters(slow_seconds=0.05)
        client = await harness.connect()
        export = harness.export
        write = export.try_write

        def block(offset, data):
            time.sleep(0.06)
            return write(offset, data)

        export.try_write = block
        await client.call(WRITE, 0, data=b"x")
        assert "0 READ and 1 WRITE, received together, took 0." in caplog.text

    with caplog.at_level("WARNING"):
        serve(test)


def test_waiting_for_limits_is_not_slow(caplog):
    async def test(harness):
        harness.server.meters = Meters(slow_seconds=0.05)
        harness.server._limits = lambda key: Limits(iops=10, iops_burst=1)
        client = await harness.connect()
        for command in (READ, FLUSH, TRIM, FLUSH):
            await client.call(command, 0, 0 if command == FLUSH else 1)
        assert caplog.messages == []

    with caplog.at_level("WARNING"):
        serve(test)
