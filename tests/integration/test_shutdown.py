"""Stopping: SIGTERM drains, everything is there after a start, and one daemon owns a directory."""

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

from nbdserve.control.client import path

from .parts import (
    DIE_WITH_PARENT,
    MIB,
    NBDSERVE,
    SYSTEM_PATH,
    TIB,
    Daemon,
    find_free_port,
    over_all_transports,
    qemu_io,
    require,
    run,
)

# Keeps requests in flight until the daemon ends the connection; then reports which were answered.
BUSY_CLIENT = """
import json, sys, nbd
handle = nbd.NBD()
handle.connect_uri(sys.argv[1])
answered = {}
sequence = 0
pending = {}
print("connected", flush=True)
failure = None
try:
    while True:
        while len(pending) < 64:
            sequence += 1
            slot = sequence % 256
            data = sequence.to_bytes(4, "little") * 16384
            if any(slot == other for other, _ in pending.values()):
                break
            pending[handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), slot * 65536)] = (
                slot, sequence)
        handle.poll(-1)
        for cookie in list(pending):
            if handle.aio_command_completed(cookie):
                slot, number = pending.pop(cookie)
                answered[slot] = number
except nbd.Error as error:
    failure = error.string
    # What was answered before the end may still wait to be collected.
    for cookie in list(pending):
        try:
            if handle.aio_command_completed(cookie):
                slot, number = pending.pop(cookie)
                answered[slot] = number
        except nbd.Error:
            pass
print(json.dumps({
    "answered": answered,
    "unanswered": {slot: number for slot, number in pending.values()},
    "failure": failure,
}), flush=True)
"""


@over_all_transports
def test_sigterm_drains(daemon: Daemon) -> None:
    require("nbdsh")
    daemon.create("disk", 16 * MIB)
    client = subprocess.Popen(
        [*DIE_WITH_PARENT, "/usr/bin/python3", "-c", BUSY_CLIENT, daemon.uri("disk")],
        stdout=subprocess.PIPE,
        env={"PATH": SYSTEM_PATH},
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"connected\n"
    with pytest.raises(subprocess.TimeoutExpired):
        client.wait(1)
    assert daemon.stop() == 0
    report = json.loads(client.communicate(timeout=60)[0])
    assert len(report["answered"]) > 64

    daemon.start()
    copy = daemon.data.with_name("copy")
    run("nbdcopy", daemon.uri("disk"), copy)
    with copy.open("rb") as content:
        for slot, number in report["answered"].items():
            content.seek(int(slot) * 65536)
            found = content.read(65536)
            # A later write of the slot may have arrived, though not been answered.
            allowed = {number, report["unanswered"].get(slot, number)}
            words = {found[index : index + 4] for index in range(0, 65536, 4)}
            assert words <= {value.to_bytes(4, "little") for value in allowed}, slot


@over_all_transports
def test_restart_keeps_everything(daemon: Daemon, tmp_path: Path) -> None:
    require("nbdcopy", "qemu-img")
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(20 * MIB) + bytes(12 * MIB))
    daemon.create("disk", 32 * MIB)
    run("nbdcopy", source, daemon.uri("disk"))
    daemon.take_snapshot("disk@one")
    qemu_io(daemon, "disk", "write -P 7 5M 3M", "discard 1M 2M")
    daemon.command("volume", "create", "copy", "--from", "disk@one", "--size", "64M")
    qemu_io(daemon, "copy", "write -P 8 40M 100k")
    daemon.take_snapshot("disk@two", "copy@two")
    daemon.create("empty", 16 * TIB)
    exports = ["disk", "disk@one", "disk@two", "copy", "copy@two"]

    def read_all() -> dict[str, bytes]:
        contents = {}
        for export in exports:
            run("nbdcopy", daemon.uri(export), tmp_path / "copy")
            contents[export] = (tmp_path / "copy").read_bytes()
            (tmp_path / "copy").unlink()
        return contents

    def describe() -> list[object]:
        return [
            daemon.control().get(path("volumes")),
            daemon.control().get(path("snapshots")),
            daemon.json("snapshot", "diff", "disk@one", "disk@two"),
            *(run("nbdinfo", "--map", daemon.uri(export)).stdout for export in exports),
        ]

    contents, description = read_all(), describe()
    assert contents["disk@one"] == source.read_bytes()
    assert contents["disk"][5 * MIB : 8 * MIB] == b"\x07" * (3 * MIB)
    for stop_signal in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        assert daemon.process is not None
        daemon.process.send_signal(stop_signal)
        assert daemon.wait() == 0
        daemon.start()
        assert describe() == description
        assert read_all() == contents


def test_commands_without_a_daemon_see_the_same(daemon: Daemon) -> None:
    daemon.command("volume", "create", "disk", "--size", "32M")
    daemon.command("snapshot", "create", "disk@one")
    listing = daemon.json("volume", "list"), daemon.json("snapshot", "list")
    assert daemon.stop() == 0
    assert (daemon.json("volume", "list"), daemon.json("snapshot", "list")) == listing
    daemon.command("snapshot", "create", "disk@two")
    daemon.start()
    names = [entry["name"] for entry in daemon.json("snapshot", "list", "disk")["snapshots"]]
    assert names == ["one", "two"]


def test_one_daemon_owns_a_data_directory(daemon: Daemon) -> None:
    daemon.command("volume", "create", "disk", "--size", "1M")
    second = run(
        NBDSERVE, "serve", "--data", daemon.data, "--listen", f"127.0.0.1:{find_free_port()}",
        check=False, timeout=30,
    )  # fmt: skip
    assert second.returncode == 1
    assert len(second.stderr.strip().splitlines()) == 1, second.stderr
    assert str(daemon.data) in second.stderr
    assert daemon.is_running()
    run("nbdinfo", "--size", daemon.uri("disk"))
    run("nbdinfo", "--size", daemon.tcp_uri("disk"))


def test_one_daemon_owns_an_address(daemon: Daemon, start_daemon: object, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for listen in (f"127.0.0.1:{daemon.port}", f"unix:{daemon.socket}"):
        second = run(
            NBDSERVE, "serve", "--data", other, "--listen", listen, check=False, timeout=30
        )
        assert second.returncode == 1
        assert len(second.stderr.strip().splitlines()) == 1, second.stderr
        assert listen in second.stderr
    assert daemon.is_running()
    daemon.command("volume", "create", "disk", "--size", "1M")
    run("nbdinfo", "--size", daemon.uri("disk"))
