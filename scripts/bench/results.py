"""What a run measured, and what follows from it: medians, ratios, targets met or missed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field

from scripts.bench.jobs import JOBS
from scripts.bench.scale import Scale

NBDSERVE = "nbdserve"
FINE = "nbdserve, 4k pieces"
HEAD_ONLY = "nbdserve, head only"
NBDKIT = "nbdkit file, raw"
QEMU_RAW = "qemu-nbd raw"
QEMU_QCOW2 = "qemu-nbd qcow2"
SERVERS = (NBDKIT, QEMU_RAW, QEMU_QCOW2, NBDSERVE, FINE, HEAD_ONLY)

IOPS = "iops"
P99 = "p99_microseconds"
CPU = "cpu_microseconds"


@dataclass(frozen=True)
class Sample:
    """One job on one server in one round; latency and CPU time per request in microseconds.

    ``others`` is how many processors were busy with neither the server nor fio: the kernel's own
    threads, and whatever disturbed the job.
    """

    round: int
    job: str
    server: str
    iops: float
    p99_microseconds: float
    cpu_microseconds: float
    others: float

    def metric(self, name: str) -> float:
        return float(getattr(self, name))


@dataclass(frozen=True)
class Measurement:
    """One figure of a probe; ``target`` is the most that it may be, None when there is none."""

    probe: str
    what: str
    value: float
    unit: str
    target: float | None = None


@dataclass
class Results:
    """Everything of one run."""

    machine: dict[str, str]
    scale: Scale
    begun: float
    load: float
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def jobs(self) -> list[str]:
        """Names, in the order they ran."""
        return list(dict.fromkeys(sample.job for sample in self.samples))

    def median(self, job: str, server: str, metric: str) -> float | None:
        """Over the rounds; None where that server did not run that job."""
        values = self._values(job, server, metric)
        return statistics.median(values.values()) if values else None

    def ratios(self, job: str, server: str, peer: str, metric: str) -> list[float]:
        """Server's figure over the peer's of the same round, ascending."""
        ours, theirs = self._values(job, server, metric), self._values(job, peer, metric)
        return sorted(ours[turn] / theirs[turn] for turn in ours if theirs.get(turn))

    def to_json(self) -> str:
        """For programs: everything measured, and the targets."""
        document = dataclasses.asdict(self) | {
            "comparisons": [
                dataclasses.asdict(comparison) | {"met": comparison.met}
                for comparison in compare_with_targets(self)
            ]
        }
        return json.dumps(document, indent=1) + "\n"

    def _values(self, job: str, server: str, metric: str) -> dict[int, float]:
        return {
            sample.round: sample.metric(metric)
            for sample in self.samples
            if sample.job == job and sample.server == server
        }


@dataclass(frozen=True)
class Target:
    """What one figure of one job is to be, as a ratio to each of two peers.

    Rates are to be at least that, times at most.
    """

    job: str
    metric: str
    nbdkit: float
    qcow2: float

    @property
    def at_least(self) -> bool:
        return self.metric == IOPS


TARGETS = (
    Target("randread 4k qd32", IOPS, 1.3, 4),
    Target("randwrite 4k qd32", IOPS, 1.2, 4),
    Target("randrw 4k qd32", IOPS, 1.2, 3.5),
    Target("randread 4k qd1", IOPS, 1.3, 2),
    Target("randwrite 4k qd1", IOPS, 1.2, 2),
    Target("read 1M qd4", IOPS, 1.7, 2),
    Target("write 1M qd4", IOPS, 1.0, 1.7),
    Target("randread 4k qd32", CPU, 0.8, 0.2),
    Target("randwrite 4k qd32", CPU, 0.8, 0.2),
    Target("randrw 4k qd32", CPU, 0.8, 0.2),
    *(Target(job.name, P99, 0.7, 0.4) for job in JOBS if job.depth == 32 and not job.tls),
)


@dataclass(frozen=True)
class Comparison:
    """nbdserve against one peer: the median of the rounds' ratios, the least, the greatest."""

    job: str
    metric: str
    peer: str
    ratio: float
    least: float
    greatest: float
    target: float | None
    at_least: bool

    @property
    def met(self) -> bool | None:
        """None when there is no target."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


def compare_with_targets(results: Results, server: str = NBDSERVE) -> list[Comparison]:
    """Every job and figure against both peers: those with a target first, in their order."""
    wanted = [(target.job, target.metric) for target in TARGETS]
    others = [(job, metric) for metric in (IOPS, CPU, P99) for job in results.jobs()]
    targets = {(target.job, target.metric): target for target in TARGETS}
    found = []
    for job, metric in dict.fromkeys(wanted + others):
        target = targets.get((job, metric))
        for peer, bound in (
            (NBDKIT, target.nbdkit if target else None),
            (QEMU_QCOW2, target.qcow2 if target else None),
        ):
            ratios = results.ratios(job, server, peer, metric)
            if ratios:
                median = statistics.median(ratios)
                found.append(
                    Comparison(
                        job, metric, peer, median, ratios[0], ratios[-1], bound, metric == IOPS
                    )
                )
    return found
