"""A large volume that is restored lazily from S3: how soon it is read.

Timed from the start of ``repo restore --lazy`` until a client has connected and read 4 KiB that
hold data; then single reads of other chunks, while the rest is fetched in the background.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.process import BenchError, tell
from scripts.bench.scale import BLOCK, GIB, MIB
from scripts.bench.servers import NBDSERVE, Nbdserve
from scripts.bench_repository.contestants import delete_volume
from scripts.bench_repository.disk import scattered_pieces
from scripts.bench_repository.measuring import measure
from scripts.bench_repository.probe_scattered import back_up
from scripts.bench_repository.results import Measurement, Results
from scripts.bench_repository.scale import Scale
from scripts.bench_repository.stores import Bucket
from snapshots.repository import init_repository

MOST_SECONDS = 1
_VOLUME = "large"
_RESTORED = "lazy"
_SEED = 14


def measure_lazy(
    scale: Scale,
    directory: Path,
    ours: Nbdserve,
    bucket: Bucket,
    results: Results,
) -> None:
    """Into ``results``, in seconds and milliseconds."""
    ours.command("volume", "create", _VOLUME, "--size", str(scale.lazy))
    chosen = random.Random(_SEED)
    expected: dict[int, bytes] = {}
    with Client(ours.socket, _VOLUME) as client:
        for offset, piece in scattered_pieces(scale.lazy, scale.lazy_data, _SEED):
            client.write(offset, piece)
            block = chosen.randrange(MIB // BLOCK) * BLOCK
            expected[offset + block] = piece[block : block + BLOCK]
        client.flush()
    place = bucket.place("lazy")
    init_repository(place.url)
    _, report = back_up(ours, _VOLUME, place)
    label = f"{_VOLUME}@{report['snapshot']}"
    firsts, others = [], []
    for _ in range(scale.rounds):
        places = chosen.sample(list(expected), min(scale.lazy_reads + 1, len(expected)))
        command = (NBDSERVE, "repo", "restore", place.url, label, _RESTORED, "--lazy")
        cost, _ = measure(*command, "--data", ours.data, daemon=ours.pid)
        begin = time.monotonic()
        with Client(ours.socket, _RESTORED) as client:
            for number, offset in enumerate(places):
                if client.read(offset, BLOCK) != expected[offset]:
                    raise BenchError(f"what was restored lazily is wrong at offset {offset}")
                end = time.monotonic()
                if number == 0:
                    firsts.append(cost.seconds + end - begin)
                else:
                    others.append(1e3 * (end - begin))
                begin = end
        delete_volume(ours, _RESTORED)
    what = f"lazy restore of {scale.lazy // GIB} GiB holding {scale.lazy_data >> 20:,} MiB"
    for measurement in (
        Measurement("lazy", f"{what}: first byte", firsts, "s", MOST_SECONDS),
        Measurement("lazy", f"{what}: 4 KiB elsewhere, one after the other", others, "ms"),
    ):
        tell(f"  {measurement.what}: {measurement.value:.3g} {measurement.unit}")
        results.measurements.append(measurement)
    place.remove()
