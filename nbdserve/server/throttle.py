"""Limits of an export: so many requests and bytes a second, shared by all its connections.

Each limit is a token bucket. It fills at its rate up to its burst; a request is **admitted** when
no bucket is empty, and takes one token of the one and a token a byte of the other. So a request
that is larger than the burst is admitted, too, and what it took beyond is paid back before the
next.

A connection whose next request is not admitted waits here and is stalled: it receives no more, so
its client waits as for a slow disk. A timer admits what the buckets have since got; nothing polls.

Who comes next is decided by **start-time fair queueing**. A request is tagged with the end of the
connection's last one, or the tag that was served last, if that is later; it ends later by the time
that it takes of the limits. The smallest tag comes next. Connections that always have requests get
equal shares, however many each of them has sent; one that comes now and then is served at once, and
saves nothing up.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from time import perf_counter
from typing import Final, Protocol

from snapshots.limits import Limits

DEFAULT_BURST: Final = 0.1
"""Seconds of its rate that a bucket holds when no burst is given."""

_LEAST_BURST: Final = 0.02  # a timer, or the loop, may be that late
_LEAST_PAUSE: Final = 0.001


class Client(Protocol):
    """A connection, as the throttle sees it."""

    def next_request(self) -> int | None:
        """Bytes that the first request moves which is not admitted; None: nothing has come."""

    def admit(self) -> None:
        """That request may be carried out, once ``resume`` says so."""

    def resume(self) -> None:
        """Something was admitted."""


class _Bucket:
    """See the module's text; ``burst`` and ``rate`` in tokens, and tokens a second."""

    def __init__(self, rate: int, burst: int | None, now: float) -> None:
        self.rate = rate
        self._most = max(DEFAULT_BURST * rate if burst is None else burst, _LEAST_BURST * rate, 1)
        self._tokens = float(self._most)
        self._at = now

    def fill(self, now: float) -> None:
        """Add what has come since the last time."""
        self._tokens = min(self._most, self._tokens + (now - self._at) * self.rate)
        self._at = now

    @property
    def empty(self) -> bool:
        return self._tokens <= 0

    @property
    def full(self) -> bool:
        return self._tokens >= self._most

    def take(self, tokens: int) -> None:
        self._tokens -= tokens

    def seconds(self) -> float:
        """Until it is not empty."""
        return max(0.0, -self._tokens / self.rate)


class Throttle:
    """The limits of one export (see the module's text)."""

    def __init__(self, limits: Limits) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[float, int, Client]] = []
        self._since: dict[Client, float] = {}  # of those that wait
        self._ends: dict[Client, float] = {}  # of each connection's last request
        self._served = 0.0  # the last tag
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._waited = 0.0
        self.change(limits)

    def change(self, limits: Limits) -> None:
        """Other limits, from now on; the buckets are full."""
        now = perf_counter()
        self._requests = _make(limits.iops, limits.iops_burst, now)
        self._bytes = _make(limits.bandwidth, limits.bandwidth_burst, now)
        self._buckets = [found for found in (self._requests, self._bytes) if found is not None]
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._timer = self._loop.call_later(0, self._go_on)

    @property
    def full(self) -> bool:
        """Whether nothing would be lost if a new one took its place."""
        self._fill()
        return not self._waiting and all(bucket.full for bucket in self._buckets)

    def take_waited(self) -> float:
        """Seconds that connections have waited, since the last call."""
        now = perf_counter()
        for client, since in self._since.items():
            self._waited += now - since
            self._since[client] = now
        waited, self._waited = self._waited, 0.0
        return waited

    def enter(self, client: Client) -> None:
        """Admit what can be; with more to come, ``client`` is told later (``resume``)."""
        if client not in self._since:
            self._since[client] = perf_counter()
            self._wait(client, max(self._served, self._ends.get(client, 0.0)))
        for other in self._admit():
            if other is not client:
                self._loop.call_soon(other.resume)
        self._plan()

    def leave(self, client: Client) -> None:
        """The connection is over."""
        self._ends.pop(client, None)
        if self._since.pop(client, None) is not None:
            self._waiting = [entry for entry in self._waiting if entry[2] is not client]
            heapq.heapify(self._waiting)

    def close(self) -> None:
        """There are no limits any more: everybody goes on."""
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()
        self._since.clear()

    def _wait(self, client: Client, tag: float) -> None:
        heapq.heappush(self._waiting, (tag, next(self._numbers), client))

    def _fill(self) -> float:
        now = perf_counter()
        for bucket in self._buckets:
            bucket.fill(now)
        return now

    def _admit(self) -> list[Client]:
        """Admit requests until a bucket is empty; returns whose they are."""
        now = self._fill()
        admitted: dict[Client, None] = {}
        while self._waiting and not any(bucket.empty for bucket in self._buckets):
            tag, _, client = heapq.heappop(self._waiting)
            size = client.next_request()
            if size is not None:
                client.admit()
                admitted[client] = None
                self._served = tag
                self._ends[client] = tag + self._take(size)
            if client.next_request() is None:
                self._waited += now - self._since.pop(client)
            else:
                self._wait(client, self._ends.get(client, tag))
        return list(admitted)

    def _take(self, size: int) -> float:
        """Take the tokens of a request; the seconds that the limits have for it."""
        seconds = 0.0
        if self._requests is not None:
            self._requests.take(1)
            seconds = 1 / self._requests.rate
        if self._bytes is not None:
            self._bytes.take(size)
            seconds = max(seconds, size / self._bytes.rate)
        return seconds

    def _plan(self) -> None:
        if self._waiting and self._timer is None:
            pause = max(bucket.seconds() for bucket in self._buckets)
            self._timer = self._loop.call_later(max(pause, _LEAST_PAUSE), self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        for client in self._admit():
            client.resume()
        self._plan()


def _make(rate: int | None, burst: int | None, now: float) -> _Bucket | None:
    return None if rate is None else _Bucket(rate, burst, now)
