"""What a run measured, and what follows from it: medians, ratios, targets met or missed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field

from scripts.bench.scale import MIB
from scripts.bench_repository.measuring import Cost
from scripts.bench_repository.scale import Scale

NBDSERVE_S3 = "nbdserve, S3"
ENCRYPTED_S3 = "nbdserve encrypted, S3"
RESTIC_S3 = "restic, S3"
STDIN_S3 = "restic --stdin, S3"
NBDSERVE_DIRECTORY = "nbdserve, directory"
RESTIC_DIRECTORY = "restic, directory"
BORG_DIRECTORY = "borg, directory"
CONTESTANTS = (
    NBDSERVE_S3,
    ENCRYPTED_S3,
    RESTIC_S3,
    STDIN_S3,
    NBDSERVE_DIRECTORY,
    RESTIC_DIRECTORY,
    BORG_DIRECTORY,
)

FULL_PUSH = "full push"
CHANGED_PUSH = "push, 1 % of blocks changed"
UNCHANGED_PUSH = "push, unchanged"
RESTORE = "restore"
FIRST_BYTE = "lazy restore, first byte"
DELETE = "delete"
COLLECT = "collect"
STEPS = (FULL_PUSH, CHANGED_PUSH, UNCHANGED_PUSH, RESTORE, FIRST_BYTE, DELETE, COLLECT)

SECONDS = "seconds"
CPU = "cpu"
PEAK = "peak"
STORED = "stored"


@dataclass(frozen=True)
class Sample:
    """One step of one contestant in one round; ``stored`` is what its repository takes then.

    The others are those of ``Cost``. Sizes in bytes.
    """

    round: int
    step: str
    contestant: str
    seconds: float
    cpu: float
    peak: int
    others: float
    stored: int

    @classmethod
    def of(cls, turn: int, step: str, contestant: str, cost: Cost, stored: int) -> Sample:
        return cls(turn, step, contestant, cost.seconds, cost.cpu, cost.peak, cost.others, stored)

    def metric(self, name: str) -> float:
        return float(getattr(self, name))


@dataclass(frozen=True)
class Measurement:
    """One figure of a probe: of each round one value. ``target`` is a bound on their median.

    It is the least that it may be if ``at_least``, else the most; None: there is no target.
    """

    probe: str
    what: str
    values: list[float]
    unit: str
    target: float | None = None
    at_least: bool = False

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """None when there is no target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass
class Results:
    """Everything of one run. ``data`` is how many bytes of the mixed image are no holes."""

    machine: dict[str, str]
    scale: Scale
    begun: float
    load: float
    absent: list[str]
    seconds: float = 0.0
    data: int = 0
    samples: list[Sample] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def values(self, step: str, contestant: str, metric: str) -> dict[int, float]:
        """By round."""
        return {
            sample.round: sample.metric(metric)
            for sample in self.samples
            if sample.step == step and sample.contestant == contestant
        }

    def median(self, step: str, contestant: str, metric: str) -> float | None:
        """Over the rounds; None where there is nothing."""
        values = self.values(step, contestant, metric)
        return statistics.median(values.values()) if values else None

    def ratios(self, step: str, contestant: str, other: str, metric: str) -> list[float]:
        """The contestant's figure over the other's of the same round, ascending."""
        ours = self.values(step, contestant, metric)
        theirs = self.values(step, other, metric)
        return sorted(ours[turn] / theirs[turn] for turn in ours if theirs.get(turn))

    def to_json(self) -> str:
        """For programs: everything measured, and the targets."""
        document = dataclasses.asdict(self) | {
            "targets": [
                dataclasses.asdict(found) | {"median": found.value, "met": found.met}
                for found in with_targets(self)
            ]
        }
        return json.dumps(document, indent=1) + "\n"


def with_targets(results: Results) -> list[Measurement]:
    """Every figure that has a target."""
    ours, theirs = (results.values(FULL_PUSH, name, SECONDS) for name in (NBDSERVE_S3, RESTIC_S3))
    rates = [theirs[turn] / ours[turn] for turn in sorted(ours.keys() & theirs.keys())]
    found = []

    def add(
        what: str, values: list[float], unit: str, bound: float, *, least: bool = False
    ) -> None:
        if values:
            found.append(Measurement("comparison", what, values, unit, bound, least))

    add("full push to S3, rate ÷ restic's", rates, "", 2, least=True)
    add(
        "full push to S3, CPU time ÷ restic's",
        results.ratios(FULL_PUSH, NBDSERVE_S3, RESTIC_S3, CPU),
        "",
        0.35,
    )
    seconds = results.values(FULL_PUSH, NBDSERVE_DIRECTORY, SECONDS).values()
    add(
        "full push to a directory",
        [results.data / MIB / taken for taken in seconds],
        "MiB/s",
        300,
        least=True,
    )
    for name in (NBDSERVE_S3, NBDSERVE_DIRECTORY):
        peaks = results.values(FULL_PUSH, name, PEAK).values()
        add(f"memory of a full push, {name}", [peak / MIB for peak in peaks], "MiB", 256)
    return found + [probed for probed in results.measurements if probed.target is not None]
