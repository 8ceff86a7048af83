"""How long a client waits for the first byte of a volume with very many extents.

Every second block of the volume is written, so that each is an extent of its own. Timed is from
before the connection until the first read is answered, on a daemon just started, with the files in
the page cache: while the extents are in the journal of the head, and when a snapshot has turned
that into an index. An empty volume shows what of it is not due to the extents.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.process import run, tell
from scripts.bench.results import Measurement, Results
from scripts.bench.scale import BLOCK, Scale
from scripts.bench.servers import Nbdserve

TARGET_SECONDS = 1.0
_REPETITIONS = 3
_SEALING_SECONDS = 120


def measure_opening(scale: Scale, directory: Path, sockets: Path, results: Results) -> None:
    """Into ``results``."""
    ours = Nbdserve(directory / "nbdserve", sockets)
    size = 2 * scale.extents * BLOCK
    with ours.serving() as daemon:
        ours.command("volume", "create", "empty", "--size", str(size))
        ours.command("volume", "create", "holes", "--size", str(size))
        run(
            "fio", "--thread", "--name=fill", "--ioengine=nbd", f"--uri={daemon.uri('holes')}",
            f"--rw=write:{BLOCK}", f"--bs={BLOCK}", "--iodepth=32", f"--size={size}",
        )  # fmt: skip
        with Client(ours.socket, "holes") as client:
            client.flush()
    _record(ours, results, "empty", "an empty volume", None)
    count = f"{scale.extents:,} extents"
    _record(ours, results, "holes", f"{count} in the head's journal", TARGET_SECONDS)
    with ours.serving():
        ours.command("snapshot", "create", "holes@all")
        _wait_for_index(ours)
    _record(ours, results, "holes", f"{count} in a sealed index", TARGET_SECONDS)


def _record(ours: Nbdserve, results: Results, volume: str, what: str, target: float | None) -> None:
    times = []
    for _ in range(_REPETITIONS):
        with ours.serving():
            ours.wait_until_started()
            begin = time.monotonic()
            with Client(ours.socket, volume) as client:
                client.read(0, BLOCK)
                times.append(time.monotonic() - begin)
    middle = statistics.median(times)
    tell(f"  {what}: first byte after {middle:.3f} s")
    results.measurements.append(
        Measurement("opening", f"connect to first read, {what}", middle, "s", target)
    )


def _wait_for_index(ours: Nbdserve) -> None:
    """Until the layer's journal has been rewritten as an index."""
    deadline = time.monotonic() + _SEALING_SECONDS
    while not list(ours.data.glob("layers/*/index")) and time.monotonic() < deadline:
        time.sleep(0.1)
