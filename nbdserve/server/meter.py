"""What is counted of the requests on an export, for all its connections in one process.

A ``Meter`` belongs to one export and is shared by its connections, as long as there are any; then
its ``Numbers`` are handed on, and whoever keeps them adds them up: what was counted never goes
back.

- A request's **latency** is from the receipt that completed it to its reply being given to the
  kernel. Requests that came in one receipt and were answered in place share one.
- Its **bytes** are those it reads, writes, trims, zeroes or caches; none of BLOCK_STATUS and FLUSH.
  One that fails counts as it was asked for, one that is refused counts none.
- An **error** is an error reply, by the name of its NBD error. A refused or failed request has a
  latency like all others.

All of it on the event loop's thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    ErrorCode,
)
from nbdserve.protocol.requests import Request
from nbdserve.server.slow import SlowLog, Watch
from nbdserve.server.throttle import Throttle
from snapshots.limits import NO_LIMITS, Limits

BOUNDS: Final = (
    *(25e-6, 50e-6, 100e-6, 250e-6, 500e-6),
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Upper ends of the latency histogram's buckets, in seconds; one more bucket is for what is above.

A bucket counts what is greater than the bound before, and at most its own.
"""

COMMAND_NAMES: Final = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_WRITE_ZEROES: "write_zeroes",
    CMD_BLOCK_STATUS: "block_status",
    CMD_CACHE: "cache",
}
OTHER: Final = "other"
"""Requests of commands that there are not."""


def describe(request: Request) -> str:
    """A request for the log."""
    name = COMMAND_NAMES.get(request.command, f"command {request.command}").upper()
    if request.command == CMD_FLUSH:
        return name
    return f"{name} of {request.length} bytes at {request.offset}"


WITHOUT_BYTES: Final = frozenset((CMD_FLUSH, CMD_BLOCK_STATUS))
"""Commands whose length, if any, is not counted."""


