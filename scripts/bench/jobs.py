"""The fio jobs, and what is read out of fio's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from scripts.bench.process import BenchError, run

KIB = 1 << 10


@dataclass(frozen=True)
class Job:
    """``pattern`` is fio's ``rw``; ``block`` is in bytes; ``depth`` requests are in flight.

    With ``tls`` the connection is encrypted.
    """

    pattern: str
    block: int
    depth: int
    tls: bool = False

    @property
    def name(self) -> str:
        """As in tables: ``randread 4k qd32``, ``read 1M qd4 tls``."""
        size = f"{self.block // KIB}k" if self.block < KIB * KIB else f"{self.block >> 20}M"
        return f"{self.pattern} {size} qd{self.depth}{' tls' if self.tls else ''}"

    @property
    def writes(self) -> bool:
        return "read" not in self.pattern


JOBS = (
    Job("randread", 4 * KIB, 1),
    Job("randwrite", 4 * KIB, 1),
    Job("randrw", 4 * KIB, 1),
    Job("randread", 4 * KIB, 32),
    Job("randwrite", 4 * KIB, 32),
    Job("randrw", 4 * KIB, 32),
    Job("randread", 16 * KIB, 32),
    Job("randwrite", 16 * KIB, 32),
    Job("randread", 64 * KIB, 32),
    Job("randwrite", 64 * KIB, 32),
    Job("read", 1024 * KIB, 4),
    Job("write", 1024 * KIB, 4),
    Job("randread", 4 * KIB, 32, tls=True),
    Job("randwrite", 4 * KIB, 32, tls=True),
    Job("read", 1024 * KIB, 4, tls=True),
    Job("write", 1024 * KIB, 4, tls=True),
)


@dataclass(frozen=True)
class Load:
    """What fio saw: requests a second, 99th percentile of their latency, and how many there were.

    For a job that reads and writes, the percentile is the worse of the two.
    """

    iops: float
    p99_microseconds: float
    operations: int


def run_fio(
    job: Job,
    uri: str,
    size: int,
    milliseconds: int,
    seed: int,
    clients: int = 1,
    rate: int | None = None,
) -> Load:
    """Put ``job`` on an export of ``size`` bytes; BenchError when any request failed.

    Every one of ``clients`` does it, on a connection of its own; the figures are of all together.
    With a ``rate``, each sends no more than so many reads and so many writes a second, at random
    moments.
    """
    command = [
        "fio",
        "--thread",  # one process, so that ending it ends all of it
        "--name=job",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={job.pattern}",
        f"--bs={job.block}",
        f"--iodepth={job.depth}",
        f"--size={size}",
        "--norandommap",
        f"--randseed={seed}",
        "--time_based",
        f"--runtime={milliseconds}ms",
        f"--numjobs={clients}",
        "--group_reporting",
        "--output-format=json",
        *([] if rate is None else [f"--rate_iops={rate}", "--rate_process=poisson"]),
    ]
    return parse_fio(run(*command, timeout=60 + milliseconds / 100))


def parse_fio(output: str) -> Load:
    """The figures of fio's one job; text in front of the JSON is skipped."""
    try:
        job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    except (ValueError, LookupError) as error:
        raise BenchError(f"fio's output is not the JSON it should be: {output[:300]}") from error
    if job["error"]:
        raise BenchError(f"fio: the server failed requests with error {job['error']}")
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides:
        raise BenchError("fio: not a single request was answered")
    return Load(
        iops=sum(side["iops"] for side in sides),
        p99_microseconds=max(side["clat_ns"]["percentile"]["99.000000"] for side in sides) / 1000,
        operations=sum(side["total_ios"] for side in sides),
    )
