"""What must be found after a power cut, or a kill, kept while a workload runs.

Everything is counted in sectors of 512 bytes. Of each sector of a volume the model knows what is
durable for certain (``base``) and what was written since (``later``): one of these must be
found. A FLUSH that is answered makes durable what was acknowledged before it was asked for; so
does a snapshot. FUA does it for its own range. After a kill of the process alone, all that was
acknowledged must be found.

A snapshot is what the volume was at one **instant** between its beginning and its end: it has what
was acknowledged before the instant and nothing begun after it; of a group all have the same. While
an operation runs, both its outcomes are allowed, but nothing in between.

``Model.freeze`` is the model at a moment, as an ``Expected``; ``Expected.check`` compares it with
what was read, and says which of the outcomes it was.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

SECTOR = 512
ZERO = bytes(SECTOR)
NEVER = 1 << 60


class ViolationError(AssertionError):
    """A promise was broken."""


def describe(sector: bytes) -> str:
    """What a sector says that it is."""
    if sector == ZERO:
        return "zeroes"
    number, place = struct.unpack_from("<QQ", sector)
    if sector != struct.pack("<QQ", number, place) * (SECTOR // 16):
        return f"no sector that was ever written ({sector[:16].hex()}…)"
    return f"write {number} to sector {place}"


@dataclass(eq=False)
class Write:
    """Sectors from ``first`` on became ``sectors``; ``acknowledged`` is NEVER until it is."""

    issued: int
    first: int
    sectors: list[bytes]
    acknowledged: int = NEVER


Timed = tuple[int, int, int, list[bytes]]
"""A write as it stood at some moment: issued, acknowledged, first sector, sectors."""


@dataclass(frozen=True)
class Instant:
    """What a snapshot may be: ``base`` with the ``writes`` before some instant."""

    base: list[bytes]
    writes: list[Timed]
    begun: int
    ended: int

    def moments(self, content: list[bytes]) -> list[list[tuple[int, int]]]:
        """For each sector that was written, the spans of instants at which it was as found."""
        histories: dict[int, list[tuple[int, int, bytes]]] = {}
        for issued, acknowledged, first, sectors in self.writes:
            for place, sector in enumerate(sectors, first):
                histories.setdefault(place, []).append((issued, acknowledged, sector))
        spans = []
        for place, sector in enumerate(content):
            if place not in histories:
                if sector != self.base[place]:
                    raise ViolationError(
                        f"sector {place} is {describe(sector)},"
                        f" not {describe(self.base[place])}, which was there long before"
                    )
                continue
            versions = [(0, 0, self.base[place]), *histories[place]]
            found = []
            for index, (issued, _, version) in enumerate(versions):
                if version == sector:
                    after = versions[index + 1][1] if index + 1 < len(versions) else NEVER
                    found.append((max(issued, self.begun), min(after, self.ended)))
            found = [(begin, end) for begin, end in found if begin <= end]
            if not found:
                known = ", ".join(describe(version) for _, _, version in versions)
                raise ViolationError(f"sector {place} is {describe(sector)}, of {known}")
            spans.append(found)
        return spans


@dataclass(eq=False)
class SnapshotModel:
    """``content`` is None until it has been read; then it is an ``instant`` of ``group``."""

    content: bytes | None
    instant: Instant | None = None
    group: int = 0
    optional: bool = False
    # While it is being taken.
    base: list[bytes] = field(default_factory=list)
    since: int = 0
    begun: int = 0
    ended: int = NEVER


@dataclass(frozen=True)
class Form:
    """One outcome for a volume: each sector is its ``base`` or one of its ``later`` ones."""

    base: list[bytes]
    later: dict[int, list[bytes]]

    def violation(self, content: list[bytes]) -> str | None:
        if len(content) != len(self.base):
            return f"its size is {len(content)} sectors, not {len(self.base)}"
        if content == self.base:
            return None
        for place, (found, base) in enumerate(zip(content, self.base, strict=True)):
            if found != base and found not in self.later.get(place, ()):
                known = ", ".join(describe(each) for each in self.later.get(place, ()))
                return (
                    f"sector {place} is {describe(found)}; durable was {describe(base)},"
                    f" written since: {known or 'nothing'}"
                )
        return None


@dataclass(frozen=True)
class ExpectedSnapshot:
    """See SnapshotModel; ``instant`` where the content is not known."""

    optional: bool
    content: bytes | None
    instant: Instant | None
    group: int


@dataclass(frozen=True)
class ExpectedVolume:
    """A volume under one of ``names``, in one of ``forms``; after a kill, of those ``killed``."""

    names: tuple[str, ...]
    optional: bool
    forms: list[Form]
    killed: list[Form]
    snapshots: dict[str, ExpectedSnapshot]


@dataclass(frozen=True)
class FoundVolume:
    """What was read of a volume after recovery."""

    content: bytes
    snapshots: dict[str, bytes]


@dataclass(frozen=True, eq=False)
class Expected:
    """See the module's text; equal to itself only."""

    volumes: list[ExpectedVolume]

    def check(
        self, found: dict[str, FoundVolume], *, killed: bool = False
    ) -> list[tuple[str, FoundVolume, Form]]:
        """Compare; returns each volume with the outcome that it was. ViolationError.

        What is found after a power cut; or after the process alone was ``killed``.
        """
        outcome: list[tuple[str, FoundVolume, Form]] = []
        groups: dict[int, list[tuple[str, Instant, list[bytes] | None]]] = {}
        unknown = set(found)
        for volume in self.volumes:
            names = [name for name in volume.names if name in found]
            if len(names) > 1:
                raise ViolationError(f"there are both {names[0]} and {names[1]}: one was renamed")
            if not names:
                if not volume.optional:
                    raise ViolationError(f"volume {volume.names[0]} is lost")
                continue
            (name,) = names
            unknown.discard(name)
            there = found[name]
            content = cut_up(there.content)
            forms = volume.killed if killed else volume.forms
            violations = [form.violation(content) for form in forms]
            matching = [
                form for form, violation in zip(forms, violations, strict=True) if violation is None
            ]
            if not matching:
                raise ViolationError(f"volume {name}: " + "; or ".join(map(str, violations)))
            outcome.append((name, there, _either(matching)))
            extra = set(there.snapshots) - set(volume.snapshots)
            if extra:
                raise ViolationError(f"snapshots of {name} that were deleted: {sorted(extra)}")
            for snapshot, expected in volume.snapshots.items():
                full = f"{name}@{snapshot}"
                data = there.snapshots.get(snapshot)
                if data is None and not expected.optional:
                    raise ViolationError(f"snapshot {full} is lost")
                if expected.instant is not None:
                    member = (full, expected.instant, None if data is None else cut_up(data))
                    groups.setdefault(expected.group, []).append(member)
                elif data is not None and data != expected.content:
                    assert expected.content is not None
                    raise ViolationError(_difference(full, data, expected.content))
        if unknown:
            raise ViolationError(f"volumes that were deleted, or never made: {sorted(unknown)}")
        for members in groups.values():
            _check_group(members)
        return outcome


