"""What each sector may hold after a power cut, and what each snapshot must.

Time is a counter that goes on at every request sent and every reply received. A write is known by
the time it was sent; its **number** is in each of its sectors, so what is found tells which write
left it there. Zeroes have number 0 there, whichever TRIM or WRITE_ZEROES made them.

**A volume** has for each sector what is durable, and the writes since then in the order they were
sent (two requests that overlap are never in flight together). After a cut a sector may hold any of
these. What was acknowledged before a FLUSH was sent becomes durable when the FLUSH is
acknowledged; what a write with FUA wrote, when that is; all that was acknowledged before a snapshot
was asked for, when the snapshot is there. What is found after a boot counts like a write that was
acknowledged then: it may still be lost, until the next FLUSH. A sector may be **torn**, too, the
beginning of one such write and the end of another: the kernel does not keep a program from writing
to a page of its cache while the disk reads that page.

**A snapshot** is of one instant between being asked for and being acknowledged: it has every write
that was acknowledged before that instant, and none that was sent after it; a group of snapshots is
of one instant for all. Once read, it never changes.

**What was in doubt** when the machine was killed (asked for, not acknowledged) happened as a whole
or not at all.
"""

import math
import struct
import zlib
from dataclasses import dataclass, field

SECTOR = 512
_ZEROES = bytes(SECTOR)
_HEADER = struct.Struct("<8sQQ")
_CHECK = struct.Struct("<Q")
_MAGIC = b"nbdpower"
_REPEATED = SECTOR // (_HEADER.size + _CHECK.size)


class WrongError(Exception):
    """Something was found that must not be; the text says where and what."""


def fill(number, sector):
    """What a write leaves in a sector; ``sector`` is its place in the volume."""
    if number == 0:
        return _ZEROES
    header = _HEADER.pack(_MAGIC, number, sector)
    return (header + _CHECK.pack(zlib.crc32(header))) * _REPEATED


def read_number(data, sector):
    """Which write left this; ``data`` itself where no single write can have left it."""
    if data == _ZEROES:
        return 0
    magic, number, place = _HEADER.unpack_from(data)
    if magic != _MAGIC or place != sector or data != fill(number, sector):
        return data
    return number


def is_torn(found, sector, legal):
    """Whether what ``read_number`` found is the beginning of one of ``legal`` and another's end."""
    if not isinstance(found, bytes):
        return False
    contents = [each if isinstance(each, bytes) else fill(each, sector) for each in legal]
    edges = [next((i for i in range(SECTOR) if found[i] != each[i]), SECTOR) for each in contents]
    return any(found[max(edges) :] == each[max(edges) :] for each in contents)


