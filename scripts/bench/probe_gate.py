"""How long a snapshot holds up a client that writes without a pause.

A client writes 4 KiB at random places of 1 GiB, one request at a time, and notes how long each
took. Counted is the longest of those under way while a command runs and shortly after: ``snapshot
create``, and for comparison ``snapshot list``, which costs the machine as much but takes no
snapshot. The same through the control socket, with no new process that competes for processors.

On the largest volume once more with writes all over it, where each allocates in another part of
the file system: what that does to ``snapshot list`` is the file system's.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.process import tell
from scripts.bench.results import Measurement, Results
from scripts.bench.scale import BLOCK, GIB, Scale
from scripts.bench.servers import Nbdserve

TARGET_MILLISECONDS = 10
LARGEST = 16 << 40
_SETTLE = 0.5  # seconds before and after: a snapshot has work left when its command has ended


class WriteLoop(threading.Thread):
    """Writes until ``stop``; ``requests`` holds (begin, end) of each in seconds."""

    def __init__(self, where: Path, volume: str, places: range, seed: int) -> None:
        super().__init__(daemon=True)
        self.requests: list[tuple[float, float]] = []
        self.failure: Exception | None = None
        self._where, self._volume, self._places = where, volume, places
        self._random = random.Random(seed)
        self._stop_asked = False

    def run(self) -> None:
        data = self._random.randbytes(BLOCK)
        clock, requests, places = time.monotonic, self.requests, self._places
        try:
            with Client(self._where, self._volume) as client:
                while not self._stop_asked:
                    offset = self._random.choice(places)
                    begin = clock()
                    client.write(offset, data)
                    requests.append((begin, clock()))
        except Exception as error:
            self.failure = error

    def stop(self) -> None:
        """End the loop; raises what ended it before."""
        self._stop_asked = True
        self.join()
        if self.failure:
            raise self.failure


def longest_between(requests: list[tuple[float, float]], first: float, last: float) -> float:
    """The longest of the requests that were under way at some time between, in seconds; or 0."""
    return max((end - begin for begin, end in requests if end > first and begin < last), default=0)


def measure_gate(scale: Scale, directory: Path, sockets: Path, results: Results) -> None:
    """Into ``results``, for each size of volume."""
    ours = Nbdserve(directory / "nbdserve", sockets)
    with ours.serving():
        for number, (label, size, places) in enumerate(
            (
                ("1 GiB", GIB, range(0, GIB, BLOCK)),
                ("16 TiB", LARGEST, range(LARGEST // 2, LARGEST // 2 + GIB, BLOCK)),
                ("16 TiB written all over", LARGEST, range(0, LARGEST, BLOCK)),
            )
        ):
            # None is deleted: the disk would be busy with what the last one leaves.
            volume = f"disk-{number}"
            ours.command("volume", "create", volume, "--size", str(size))
            _measure_volume(scale, ours, volume, places, label, results)


def _measure_volume(
    scale: Scale, ours: Nbdserve, volume: str, places: range, label: str, results: Results
) -> None:
    def create(number: int) -> None:
        ours.command("snapshot", "create", f"{volume}@command-{number}")

    def create_by_socket(number: int) -> None:
        ours.take_snapshot(volume, f"socket-{number}")

    loop = WriteLoop(ours.socket, volume, places, seed=3)
    loop.start()
    windows: dict[str, list[tuple[float, float]]] = {}
    actions: tuple[tuple[str, Callable[[int], None], float | None], ...] = (
        ("`snapshot list`, for comparison", lambda _: ours.command("snapshot", "list"), None),
        ("`snapshot create`", create, TARGET_MILLISECONDS),
        ("through the control socket", create_by_socket, TARGET_MILLISECONDS),
    )
    try:
        time.sleep(2 * _SETTLE)
        for number in range(scale.gate_repetitions):
            for name, action, _ in actions:
                begin = time.monotonic()
                action(number)
                time.sleep(_SETTLE)
                windows.setdefault(name, []).append((begin, time.monotonic()))
                if loop.failure:
                    break
    finally:
        loop.stop()
    for name, _, target in actions:
        stalls = [longest_between(loop.requests, *window) * 1e3 for window in windows[name]]
        middle, worst = statistics.median(stalls), max(stalls)
        tell(f"  {label}, {name}: longest stall {middle:.1f} ms (median), {worst:.1f} ms (most)")
        probe = f"longest stall of a 4k write, {label}, {name}"
        results.measurements += [
            Measurement("gate", f"{probe}: median of {len(stalls)}", middle, "ms", target),
            Measurement("gate", f"{probe}: most of {len(stalls)}", worst, "ms", target),
        ]
