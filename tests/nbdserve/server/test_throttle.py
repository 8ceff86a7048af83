"""Limits: how much is admitted, of whom, and that a stalled connection ends like any other."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbdserve.server import throttle
from nbdserve.server.throttle import Throttle
from snapshots.limits import NO_LIMITS, Limits

from .harness import serve, settle
from .memory_export import BLOCK, MemoryExport
from .nbd_client import FLUSH, FUA, READ, WRITE, request

MIB = 1 << 20


class Clock:
    """The throttle's clock and timer, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.timer: tuple[float, object] | None = None
        monkeypatch.setattr(throttle, "perf_counter", lambda: self.now)
        monkeypatch.setattr(throttle.asyncio, "get_running_loop", lambda: self)

    def call_later(self, seconds: float, callback: object) -> Clock:
        assert self.timer is None
        self.timer = (self.now + seconds, callback)
        return self

    def cancel(self) -> None:
        self.timer = None

    def call_soon(self, callback: object) -> None:
        callback()  # type: ignore[operator]

    def run(self, seconds: float) -> None:
        """Let timers go off, each a little late, as they do."""
        end = self.now + seconds
        while self.timer is not None and self.timer[0] <= end:
            at, callback = self.timer
            self.timer = None
            self.now = max(self.now, at) + 0.0003
            callback()  # type: ignore[operator]
        self.now = max(self.now, end)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Client:
    """Sends requests of ``size`` as long as it has fewer than ``depth`` of them under way."""

    def __init__(self, limits: Throttle, size: int, depth: int, clock: Clock) -> None:
        self.throttle, self.size, self.depth, self.clock = limits, size, depth, clock
        self.unadmitted = self.admitted = self.done = 0
        self.largest_gap = 0.0
        self._last = clock.now

    def start(self) -> None:
        self.unadmitted = self.depth
        self.throttle.enter(self)
        self.resume()

    def next_request(self) -> int | None:
        return self.size if self.unadmitted else None

    def admit(self) -> None:
        self.unadmitted -= 1
        self.admitted += 1
        self.largest_gap = max(self.largest_gap, self.clock.now - self._last)
        self._last = self.clock.now

    def resume(self) -> None:
        """All that was admitted is done at once, and as much comes again."""
        while self.admitted:
            self.done += self.admitted
            self.unadmitted += self.admitted
            self.admitted = 0
            self.throttle.enter(self)


@pytest.mark.parametrize(
    ("limits", "size", "rate", "burst"),
    [
        (Limits(iops=100), 4096, 100, 10),
        (Limits(iops=100, iops_burst=500), 4096, 100, 500),
        (Limits(iops=1), 0, 1, 1),
        (Limits(iops=20_000, iops_burst=1), 512, 20_000, 400),
        (Limits(bandwidth=MIB), 4096, 256, 26),
        (Limits(bandwidth=MIB, bandwidth_burst=4 * MIB), 65536, 16, 64),
        (Limits(bandwidth=MIB), 4 * MIB, 0.25, 1),
        (Limits(iops=50, bandwidth=MIB), 4096, 50, 5),
        (Limits(iops=5000, bandwidth=MIB), 65536, 16, 2),
    ],
)
def test_the_rate_is_kept_and_a_burst_is_once(
    clock: Clock, limits: Limits, size: int, rate: float, burst: int
) -> None:
    client = Client(Throttle(limits), size, 8, clock)
    client.start()
    assert burst <= client.done <= burst + 1
    begun = client.done
    clock.run(20)
    assert rate * 20 * 0.99 - 1 <= client.done - begun <= rate * 20 * 1.01 + 1
    client.throttle.leave(client)
    clock.run(10)
    client.unadmitted = 8
    before = client.done
    client.start()
    assert client.done - before <= burst + 1


def test_connections_have_equal_shares_however_deep_their_queues(clock: Clock) -> None:
    limits = Throttle(Limits(iops=1000))
    clients = [Client(limits, 4096, depth, clock) for depth in (64, 8, 1)]
    for client in clients:
        client.start()
    before = [client.done for client in clients]
    clock.run(10)
    done = [client.done - begun for client, begun in zip(clients, before, strict=True)]
    assert sum(done) == pytest.approx(10_000, rel=0.01)
    for count in done:
        assert count == pytest.approx(10_000 / 3, rel=0.1)
    assert all(client.largest_gap < 0.1 for client in clients)


def test_shares_of_bandwidth_are_in_bytes(clock: Clock) -> None:
    limits = Throttle(Limits(bandwidth=10 * MIB))
    small, large = Client(limits, 4096, 32, clock), Client(limits, MIB, 4, clock)
    for client in (large, small):
        client.start()
    clock.run(20)
    assert small.done * 4096 == pytest.approx(large.done * MIB, rel=0.1)


