"""Limits under fio: over some seconds no more is done than they say, and not much less."""

import json
import subprocess
import time

import pytest

from .parts import DIE_WITH_PARENT, MIB, Daemon, require

SECONDS = 3


def start_load(daemon: Daemon, *options: str, seconds: int = SECONDS) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DIE_WITH_PARENT, "fio", "--name=load", "--ioengine=nbd", f"--uri={daemon.uri('disk')}",
         "--size=64M", "--time_based", f"--runtime={seconds}", "--output-format=json", *options],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def requests_of(load: subprocess.Popen[str], direction: str = "read") -> int:
    out, _ = load.communicate(timeout=120)
    assert load.returncode == 0, out
    return int(json.loads(out[out.index("{") :])["jobs"][0][direction]["total_ios"])


def counted(daemon: Daemon, command: str) -> int:
    """How many requests the daemon has answered."""
    (found,) = daemon.measurements()["exports"]
    return int(found["commands"][command]["count"])


@pytest.mark.parametrize("workers", [1, 2])
def test_fio_is_held_to_limits_that_change_while_it_runs(daemon: Daemon, workers: int) -> None:
    require("fio")
    daemon.create("disk", 64 * MIB)
    daemon.stop()
    daemon.arguments = ("--workers", str(workers))
    daemon.start()
    daemon.command("volume", "limit", "disk", "--iops", "1000", "--iops-burst", "300")
    load = start_load(daemon, "--rw=randread", "--bs=4k", "--iodepth=32", seconds=3 * SECONDS)
    deadline = time.monotonic() + 60
    while not (begun := counted(daemon, "read") if daemon.measurements()["exports"] else 0):
        assert time.monotonic() < deadline
    at = time.monotonic()
    time.sleep(SECONDS)
    done, elapsed = counted(daemon, "read") - begun, time.monotonic() - at
    # Lower only where the machine had something else to do for most of the time.
    assert 300 * elapsed < done < 1000 * elapsed + 350 + 100
    daemon.command("volume", "limit", "disk", "--iops", "100", "--iops-burst", "0")
    begun, at = counted(daemon, "read"), time.monotonic()
    time.sleep(SECONDS)
    done, elapsed = counted(daemon, "read") - begun, time.monotonic() - at
    assert 50 * elapsed < done < 110 * elapsed + 30
    daemon.command("volume", "limit", "disk", "--none")
    begun = counted(daemon, "read")
    requests_of(load)
    assert counted(daemon, "read") - begun > 1000


def test_bandwidth_holds_after_a_restart_and_two_clients_share_it(daemon: Daemon) -> None:
    require("fio")
    daemon.create("disk", 64 * MIB)
    daemon.command("volume", "limit", "disk", "--bandwidth", "8M", "--bandwidth-burst", "1M")
    assert daemon.stop() == 0
    daemon.start()
    deep = start_load(daemon, "--rw=write", "--bs=64k", "--iodepth=32")
    shallow = start_load(daemon, "--rw=write", "--bs=64k", "--iodepth=1")
    begun = time.monotonic()
    counts = [requests_of(load, "write") for load in (deep, shallow)]
    elapsed = time.monotonic() - begun
    assert sum(counts) * 65536 < (8 * elapsed + 1 + 2 * 33 / 16) * MIB
    assert min(counts) > max(counts) / 3