def read_numbers(data):
    """``read_number`` of every sector."""
    return [
        read_number(data[start : start + SECTOR], start // SECTOR)
        for start in range(0, len(data), SECTOR)
    ]


@dataclass
class Clock:
    """The time, and when each write was acknowledged."""

    now: int = 0
    acknowledged: dict = field(default_factory=dict)

    def tick(self):
        self.now += 1
        return self.now

    def when(self, write):
        return self.acknowledged.get(write, math.inf)


@dataclass
class Snapshot:
    """``base`` has the numbers acknowledged when it was asked for, ``later`` those from then on."""

    volume: str
    name: str
    base: list
    later: dict  # sector: [(number, time sent)]
    group: int
    committed: bool = False
    deleting: bool = False
    known: bool = False  # it was read: base is all there is
    first: float = -math.inf  # the instant is after this
    last: float = math.inf  # and before this

    @property
    def label(self):
        return f"{self.volume}@{self.name}"

    def examine(self, numbers, clock):
        """Compare; from now on it has to be exactly this."""
        check_length(self.label, len(numbers), {len(self.base)})
        for sector, number in enumerate(numbers):
            if sector not in self.later and number != self.base[sector]:
                raise WrongError(f"{self.label}: {describe(sector, number, [self.base[sector]])}")
        for sector, writes in self.later.items():
            ways = [-1] if numbers[sector] == self.base[sector] else []
            ways += [at for at, (number, _) in enumerate(writes) if number == numbers[sector]]
            if not ways:
                legal = [self.base[sector], *(number for number, _ in writes)]
                raise WrongError(f"{self.label}: {describe(sector, numbers[sector], legal)}")
            if len(ways) == 1:  # or it cannot be told which zeroes these are
                (at,) = ways
                if at >= 0:
                    self.first = max(self.first, writes[at][1])
                if at + 1 < len(writes):
                    self.last = min(self.last, clock.when(writes[at + 1][1]))
        if self.first >= self.last:
            raise WrongError(
                f"{self.label}: has what was sent at {self.first} and lacks what was acknowledged"
                f" at {self.last}"
            )
        self.base, self.later, self.known = list(numbers), {}, True


@dataclass
class Volume:
    """``size`` in sectors; ``pending`` has, by sector, the writes after the durable one."""

    name: str
    size: int
    durable: list
    pending: dict = field(default_factory=dict)  # sector: [(number, time sent)]
    committed: bool = True
    deleting: bool = False
    larger: int | None = None  # a resize in doubt
    rolled_back: Snapshot | None = None  # a rollback in doubt
    watching: list = field(default_factory=list)  # snapshots that are being taken

    def send(self, sectors, number, time):
        """A write of ``number`` to these sectors was sent."""
        for place in (self.pending, *(snapshot.later for snapshot in self.watching)):
            for sector in sectors:
                place.setdefault(sector, []).append((number, time))

    def settle(self, clock, before, sectors=None):
        """All that was acknowledged before a time is durable, everywhere or in these sectors."""
        for sector in list(self.pending) if sectors is None else sectors:
            writes = self.pending.get(sector, ())
            done = [at for at, (_, time) in enumerate(writes) if clock.when(time) < before]
            if done:
                self.durable[sector] = writes[done[-1]][0]
                del writes[: done[-1] + 1]
                if not writes:
                    del self.pending[sector]

    def begin_snapshot(self, name, clock, group):
        """A snapshot is being asked for; until ``watching`` loses it, it may get what is sent."""
        base, later = list(self.durable), {}
        for sector, writes in self.pending.items():
            for number, time in writes:
                if clock.when(time) < math.inf:
                    base[sector] = number
                else:
                    later.setdefault(sector, []).append((number, time))
        snapshot = Snapshot(self.name, name, base, later, group)
        self.watching.append(snapshot)
        return snapshot

    def become(self, numbers):
        """It is exactly this, durably."""
        self.size, self.durable, self.pending = len(numbers), list(numbers), {}

    def grow(self, size):
        self.durable += [0] * (size - self.size)
        self.size = size

    def examine(self, numbers, clock):
        """Compare what was found after a boot; return how many sectors lost acknowledged writes."""
        try:
            lost = self._examine(numbers, clock)
        except WrongError as wrong:
            if self.rolled_back is None or numbers != self.rolled_back.base:
                raise WrongError(
                    f"{wrong}{'; nor is the rollback in doubt done' if self.rolled_back else ''}"
                ) from None
            self.become(numbers)
            lost = 0
        self.rolled_back = self.larger = None
        return lost

    def _examine(self, numbers, clock):
        check_length(self.name, len(numbers), {self.size, self.larger or self.size})
        lost = 0
        for sector, number in enumerate(numbers):
            if sector >= self.size:
                legal = [0]
            elif sector in self.pending:
                legal = [self.durable[sector], *(found for found, _ in self.pending[sector])]
            else:
                legal = [self.durable[sector]]
            torn = sector in self.pending and is_torn(number, sector, legal)
            if number not in legal and not torn:
                raise WrongError(f"{self.name}: {describe(sector, number, legal)}")
        self.grow(len(numbers))
        found = clock.tick()
        clock.acknowledged[found] = clock.tick()
        for sector, writes in self.pending.items():
            last = [n for n, time in writes if clock.when(time) < math.inf][-1:]
            lost += last not in ([], [numbers[sector]])
            writes.append((numbers[sector], found))
        return lost


def check_length(label, found, allowed):
    if found not in allowed:
        raise WrongError(f"{label}: has {found} sectors instead of {sorted(allowed)}")


def describe(sector, number, legal):
    what = "what was never written there" if isinstance(number, bytes) else f"write {number}"
    return f"sector {sector} (byte {sector * SECTOR}) holds {what} instead of any of {legal}"
