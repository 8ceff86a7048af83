"""A crowd: more than a thousand clients that are idle or stuck, while others go on working."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from nbdserve.control.client import path
from scripts.bench.client import Client
from scripts.bench.crowd import STUCK, Crowd
from scripts.bench.process import read_resident_bytes

from .parts import KIB, MIB, Daemon, require, run, serve_options

IDLE, STUCK_OF_A_KIND = 350, 22  # each of three ways in
WORKING = 50
# What a connection may cost in memory, of all processes together.
IDLE_MEMORY, STUCK_MEMORY = 100 * KIB, 4 * MIB


def count_clients(daemon: Daemon) -> int:
    return int(daemon.control().get(path("status"))["clients"])


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_others_go_on_beside_a_crowd(
    start_daemon: Callable[..., Daemon], data_directory: Path, certificates: Path
) -> None:
    require("fio")
    daemon = start_daemon(
        data_directory, *serve_options(certificates), "--tls", "optional", "--workers", "2"
    )
    assert daemon.process is not None
    daemon.create("disk", WORKING * MIB)
    ways = [
        (daemon.socket, False),
        (("127.0.0.1", daemon.port), False),
        (("127.0.0.1", daemon.port), True),
    ]
    with Client(daemon.socket, "disk") as client:
        client.write(0, b"x" * MIB)
        memory = read_resident_bytes(daemon.process.pid)
        with ExitStack() as stack:
            crowds = [
                stack.enter_context(Crowd(where, "disk", tls=encrypted))
                for where, encrypted in ways
            ]
            for crowd in crowds:
                crowd.add_idle(IDLE)
            idle = read_resident_bytes(daemon.process.pid) - memory
            assert idle < len(ways) * IDLE * IDLE_MEMORY, idle
            for crowd in crowds:
                for sent in STUCK.values():
                    crowd.add_stuck(STUCK_OF_A_KIND, sent)
            count = len(ways) * (IDLE + len(STUCK) * STUCK_OF_A_KIND)
            assert count > 1200
            assert count_clients(daemon) == count + 1
            # What came of the WRITEs is in place: nothing else will overwrite what others write.
            wait_until(lambda: not any(client.read(0, 256 * KIB)), "stuck WRITEs are not begun")
            for uri in (daemon.uri("disk"), daemon.uri("disk").replace("nbd", "nbds", 1)):
                load = run(
                    "fio", "--thread", "--name=load", "--ioengine=nbd", f"--uri={uri}",
                    f"--numjobs={WORKING}", "--group_reporting", "--rw=randwrite",
                    "--bsrange=4k-64k", "--iodepth=4", "--size=1M", "--offset_increment=1M",
                    "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
                ).stdout  # fmt: skip
                assert "err= 0" in load, load
            assert count_clients(daemon) == count + 1
            stuck = read_resident_bytes(daemon.process.pid) - memory - idle
            assert stuck < len(ways) * len(STUCK) * STUCK_OF_A_KIND * STUCK_MEMORY, stuck
        wait_until(lambda: count_clients(daemon) == 1, "clients that have gone are kept")
        assert client.read(MIB, 4 * KIB) != bytes(4 * KIB)