def _either(forms: list[Form]) -> Form:
    """What is found may be any of these."""
    first, *others = forms
    if not others:
        return first
    later = {place: list(sectors) for place, sectors in first.later.items()}
    for other in others:
        for place, sector in enumerate(other.base):
            later.setdefault(place, []).append(sector)
    return Form(first.base, later)


def _difference(name: str, found: bytes, expected: bytes) -> str:
    if len(found) != len(expected):
        return f"snapshot {name} has {len(found)} bytes, not {len(expected)}"
    pairs = zip(cut_up(found), cut_up(expected), strict=True)
    place, one, other = next((n, a, b) for n, (a, b) in enumerate(pairs) if a != b)
    return f"snapshot {name}: sector {place} is {describe(one)}, not {describe(other)}"


def _check_group(members: list[tuple[str, Instant, list[bytes] | None]]) -> None:
    """All or none are there, and all are of one instant."""
    there = [name for name, _, content in members if content is not None]
    if there and len(there) < len(members):
        missing = [name for name, _, content in members if content is None]
        raise ViolationError(f"of one group there are {there}, but not {missing}")
    spans: list[list[tuple[int, int]]] = []
    for name, instant, content in members:
        if content is None:
            continue
        if len(content) != len(instant.base):
            raise ViolationError(f"snapshot {name} has {len(content)} sectors")
        try:
            spans += instant.moments(content)
        except ViolationError as error:
            raise ViolationError(f"snapshot {name}: {error}") from None
    moments = {begin for found in spans for begin, _ in found}
    if spans and not any(
        all(any(begin <= at <= end for begin, end in found) for found in spans) for at in moments
    ):
        raise ViolationError(f"snapshot {', '.join(there)}: not the state of any one instant")


def cut_up(content: bytes) -> list[bytes]:
    """Into sectors."""
    return [content[at : at + SECTOR] for at in range(0, len(content), SECTOR)]


