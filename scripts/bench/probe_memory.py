"""Resident memory of the daemon with a volume of 16 TiB: empty, and after writes all over it."""

from __future__ import annotations

import random
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.process import tell
from scripts.bench.results import Measurement, Results
from scripts.bench.scale import BLOCK, MIB, Scale
from scripts.bench.servers import Nbdserve

SIZE = 16 << 40


def measure_memory(scale: Scale, directory: Path, sockets: Path, results: Results) -> None:
    """Into ``results``, in MiB."""
    ours = Nbdserve(directory / "nbdserve", sockets)

    def record(what: str) -> None:
        value = ours.resident() / MIB
        tell(f"  {what}: {value:.0f} MiB")
        results.measurements.append(Measurement("memory", what, value, "MiB"))

    with ours.serving():
        ours.wait_until_started()
        record("no volume")
        ours.command("volume", "create", "empty", "--size", str(SIZE))
        with Client(ours.socket, "empty") as client:
            client.read(SIZE // 2, BLOCK)
            record("a volume of 16 TiB open, empty")
    for piece in (MIB, BLOCK):
        volume = f"by-{piece}"
        what = f"{scale.touched >> 20} MiB written in pieces of {piece >> 10} KiB all over 16 TiB"
        with ours.serving():  # anew: what the allocator kept of the last volume is not this one's
            ours.wait_until_started()
            ours.command("volume", "create", volume, "--size", str(SIZE))
            with Client(ours.socket, volume) as client:
                _scatter(client, piece, scale.touched // piece)
                record(what)


def _scatter(client: Client, piece: int, count: int) -> None:
    chosen = random.Random(6)
    data = chosen.randbytes(piece)
    places = ((chosen.randrange(SIZE // piece) * piece, data) for _ in range(count))
    client.write_many(places)
    client.flush()
