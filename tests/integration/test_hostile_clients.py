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

from nbdserve.control.client import path
from tests.fuzz.live import PARKED, Address, Regular, Storm, open_export
from tests.fuzz.wire import SIMPLE_REPLIES, ProtocolError

from .parts import MIB, Daemon, run, serve_options

SCENES = 120
WARM_UP = 40
SEED = int(os.environ.get("NBDSERVE_STORM_SEED", "1"))
SECONDS = float(os.environ.get("NBDSERVE_STORM_SECONDS", "0"))
# Some storms meet a daemon that serves the volumes itself.
WORKERS = 2 if SEED % 4 else 1
# Of one process: what a parked connection may hold (a WRITE of the largest payload, buffers), and
# what may stay when all are gone: garbage not yet collected, and what the allocator keeps, which is
# more for a process that does everything, but does not grow with the storm's length.
MOST_HELD = PARKED * 40 * MIB
MOST_KEPT = 96 * MIB
SIZES = {"victim": 16 * MIB, "second": 8 * MIB, "huge": 1 << 40}

# Bugs, put into a daemon as it starts: one leaks a descriptor a connection, one memory, and one
# does not read past the payload of a refused WRITE.
LEAKS_DESCRIPTORS = """
import os
from nbdserve.server.connection import Connection
real = Connection.run
def run(self):
    os.open(os.devnull, os.O_RDONLY)
    return real(self)
Connection.run = run
"""
LEAKS_MEMORY = """
from nbdserve.server.session import Session
real, kept = Session.linger, []
def linger(self):
    kept.append(b"x" * (10 << 20))
    return real(self)
Session.linger = linger
"""
KEEPS_PAYLOADS = """
from nbdserve.server import transmission
transmission.payload_length = lambda request, style: 0
"""


def processes(daemon: Daemon) -> list[int]:
    """The daemon and its workers."""
    assert daemon.process is not None
    status = daemon.control().get(path("status"))
    return sorted({daemon.process.pid, *(worker["pid"] for worker in status["workers"])})


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


def settle(daemon: Daemon, before: dict[int, list[str]], patience: float = 45) -> None:
    """Wait until nobody is connected and each process has open what it had open before."""
    deadline = time.monotonic() + patience
    while True:
        clients = daemon.control().get(path("status"))["clients"]
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


def play(daemon: Daemon, storm: Storm, scenes: int) -> None:
    """Play scenes; what the daemon has to say about one that fails is shown."""
    try:
        storm.play(scenes)
    except BaseException:
        print(daemon.read_log()[-3000:])
        raise


def check_memory(kept: dict[int, int]) -> None:
    for pid, before in kept.items():
        most, now = memory(pid, "VmHWM"), memory(pid, "RssAnon")
        print(f"process {pid}: {most >> 20} MiB at most, {now >> 20} now, {before >> 20} before")
        assert now - before < MOST_KEPT, "memory is kept"
        assert most - before < MOST_HELD


def addresses_of(daemon: Daemon, certificates: Path) -> list[Address]:
    """A Unix socket and TCP, in plain and over TLS."""
    tls = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    tls.check_hostname = False
    return [
        Address(where, context)
        for where in (str(daemon.socket), ("127.0.0.1", daemon.port))
        for context in (None, tls)
    ]


@pytest.mark.timeout(300 + 3 * SECONDS)
def test_a_storm(
    start_daemon: Callable[..., Daemon],
    data_directory: Path,
    certificates: Path,
    tmp_path: Path,
) -> None:
    daemon = start_daemon(
        data_directory, "--workers", str(WORKERS), *serve_options(certificates), "--tls", "optional"
    )
    addresses = addresses_of(daemon, certificates)
    unix = addresses[0]
    for name, size in {**SIZES, "regular": 8 * MIB, "bystander": 8 * MIB}.items():
        daemon.create(name, size)
    content = random.Random(SEED).randbytes(8 * MIB)
    (tmp_path / "content").write_bytes(content)
    for name in ("bystander", "victim"):
        run("nbdcopy", tmp_path / "content", daemon.uri(name))
    daemon.take_snapshot("victim@before")
    frozen = read(daemon, "victim@before", tmp_path / "copy")
    storm = Storm(addresses, {**SIZES, "victim@before": 16 * MIB}, SEED)

    play(daemon, storm, WARM_UP)
    storm.end()
    settle(daemon, {})
    before = {pid: descriptors(pid) for pid in processes(daemon)}
    assert len(before) == (1 if WORKERS == 1 else 1 + WORKERS)
    kept = {pid: memory(pid, "RssAnon") for pid in before}

    regular = Regular(unix, "regular", 8 * MIB, SEED)
    # The bystander's volume is open, and nobody says anything.
    with open_export(unix, "bystander", SIMPLE_REPLIES):
        regular.start()
        ends = time.monotonic() + SECONDS
        play(daemon, storm, SCENES)
        while time.monotonic() < ends:
            play(daemon, storm, 10)
            assert regular.failure is None, regular.failure
        requests = regular.requests
        assert daemon.json("status")["clients"] >= 2
        storm.end()
        regular.stop()
    assert requests > sum(storm.played.values()), "it was hardly served"
    print(f"played {storm.played}, {requests} requests of the regular client")

    settle(daemon, before)
    check_memory(kept)
    assert processes(daemon) == list(before), "a worker has ended"
    assert read(daemon, "bystander", tmp_path / "copy") == content
    assert read(daemon, "victim@before", tmp_path / "copy") == frozen
    assert "request failed" not in daemon.read_log()
    assert daemon.stop() == 0
    daemon.start()  # what it left behind can be opened
    assert read(daemon, "bystander", tmp_path / "copy") == content


@pytest.mark.parametrize(
    ("bug", "error", "what"),
    [
        (LEAKS_DESCRIPTORS, AssertionError, "open beside what was before"),
        (LEAKS_MEMORY, AssertionError, "memory is kept"),
        (KEEPS_PAYLOADS, ProtocolError, "no reply|to nothing"),
    ],
    ids=["descriptors", "memory", "payloads"],
)
def test_a_storm_shows_bugs(
    bug: str,
    error: type[Exception],
    what: str,
    start_daemon: Callable[..., Daemon],
    data_directory: Path,
    certificates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(bug)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    daemon = start_daemon(data_directory, "--workers", "1", "--log-level", "error")
    for name, size in SIZES.items():
        daemon.create(name, size)
    storm = Storm([Address(str(daemon.socket))], SIZES, 1)
    before = {pid: descriptors(pid) for pid in processes(daemon)}
    kept = {pid: memory(pid, "RssAnon") for pid in before}
    with pytest.raises(error, match=what):
        storm.play(60)
        storm.end()
        settle(daemon, before, patience=3 if bug == LEAKS_DESCRIPTORS else 45)
        check_memory(kept)
