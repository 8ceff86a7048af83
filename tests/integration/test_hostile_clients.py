"""Hostile clients: random ones, hundreds of them, against a daemon that serves others meanwhile.

NBDSERVE_STORM_SEED and NBDSERVE_STORM_SECONDS make it another storm, and a longer one (`make
torture`).
"""

import os
import random
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.live import PARKED, Address, Regular, Storm, open_export
from tests.fuzz.wire import SIMPLE_REPLIES

from .parts import MIB, Daemon, run, serve_options

SCENES = 150
WARM_UP = 60
SEED = int(os.environ.get("NBDSERVE_STORM_SEED", "1"))
SECONDS = float(os.environ.get("NBDSERVE_STORM_SECONDS", "0"))
# Of one process: what a parked connection may hold (a WRITE of the largest payload, buffers), and
# what may stay when all are gone (arenas of the allocator).
MOST_HELD = PARKED * 40 * MIB
MOST_KEPT = 48 * MIB


def processes(daemon: Daemon) -> list[int]:
    """The daemon and its workers."""
    assert daemon.process is not None
    workers = [worker["pid"] for worker in daemon.json("status")["workers"]]
    assert len(workers) == 2
    return [daemon.process.pid, *workers]


def descriptors(pid: int) -> list[str]:
    """What a process has open, sockets and pipes without their numbers."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(link.readlink()).partition(":[")[0])
        except FileNotFoundError:
            continue
    return sorted(found)


def memory(pid: int, kind: str) -> int:
    """Bytes: "RssAnon" is what it has of its own, "VmHWM" the most that it ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1]) * 1024


def settled(daemon: Daemon, before: dict[int, list[str]]) -> None:
    """Wait until nobody is connected and each process has open what it had open before."""
    deadline = time.monotonic() + 45
    while True:
        clients = daemon.json("status")["clients"]
        now = {pid: descriptors(pid) for pid in before}
        if not clients and now == before:
            return
        assert time.monotonic() < deadline, (
            f"{clients} clients; open beside what was before: "
            + str({pid: [one for one in now[pid] if now[pid].count(one) > before[pid].count(one)]
                   for pid in before})
        )  # fmt: skip
        time.sleep(0.2)


def read(daemon: Daemon, export: str, copy: Path) -> bytes:
    copy.unlink(missing_ok=True)
    run("nbdcopy", daemon.uri(export), copy)
    return copy.read_bytes()


@pytest.mark.timeout(300 + 3 * SECONDS)
def test_a_storm(
    start_daemon: Callable[..., Daemon],
    data_directory: Path,
    certificates: Path,
    tmp_path: Path,
) -> None:
    daemon = start_daemon(
        data_directory, "--workers", "2", *serve_options(certificates), "--tls", "optional"
    )
    tls = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    tls.check_hostname = False
    addresses = [
        Address(where, context)
        for where in (str(daemon.socket), ("127.0.0.1", daemon.port))
        for context in (None, tls)
    ]
    unix = addresses[0]
    sizes = {"victim": 16 * MIB, "second": 8 * MIB, "huge": 1 << 40}
    for name, size in {**sizes, "regular": 8 * MIB, "bystander": 8 * MIB}.items():
        daemon.create(name, size)
    content = random.Random(SEED).randbytes(8 * MIB)
    (tmp_path / "content").write_bytes(content)
    for name in ("bystander", "victim"):
        run("nbdcopy", tmp_path / "content", daemon.uri(name))
    daemon.take_snapshot("victim@before")
    frozen = read(daemon, "victim@before", tmp_path / "copy")
    storm = Storm(addresses, {**sizes, "victim@before": 16 * MIB}, SEED)

    try:
        storm.play(WARM_UP)
    except BaseException:
        print(daemon.read_log()[-3000:])
        raise
    storm.end()
    settled(daemon, {})
    before = {pid: descriptors(pid) for pid in processes(daemon)}
    kept = {pid: memory(pid, "RssAnon") for pid in before}

    regular = Regular(unix, "regular", 8 * MIB, SEED)
    # The bystander's volume is open, and nobody says anything.
    with open_export(unix, "bystander", SIMPLE_REPLIES):
        regular.start()
        ends = time.monotonic() + SECONDS
        try:
            storm.play(SCENES)
        except BaseException:
            print(daemon.read_log()[-3000:])
            raise
        while time.monotonic() < ends:
            storm.play(10)
            assert regular.failure is None, regular.failure
        requests = regular.requests
        assert daemon.json("status")["clients"] >= 2
        storm.end()
        regular.stop()
    assert requests > sum(storm.played.values()), "it was hardly served"
    print(f"played {storm.played}, {requests} requests of the regular client")

    settled(daemon, before)
    for pid in before:
        most, now = memory(pid, "VmHWM"), memory(pid, "RssAnon")
        print(f"process {pid}: {most >> 20} MiB at most, {now >> 20} now, {kept[pid] >> 20} before")
        assert now - kept[pid] < MOST_KEPT
        assert most - kept[pid] < MOST_HELD
    assert processes(daemon) == list(before), "a worker has ended"
    assert read(daemon, "bystander", tmp_path / "copy") == content
    assert read(daemon, "victim@before", tmp_path / "copy") == frozen
    assert "request failed" not in daemon.read_log()
    assert daemon.stop() == 0
    daemon.start()  # what it left behind can be opened
    assert read(daemon, "bystander", tmp_path / "copy") == content
