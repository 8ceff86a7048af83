"""How long a TRIM of a whole volume takes, and what it does to a client that writes meanwhile.

1 TiB with data scattered over it in pieces of 64 KiB, as a file system in use leaves it; trimmed in
steps of 2 GiB, one after the other, as mkfs does where lengths have 32 bits, and in one request of
64 bits. Timed are the TRIM, a FLUSH right behind it, how long until the space is back, and the TRIM
of what is trimmed already. Once more with the data below a snapshot, where no space is to come
back, and with a client that writes 4 KiB blocks without a pause: what its requests take before, and
until the space is back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.probe_gate import WriteLoop
from scripts.bench.process import BenchError, tell
from scripts.bench.results import Measurement, Results
from scripts.bench.scale import BLOCK, GIB, MIB, Scale
from scripts.bench.servers import Nbdserve

SIZE = 1 << 40
PIECE = 64 << 10
STEP = 2 * GIB
_VOLUME = "trimmed"
# What the other client writes to: little, so that it does not count as space that is not back.
_WRITTEN = range(0, 4 * MIB, BLOCK)
_BEFORE_SECONDS = 1.0
_BACK_SECONDS = 900


def measure_trim(scale: Scale, directory: Path, sockets: Path, results: Results) -> None:
    """Into ``results``, in seconds and milliseconds."""
    probe = _Probe(Nbdserve(directory / "nbdserve", sockets), scale, results)
    with probe.ours.serving():
        probe.ours.command("volume", "create", _VOLUME, "--size", str(SIZE))
        probe.fill()
        probe.trim("in steps of 2 GiB", extended=False)
        probe.fill()
        probe.trim("in one request", extended=True)
        probe.fill()
        probe.trim_beside_a_writer()
        probe.fill()
        probe.ours.take_snapshot(_VOLUME, "s")
        probe.trim("in steps of 2 GiB, the data below a snapshot", extended=False, space=False)
        probe.ours.command("volume", "create", "zeroed", "--size", str(8 * SIZE))
        with Client(probe.ours.socket, "zeroed", extended=True) as client:
            client.trim(0, BLOCK)  # opened
            probe.record("WRITE_ZEROES of 8 TiB, empty", lambda: client.write_zeroes(0, 8 * SIZE))


class _Probe:
    def __init__(self, ours: Nbdserve, scale: Scale, results: Results) -> None:
        self.ours = ours
        self._scale = scale
        self._results = results
        self._chosen = random.Random(8)

    def fill(self) -> None:
        """Scatter the data anew."""
        data = self._chosen.randbytes(PIECE)
        places = self._chosen.sample(range(SIZE // PIECE), self._scale.trimmed // PIECE)
        with Client(self.ours.socket, _VOLUME) as client:
            for place in places:
                client.write(place * PIECE, data)
            client.flush()

    def record(self, what: str, action: Callable[[], None]) -> None:
        """Time something."""
        begin = time.monotonic()
        action()
        self.note(what, time.monotonic() - begin, "s")

    def note(self, what: str, value: float, unit: str) -> None:
        """One figure."""
        tell(f"  {what}: {value:.3g} {unit}")
        self._results.measurements.append(Measurement("trim", what, value, unit))

    def trim(self, how: str, *, extended: bool, space: bool = True) -> None:
        """TRIM everything, FLUSH, wait for the space if there is any, and TRIM again."""
        with Client(self.ours.socket, _VOLUME, extended=extended) as client:
            self.record(f"TRIM of 1 TiB {how}", lambda: _trim_all(client, extended))
            self.record(f"FLUSH behind a TRIM {how}", client.flush)
            if space:
                self.record(f"the space is back after a TRIM {how}", self._wait_for_space)
            self.record(f"a second TRIM {how}", lambda: _trim_all(client, extended))

    def trim_beside_a_writer(self) -> None:
        """The same while another client writes, and what becomes of its requests."""
        loop = WriteLoop(self.ours.socket, _VOLUME, _WRITTEN, seed=9)
        loop.start()
        try:
            time.sleep(_BEFORE_SECONDS)
            middle = time.monotonic()
            self.trim("in steps of 2 GiB beside a writer", extended=False)
        finally:
            loop.stop()
        for when, requests in (
            ("before", [request for request in loop.requests if request[1] < middle]),
            (
                "until the space is back",
                [request for request in loop.requests if request[1] > middle],
            ),
        ):
            times = sorted(end - begin for begin, end in requests)
            self.note(f"99th percentile of a 4k write {when}", 1e3 * _percentile(times), "ms")
            self.note(f"longest 4k write {when}", 1e3 * times[-1], "ms")

    def _wait_for_space(self) -> None:
        enough = self._scale.trimmed // 100 + 2 * len(_WRITTEN) * BLOCK
        deadline = time.monotonic() + _BACK_SECONDS
        while self._used() > enough:
            if time.monotonic() > deadline:
                raise BenchError(f"the space of a TRIM is not back after {_BACK_SECONDS} s")
            time.sleep(0.02)

    def _used(self) -> int:
        files = self.ours.data.glob("layers/*/data-*")
        return sum(path.stat().st_blocks * 512 for path in files)


def _trim_all(client: Client, extended: bool) -> None:
    step = SIZE if extended else STEP
    for offset in range(0, SIZE, step):
        client.trim(offset, step)


def _percentile(times: list[float]) -> float:
    return times[int(len(times) * 0.99)]
