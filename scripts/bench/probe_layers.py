"""What reading costs across layers, by how many there are and how finely they are mixed.

The same jobs, in turn, as in the comparison, on volumes of one layer, of as many as the compared
volume has, and of very many; each block, or each 64 KiB, is in a layer chosen at random.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.jobs import Job, run_fio
from scripts.bench.layering import assign, build, make_content
from scripts.bench.process import tell
from scripts.bench.results import Measurement, Results
from scripts.bench.scale import BLOCK, MIB, Scale
from scripts.bench.servers import Nbdserve

_JOBS = (Job("randread", 4096, 32), Job("randread", 65536, 32), Job("read", MIB, 4))


@dataclass(frozen=True)
class Mixture:
    """A volume of so many layers, with so many neighbouring blocks in the same one."""

    layers: int
    together: int

    @property
    def volume(self) -> str:
        return f"layers-{self.layers}-by-{self.together}"

    def __str__(self) -> str:
        if self.layers == 1:
            return "1 layer"
        return f"{self.layers} layers mixed by {self.together * BLOCK >> 10} KiB"


def measure_layers(scale: Scale, directory: Path, sockets: Path, results: Results) -> None:
    """Into ``results``: requests a second on each of the volumes, medians of the rounds."""
    ours = Nbdserve(directory / "nbdserve", sockets)
    content = memoryview(make_content(scale.volume, seed=4))
    few = scale.snapshots + 1
    mixtures = (Mixture(1, 1), Mixture(few, 16), Mixture(few, 1), Mixture(scale.layers, 1))
    with ours.serving() as daemon:
        for mixture in mixtures:
            ours.command("volume", "create", mixture.volume, "--size", str(scale.volume))
            assignment = assign(scale.volume // BLOCK, mixture.layers, 5, mixture.together)
            seal = partial(_seal, ours, mixture.volume)
            build(ours.socket, mixture.volume, assignment, content, seal)
        for job in _JOBS:
            rates: dict[Mixture, list[float]] = {mixture: [] for mixture in mixtures}
            for turn in range(scale.rounds):
                for mixture in mixtures:
                    with Client(ours.socket, mixture.volume):
                        uri = daemon.uri(mixture.volume)
                        load = run_fio(job, uri, scale.volume, scale.job_milliseconds, turn + 1)
                    rates[mixture].append(load.iops)
            for mixture in mixtures:
                middle = statistics.median(rates[mixture])
                tell(f"  {job.name}, {mixture}: {middle:,.0f} a second")
                results.measurements.append(
                    Measurement("layers", f"{job.name}, {mixture}", middle, "a second")
                )


def _seal(ours: Nbdserve, volume: str, layer: int) -> None:
    ours.take_snapshot(volume, f"s{layer}")