class VolumeModel:
    """A volume while the workload runs; see the module's text."""

    def __init__(self, name: str, base: list[bytes]) -> None:
        self.name = name
        self.base = list(base)
        self.now = list(base)
        self.later: list[tuple[Write, dict[int, bytes]]] = []
        self.trace: list[Write] = []
        self.snapshots: dict[str, SnapshotModel] = {}
        self.names: tuple[str, ...] = (name,)
        self.optional = False
        self.also: Form | None = None
        self.busy: list[tuple[int, int]] = []

    @property
    def sectors(self) -> int:
        return len(self.now)

    def is_busy(self, first: int, last: int) -> bool:
        """Whether something is under way that touches sectors ``first`` to ``last`` (exclusive)."""
        return any(first < end and begin < last for begin, end in self.busy)

    def settle(self, mark: int) -> None:
        """What was acknowledged before ``mark`` is durable."""
        rest = []
        for write, sectors in self.later:
            if write.acknowledged <= mark:
                for place, sector in sectors.items():
                    self._make_durable(place, sector, write, rest)
            else:
                rest.append((write, sectors))
        self.later = rest

    def settle_one(self, write: Write) -> None:
        """This write is durable: what it replaced cannot come back."""
        for index, (found, sectors) in enumerate(self.later):
            if found is write:
                before = self.later[:index]
                for place, sector in sectors.items():
                    self._make_durable(place, sector, write, before)
                del self.later[index]
                return

    def _make_durable(
        self, place: int, sector: bytes, write: Write, before: list[tuple[Write, dict[int, bytes]]]
    ) -> None:
        self.base[place] = sector
        for other, sectors in before:
            if other.issued < write.issued:
                sectors.pop(place, None)

    def form(self) -> Form:
        later: dict[int, list[bytes]] = {}
        for _, sectors in self.later:
            for place, sector in sectors.items():
                later.setdefault(place, []).append(sector)
        return Form(list(self.base), later)

    def killed(self) -> Form:
        """After a kill: what was acknowledged, whether it was flushed or not."""
        later: dict[int, list[bytes]] = {}
        for write, _ in self.later:
            if write.acknowledged == NEVER:
                for place, sector in enumerate(write.sectors, write.first):
                    later.setdefault(place, []).append(sector)
        return Form(list(self.now), later)


class Model:
    """All volumes; ``time`` counts what happens."""

    def __init__(self) -> None:
        self.volumes: list[VolumeModel] = []
        self.time = 0
        self.written = 0
        self.groups = 0

    def tick(self) -> int:
        self.time += 1
        return self.time

    def new_sectors(self, first: int, count: int) -> list[bytes]:
        """Sectors that were never written before."""
        self.written += 1
        return [
            struct.pack("<QQ", self.written, place) * (SECTOR // 16)
            for place in range(first, first + count)
        ]

    def begin(self, volume: VolumeModel, first: int, sectors: list[bytes]) -> Write:
        """A write is about to be asked for."""
        write = Write(self.tick(), first, sectors)
        volume.later.append((write, dict(enumerate(sectors, first))))
        volume.trace.append(write)
        return write

    def end(self, volume: VolumeModel, write: Write) -> None:
        """It is acknowledged."""
        write.acknowledged = self.tick()
        volume.now[write.first : write.first + len(write.sectors)] = write.sectors

    def begin_snapshots(self, volumes: Sequence[VolumeModel], name: str) -> None:
        self.groups += 1
        begun = self.tick()
        for volume in volumes:
            pending = (n for n, write in enumerate(volume.trace) if write.acknowledged == NEVER)
            volume.snapshots[name] = SnapshotModel(
                None,
                group=self.groups,
                optional=True,
                base=list(volume.now),
                since=next(pending, len(volume.trace)),
                begun=begun,
            )

    def end_snapshots(self, volumes: Sequence[VolumeModel], name: str) -> None:
        ended = self.tick()
        for volume in volumes:
            snapshot = volume.snapshots[name]
            snapshot.optional = False
            snapshot.ended = ended
            volume.settle(snapshot.begun)

    def freeze(self) -> Expected:
        """What must be found, should the power fail now."""
        return Expected([_freeze(volume) for volume in self.volumes])


def _freeze(volume: VolumeModel) -> ExpectedVolume:
    forms, killed = [volume.form()], [volume.killed()]
    if volume.also is not None:
        forms.append(volume.also)
        killed.append(volume.also)
    snapshots = {}
    for name, snapshot in volume.snapshots.items():
        instant = None
        if snapshot.content is None:
            writes: list[Timed] = [
                (write.issued, write.acknowledged, write.first, write.sectors)
                for write in volume.trace[snapshot.since :]
                if write.issued <= snapshot.ended
            ]
            instant = Instant(snapshot.base, writes, snapshot.begun, snapshot.ended)
        snapshots[name] = ExpectedSnapshot(
            snapshot.optional, snapshot.content, instant, snapshot.group
        )
    return ExpectedVolume(volume.names, volume.optional, forms, killed, snapshots)


def adopt(outcome: list[tuple[str, FoundVolume, Form]], written: int, *, durable: bool) -> Model:
    """The model of what was found after recovery; after a power cut all of that is durable.

    ``written`` is how many writes there were before.
    """
    model = Model()
    model.written = written
    for name, found, form in outcome:
        content = cut_up(found.content)
        volume = VolumeModel(name, content if durable else form.base)
        volume.now = content
        volume.snapshots = {
            snapshot: SnapshotModel(data) for snapshot, data in found.snapshots.items()
        }
        if not durable:
            depth = max(map(len, form.later.values()), default=0)
            for level in range(depth):
                sectors = {
                    place: versions[level]
                    for place, versions in form.later.items()
                    if level < len(versions)
                }
                volume.later.append((Write(0, 0, [], 0), sectors))
            volume.later.append((Write(0, 0, [], 0), dict(enumerate(content))))
        model.volumes.append(volume)
    return model
