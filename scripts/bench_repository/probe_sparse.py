"""The backup of 16 TiB that hold little, and of which nothing changed, to S3."""

from __future__ import annotations

from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.process import tell
from scripts.bench.scale import MIB
from scripts.bench.servers import Nbdserve
from scripts.bench_repository.disk import scattered_pieces
from scripts.bench_repository.probe_scattered import back_up
from scripts.bench_repository.results import Measurement, Results
from scripts.bench_repository.scale import Scale
from scripts.bench_repository.stores import Bucket
from snapshots.repository import init_repository

SIZE = 16 << 40
DATA = 64 * MIB
MOST_SECONDS = 5
_VOLUME = "sparse"
_SEED = 13


def measure_sparse(
    scale: Scale,
    directory: Path,
    ours: Nbdserve,
    bucket: Bucket,
    results: Results,
) -> None:
    """Into ``results``, in seconds."""
    data = min(DATA, scale.image)
    ours.command("volume", "create", _VOLUME, "--size", str(SIZE))
    with Client(ours.socket, _VOLUME) as client:
        for offset, piece in scattered_pieces(SIZE, data, _SEED):
            client.write(offset, piece)
        client.flush()
    place = bucket.place("sparse")
    init_repository(place.url)
    first = back_up(ours, _VOLUME, place)[0].seconds
    again = [back_up(ours, _VOLUME, place)[0].seconds for _ in range(scale.rounds)]
    what = f"backup of 16 TiB holding {data >> 20} MiB"
    for label, values, target in (
        (f"{what}, the first", [first], None),
        (f"{what}, unchanged", again, MOST_SECONDS),
    ):
        tell(f"  {label}: {max(values):.2f} s at most")
        results.measurements.append(Measurement("sparse", label, values, "s", target))
    place.remove()