class CommandNumbers:
    """Of one command: requests by latency (``buckets``), their bytes, latencies and errors."""

    __slots__ = ("buckets", "bytes", "errors", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.bytes = 0
        self.seconds = 0.0
        self.errors: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Requests that were answered."""
        return sum(self.buckets)

    def add(self, count: int, size: int, seconds: float) -> None:
        """Count requests of ``size`` bytes in all, that took ``seconds`` each."""
        self.buckets[bisect_left(BOUNDS, seconds)] += count
        self.bytes += size
        self.seconds += count * seconds

    def include(self, other: CommandNumbers) -> None:
        """Add what another one has counted."""
        for place, count in enumerate(other.buckets):
            self.buckets[place] += count
        self.bytes += other.bytes
        self.seconds += other.seconds
        self.errors.update(other.errors)

    def pack(self) -> list[Any]:
        """As plain data."""
        return [list(self.buckets), self.bytes, self.seconds, dict(self.errors)]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> CommandNumbers:
        """Inverse of ``pack``."""
        numbers = cls()
        numbers.buckets, numbers.bytes, numbers.seconds, errors = packed
        numbers.errors = Counter(errors)
        return numbers


class Numbers:
    """Of one export: ``commands`` by name, those that were never asked for left out.

    ``throttled`` are the seconds that its connections have waited because of its limits.
    """

    __slots__ = ("commands", "connections", "in_flight", "throttled")

    def __init__(self) -> None:
        self.connections = 0
        self.in_flight = 0
        self.throttled = 0.0
        self.commands: dict[str, CommandNumbers] = {}

    def include(self, other: Numbers) -> None:
        """Add what another one has counted."""
        self.connections += other.connections
        self.in_flight += other.in_flight
        self.throttled += other.throttled
        for name, numbers in other.commands.items():
            self.commands.setdefault(name, CommandNumbers()).include(numbers)

    def at_rest(self) -> Numbers:
        """The same without connections."""
        numbers = Numbers()
        numbers.throttled = self.throttled
        numbers.commands = self.commands
        return numbers

    def pack(self) -> list[Any]:
        """As plain data."""
        commands = {name: numbers.pack() for name, numbers in self.commands.items()}
        return [self.connections, self.in_flight, self.throttled, commands]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> Numbers:
        """Inverse of ``pack``."""
        numbers = cls()
        numbers.connections, numbers.in_flight, numbers.throttled, commands = packed
        numbers.commands = {name: CommandNumbers.unpack(own) for name, own in commands.items()}
        return numbers


class Measured(Protocol):
    """A connection, as its meter sees it."""

    @property
    def in_flight(self) -> int:
        """Requests that were received and are not answered."""

    def limits_changed(self) -> None:
        """There are other limits, or none any more."""

    def look_for_slow(self) -> None:
        """Tell of requests that are slow already."""


class Meter:
    """Of one export; ``connections`` are those that it has in this process.

    ``throttle`` has its limits; None: there are none. ``slow`` tells of its slow requests; None:
    nobody does.
    """

    def __init__(self, key: str = "", slow: SlowLog | None = None) -> None:
        self.key = key
        self.slow = slow
        self.connections: set[Measured] = set()
        self.users = 0
        self.throttle: Throttle | None = None
        self._throttled = 0.0
        self._commands = {code: CommandNumbers() for code in COMMAND_NAMES}
        self._other = CommandNumbers()

    def command(self, code: int) -> CommandNumbers:
        """The numbers of a command by its code in the protocol."""
        return self._commands.get(code, self._other)

    def limit(self, limits: Limits) -> None:
        """Let other limits hold, from now on."""
        before = self.throttle
        if before is not None and limits:
            before.change(limits)
            return
        if before is not None:
            self._throttled += before.take_waited()
            before.close()
        self.throttle = Throttle(limits) if limits else None
        if before is not self.throttle:
            for connection in self.connections:
                connection.limits_changed()

    def failed(self, code: int, error: ErrorCode) -> None:
        """Count an error reply."""
        self.command(code).errors[error.name] += 1

    def read(self) -> Numbers:
        """What was counted until now; the counting goes on in the same objects."""
        numbers = Numbers()
        if self.throttle is not None:
            self._throttled += self.throttle.take_waited()
        numbers.throttled = self._throttled
        numbers.connections = len(self.connections)
        numbers.in_flight = sum(connection.in_flight for connection in self.connections)
        for code, name in COMMAND_NAMES.items():
            if self._commands[code].count:
                numbers.commands[name] = self._commands[code]
        if self._other.count:
            numbers.commands[OTHER] = self._other
        return numbers


class Meters:
    """The meters of one process; ``retire`` gets the numbers of one that nobody uses any more.

    Requests that take ``slow_seconds`` are in the log (slow.py); 0: none are.
    """

    def __init__(
        self, retire: Callable[[str, Numbers], None] | None = None, slow_seconds: float = 0.0
    ) -> None:
        self._retire = retire
        self._slow_seconds = slow_seconds
        self._watch = Watch(slow_seconds, self._look_for_slow, lambda: bool(self._open))
        self._open: dict[str, Meter] = {}
        # Of exports that are not open, with their limits: who comes back soon gets no new burst.
        self._drained: dict[str, tuple[Throttle, Limits]] = {}
        self._limits: dict[str, Limits] = {}

    def enter(self, key: str, limits: Limits = NO_LIMITS) -> Meter:
        """The meter of the export with that key, for a connection; pair of ``leave``."""
        meter = self._open.get(key)
        if meter is None:
            slow = SlowLog(self._slow_seconds) if self._slow_seconds else None
            meter = self._open[key] = Meter(key, slow)
            throttle, known = self._drained.pop(key, (None, NO_LIMITS))
            if throttle is not None and known == limits:
                meter.throttle = throttle
                self._limits[key] = limits
        meter.users += 1
        if self._slow_seconds:
            self._watch.start()
        self.limit(key, limits)
        return meter

    def limit(self, key: str, limits: Limits) -> None:
        """Let other limits hold for an export, if it is open here."""
        meter = self._open.get(key)
        if meter is not None and self._limits.get(key, NO_LIMITS) != limits:
            self._limits[key] = limits
            meter.limit(limits)

    def leave(self, meter: Meter) -> None:
        """A connection has counted its last request."""
        meter.users -= 1
        if not meter.users:
            del self._open[meter.key]
            limits = self._limits.pop(meter.key, NO_LIMITS)
            self._drained = {k: known for k, known in self._drained.items() if not known[0].full}
            if meter.throttle is not None and not meter.throttle.full:
                self._drained[meter.key] = meter.throttle, limits
            if self._retire is not None:
                self._retire(meter.key, meter.read())

    def _look_for_slow(self) -> None:
        for meter in self._open.values():
            for connection in meter.connections:
                connection.look_for_slow()

    def read(self) -> dict[str, Numbers]:
        """What the meters in use have counted, by key."""
        return {key: meter.read() for key, meter in self._open.items()}
