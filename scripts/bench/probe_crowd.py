"""What a crowd of clients costs that are connected and idle, or stuck in the middle of a request.

Many clients work on a volume, alone and with the crowd on the same volume (so in the same process),
in turn; medians. The crowd is there over a Unix socket, then the same with TLS, which the daemon
relays. Memory is that of the daemon and its workers, for each connection of a kind. An idle client
has read a block; what stuck ones have sent is in crowd.py.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.crowd import STUCK, Crowd
from scripts.bench.jobs import KIB, Job, run_fio
from scripts.bench.process import read_cpu_seconds, tell
from scripts.bench.results import Measurement, Results
from scripts.bench.scale import MIB, Scale
from scripts.bench.servers import EXPORT, Nbdserve, Server, make_certificates

_JOB = Job("randrw", 4 * KIB, 4)
_SETTLE = 1.0  # seconds from the last client of a kind to the look at memory
_SIZE = 64 * MIB


def measure_crowd(scale: Scale, directory: Path, sockets: Path, results: Results) -> None:
    """Into ``results``: memory for each client, and how fast others go on."""
    ours = Nbdserve(directory / "nbdserve", sockets)
    certificates = make_certificates(directory / "certificates")
    for tls in (False, True):
        with ours.serving(certificates) as daemon:
            if not tls:
                ours.command("volume", "create", EXPORT, "--size", str(_SIZE))
                with Client(ours.socket, EXPORT) as client:
                    for offset in range(0, _SIZE, MIB):
                        client.write(offset, bytes(range(256)) * (MIB // 256))
            with Client(ours.socket, EXPORT):  # so that the volume is open all the while
                _measure_memory(scale, ours, tls, results)
                _measure_speed(scale, ours, daemon, tls, results)


def _measure_memory(scale: Scale, ours: Nbdserve, tls: bool, results: Results) -> None:
    def record(what: str, count: int, before: int) -> int:
        time.sleep(_SETTLE)
        now = ours.resident()
        value = (now - before) / count / KIB
        what = f"memory for each client{' with TLS' if tls else ''}: {what}"
        tell(f"  {what}: {value:.0f} KiB")
        results.measurements.append(Measurement("crowd", what, value, "KiB"))
        return now

    with Crowd(ours.socket, EXPORT, tls=tls) as crowd:
        memory = ours.resident()
        crowd.add_idle(scale.idle)
        memory = record("idle", scale.idle, memory)
        for what, sent in STUCK.items():
            count = scale.stuck // len(STUCK)
            crowd.add_stuck(count, sent)
            memory = record(what, count, memory)


def _measure_speed(
    scale: Scale, ours: Nbdserve, daemon: Server, tls: bool, results: Results
) -> None:
    rates: dict[bool, list[float]] = {False: [], True: []}
    times: dict[bool, list[float]] = {False: [], True: []}

    def measure(crowded: bool, turn: int) -> None:
        uri = daemon.uri(EXPORT)
        before = read_cpu_seconds(daemon.pid)
        load = run_fio(_JOB, uri, _SIZE, scale.job_milliseconds, turn + 1, scale.working)
        used = read_cpu_seconds(daemon.pid) - before
        rates[crowded].append(load.iops)
        times[crowded].append(used / load.operations * 1e6)

    for turn in range(scale.rounds):
        measure(False, turn)
        with Crowd(ours.socket, EXPORT, tls=tls) as crowd:
            crowd.add_idle(scale.idle)
            for sent in STUCK.values():
                crowd.add_stuck(scale.stuck // len(STUCK), sent)
            time.sleep(_SETTLE)
            measure(True, turn)
        time.sleep(_SETTLE)
    work = f"{scale.working} clients, {_JOB.name}"
    crowd_of = f"{scale.idle:,} idle and {scale.stuck} stuck{' with TLS' if tls else ''}"
    for crowded, where in ((False, f"alone, before {crowd_of}"), (True, f"beside {crowd_of}")):
        for value, unit in (
            (statistics.median(rates[crowded]), "a second"),
            (statistics.median(times[crowded]), "µs of server CPU each"),
        ):
            tell(f"  {work}, {where}: {value:,.1f} {unit}")
            results.measurements.append(Measurement("crowd", f"{work}, {where}", value, unit))
