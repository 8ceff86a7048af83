"""Few changes all over a large disk, then a backup, to a directory.

The disk is 10 GiB, of which pieces of 1 MiB at random places hold data, half random and half text;
the rest is holes, in the volume and in restic's image alike. After a first backup, in each round,
10,000 blocks of 4 KiB chosen at random, in holes too, get random content, and both programs back it
up again. The bytes are those by which the repository grows; “before compression” are the chunks in
full, or the blocks of them that are in patches, and the pages that name them as they are stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.bench.process import tell
from scripts.bench.scale import BLOCK, MIB
from scripts.bench.servers import NBDSERVE, Nbdserve
from scripts.bench_repository.contestants import Restic
from scripts.bench_repository.disk import Disk, scattered_pieces
from scripts.bench_repository.measuring import Cost, measure
from scripts.bench_repository.results import Measurement, Results
from scripts.bench_repository.scale import Scale
from scripts.bench_repository.stores import Bucket, Directory, Place
from snapshots.repository import init_repository

_VOLUME = "scattered"
_SEED = 12
MOST_BYTES = 17
LEAST_RATE = 30


def measure_scattered(
    scale: Scale, directory: Path, ours: Nbdserve, _bucket: Bucket, results: Results
) -> None:
    """Into ``results``: a value of each round. Two full disks have no room in an S3 server here."""
    disk = Disk(ours, directory / "scattered.raw", scale.scattered)
    disk.fill(scattered_pieces(scale.scattered, scale.scattered_data, _SEED))
    disk.new_volume(_VOLUME)
    root = Directory(directory)
    place = root.place("scattered")
    init_repository(place.url)
    with_restic = "restic" not in results.absent
    restic = Restic("restic", disk, directory)
    found: dict[tuple[str, str], list[float]] = {}

    def note(what: str, unit: str, value: float) -> None:
        found.setdefault((what, unit), []).append(value)

    if with_restic:
        restic.begin(root.place("scattered-restic"))
        first = restic.push("first")
        tell(f"  first backup, restic: {first.seconds:.2f} s")
    first, _ = back_up(ours, _VOLUME, place)
    tell(f"  first backup: {first.seconds:.2f} s")
    changed = scale.writes * BLOCK
    for turn in range(scale.rounds):
        disk.change(scale.writes, seed=100 + turn)
        before = place.sizes()
        cost, report = back_up(ours, _VOLUME, place)
        grown = {key: size for key, size in place.sizes().items() if key not in before}
        pages = sum(size for key, size in grown.items() if key.startswith("pages/"))
        note("seconds", "s", cost.seconds)
        note("CPU time", "s", cost.cpu)
        note("memory", "MiB", cost.peak / MIB)
        note("stored ÷ changed bytes", "", sum(grown.values()) / changed)
        note("before compression ÷ changed bytes", "", (report["changed"] + pages) / changed)
        if with_restic:
            taken = restic.stored()
            theirs = restic.push(f"turn-{turn}")
            note("restic: seconds", "s", theirs.seconds)
            note("restic: CPU time", "s", theirs.cpu)
            note("restic: memory", "MiB", theirs.peak / MIB)
            note("restic: stored ÷ changed bytes", "", (restic.stored() - taken) / changed)
            note("restic's seconds ÷ ours", "", theirs.seconds / cost.seconds)
    data = f"{scale.scattered >> 20:,} MiB holding {scale.scattered_data >> 20:,}"
    targets = {
        "before compression ÷ changed bytes": (MOST_BYTES, False),
        "restic's seconds ÷ ours": (LEAST_RATE, True),
    }
    for (what, unit), values in found.items():
        target, least = targets.get(what, (None, False))
        label = f"{scale.writes:,} writes of 4 KiB over {data}: {what}"
        measurement = Measurement("scattered", label, values, unit, target, least)
        tell(f"  {what}: {measurement.value:.3g} {unit}")
        results.measurements.append(measurement)
    if with_restic:
        restic.end()
    place.remove()


def back_up(ours: Nbdserve, volume: str, place: Place) -> tuple[Cost, dict[str, Any]]:
    """``nbdserve backup`` of one volume: what it took, and what it says it did."""
    command = (NBDSERVE, "backup", volume, "--repo", place.url, "--json", "--data", ours.data)
    cost, output = measure(*command, daemon=ours.pid)
    return cost, json.loads(output)["backups"][0]