def test_who_was_away_has_saved_nothing_up(clock: Clock) -> None:
    limits = Throttle(Limits(iops=1000))
    steady, late = Client(limits, 0, 16, clock), Client(limits, 0, 16, clock)
    steady.start()
    clock.run(10)
    before = steady.done
    late.start()
    clock.run(2)
    assert late.done == pytest.approx(steady.done - before, rel=0.1)


def test_changed_and_lifted_limits(clock: Clock) -> None:
    limits = Throttle(Limits(iops=1))
    client = Client(limits, 0, 4, clock)
    client.start()
    limits.change(Limits(iops=1000))
    before = client.done
    clock.run(2)
    assert client.done - before == pytest.approx(2100, rel=0.05)
    assert limits.take_waited() > 1
    limits.close()
    assert clock.timer is None


def serve_limited(test, limits: Limits) -> None:
    """Run ``test`` with an export of 1 MiB that has limits."""

    async def main(harness):
        harness.server._limits = lambda key: limits
        await test(harness)

    serve(main, MemoryExport(size=MIB))


def test_a_burst_and_then_the_rate():
    async def test(harness):
        loop = asyncio.get_running_loop()
        client = await harness.connect()
        begun = loop.time()
        client.writer.write(b"".join(request(READ, 0, BLOCK, cookie=n) for n in range(50)))
        for _ in range(50):
            assert (await client.reply()).error == 0
        # 20 or 21 at once; the others take their time, at least.
        assert loop.time() - begun > 29 / 50 * 0.95
        numbers = harness.server.meters.read()[harness.export.key]
        assert numbers.commands["read"].count == 50
        assert numbers.throttled > 0.5

    serve_limited(test, Limits(iops=50, iops_burst=20))


def test_limits_change_under_an_open_connection():
    async def test(harness):
        client = await harness.connect()
        meters, key = harness.server.meters, harness.export.key
        client.writer.write(b"".join(request(READ, 0, BLOCK, cookie=n) for n in range(5000)))
        await client.reply()
        meters.limit(key, Limits(iops=10**9))
        for _ in range(1000):
            await client.reply()
        meters.limit(key, NO_LIMITS)
        for _ in range(3999):
            await client.reply()
        meters.limit(key, Limits(iops=1000, iops_burst=10))
        for _ in range(20):
            await client.call(READ, 0, BLOCK)
        assert meters.read()[key].commands["read"].count == 5020

    serve_limited(test, Limits(iops=1, iops_burst=1))


def test_draining_answers_what_was_received_whatever_the_limits():
    async def test(harness):
        client = await harness.connect()
        client.writer.write(b"".join(request(FLUSH, cookie=n) for n in range(100)))
        await client.reply()
        await settle(lambda: harness.export.calls.count(("flush", 0, 0)) >= 1)
        drained = asyncio.create_task(harness.server.drain(10))
        for _ in range(99):
            assert (await client.reply()).error == 0
        await client.at_end()
        client.close()
        assert await drained

    serve_limited(test, Limits(iops=1, iops_burst=1))


@pytest.mark.parametrize("way", ["abort", "client"])
def test_a_stalled_connection_can_be_dropped(way):
    async def test(harness):
        client, other = await harness.connect(), await harness.connect()
        for one in (client, other):
            one.writer.write(b"".join(request(READ, 0, BLOCK, cookie=n) for n in range(100)))
        await client.reply()
        (connection, _) = list(harness.server._connections.values())
        if way == "client":
            client.writer.transport.abort()
        else:
            getattr(connection, way)()
        # The other one is served as before, in its time.
        assert (await other.reply()).error == 0
        if way != "client":  # which is noticed when there is something to send
            await settle(lambda: harness.server.connections == 1)
            assert harness.server.connections == 1

    serve_limited(test, Limits(iops=1, iops_burst=1))


def test_who_comes_back_gets_no_new_burst():
    async def test(harness):
        answered = 0
        for _ in range(4):
            client = await harness.connect()
            client.writer.write(b"".join(request(READ, 0, 1, cookie=n) for n in range(40)))
            try:
                async with asyncio.timeout(0.2):
                    while True:
                        await client.reply()
                        answered += 1
            except TimeoutError:
                pass
            client.writer.transport.abort()
            connections = list(harness.server._connections.values())
            for connection in connections:
                connection.abort()
            await harness.no_connections()
        assert 50 <= answered <= 54

    serve_limited(test, Limits(iops=1, iops_burst=50))


def test_errors_are_limited_too():
    async def test(harness):
        client = await harness.connect()
        for _ in range(10):
            assert (await client.call(READ, MIB, 1)).error == errno.EINVAL
            assert (await client.call(WRITE, MIB, data=b"x" * 300_000)).error == errno.ENOSPC
            assert (await client.call(WRITE, 0, data=b"x" * 300_000, flags=FUA)).error == 0

    serve_limited(test, Limits(iops=1000, iops_burst=5))
