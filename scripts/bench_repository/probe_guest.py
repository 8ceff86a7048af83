"""What a push does to the guest: the 99th percentile of its latency, idle and meanwhile.

The guest is fio: 4 KiB at random places of the mixed disk, as many reads as writes, at a fixed
moderate rate. The disk's snapshot is pushed in full again and again meanwhile, each time to another
repository, to S3 and to a directory. Pusher, fio and daemon share the processors, and so does the
S3 server; since that takes none of them where it is another machine, here it has the lowest
priority. A ratio is taken within a round.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

from scripts.bench.jobs import KIB, Job, run_fio
from scripts.bench.process import DIE_WITH_PARENT, BenchError, tell
from scripts.bench.servers import NBDSERVE, Nbdserve, Server
from scripts.bench_repository.disk import Disk, mixed_pieces
from scripts.bench_repository.results import Measurement, Results
from scripts.bench_repository.scale import Scale
from scripts.bench_repository.stores import Bucket, Directory, Place
from snapshots.repository import init_repository

RATE = 500  # of reads and of writes, a second
MOST_TIMES = 2
_JOB = Job("randrw", 4 * KIB, 4)
_VOLUME = "guest"
_SNAPSHOT = "s"
_SEED = 15
_SETTLE = 3.0  # seconds, until the disk has what was written before


def measure_guest(
    scale: Scale, directory: Path, ours: Nbdserve, bucket: Bucket, results: Results
) -> None:
    """Into ``results``, in milliseconds, and as ratios."""
    disk = Disk(ours, directory / "guest.raw", scale.image)
    disk.fill(mixed_pieces(scale.image, _SEED))
    disk.new_volume(_VOLUME)
    ours.take_snapshot(_VOLUME, _SNAPSHOT)
    uri = Server(ours.socket, ours.pid).uri(_VOLUME)
    places: dict[str, Bucket | Directory] = {"S3": bucket, "a directory": Directory(directory)}
    latencies: dict[str, list[float]] = {"idle": [], **{name: [] for name in places}}

    def run(seed: int) -> float:
        load = run_fio(_JOB, uri, scale.image, scale.seconds * 1000, seed, rate=RATE)
        return load.p99_microseconds / 1e3

    bucket.let_others_go_first()
    for turn in range(scale.rounds):
        os.sync()
        time.sleep(_SETTLE)
        latencies["idle"].append(run(3 * turn + 1))
        for number, (name, where) in enumerate(places.items()):
            # More than there is time for, made before: making one is not what is measured.
            targets = [where.place(f"guest-{turn}-{number}-{i}") for i in range(scale.seconds + 1)]
            for target in targets:
                init_repository(target.url)
            with _Pushing(ours, targets):
                latencies[name].append(run(3 * turn + 2 + number))
    for name, values in latencies.items():
        what = "idle" if name == "idle" else f"during pushes to {name}"
        guest = f"99th percentile of {2 * RATE:,} requests of 4 KiB a second"
        found = [Measurement("guest", f"{guest}, {what}", values, "ms")]
        if name != "idle":
            times = [value / idle for value, idle in zip(values, latencies["idle"], strict=True)]
            found.append(Measurement("guest", f"{guest}, {what} ÷ idle", times, "", MOST_TIMES))
        for measurement in found:
            tell(f"  {measurement.what}: {measurement.value:.3g} {measurement.unit}")
        results.measurements += found


class _Pushing(threading.Thread):
    """Pushes to one empty repository after the other, in a ``with`` block."""

    def __init__(self, ours: Nbdserve, targets: list[Place]) -> None:
        super().__init__()
        self._ours = ours
        self._targets = targets
        self._lock = threading.Lock()
        self._ended = False
        self._running: subprocess.Popen[bytes] | None = None
        self._failure: str | None = None

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            if self._running is not None:
                self._running.terminate()
        self.join()
        for place in self._targets:
            place.remove()
        if self._failure is not None:
            raise BenchError(f"pushing beside the guest: {self._failure}")

    def run(self) -> None:
        for place in self._targets:
            if self._failure is not None or self._ended:
                return
            try:
                self._failure = self._push(place)
            except OSError as error:
                self._failure = str(error)
        self._failure = self._failure or "it came to an end"

    def _push(self, place: Place) -> str | None:
        """Why it failed, unless it was ended."""
        command = [str(NBDSERVE), "repo", "push", f"{_VOLUME}@{_SNAPSHOT}", place.url]
        with self._lock:
            if self._ended:
                return None
            self._running = subprocess.Popen(
                [*DIE_WITH_PARENT, *command, "--data", str(self._ours.data)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        complaints = self._running.communicate()[1].decode(errors="replace").strip()
        if self._ended or not self._running.returncode:
            return None
        return complaints.splitlines()[-1] if complaints else "no word of why"
