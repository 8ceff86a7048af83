"""Damage in a data directory: the daemon serves what is whole, `nbdserve check` names the rest."""

import json
import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.snapshot import delete_snapshot
from nbdserve.control.client import path
from snapshots.manifest import unpack_manifest

from .parts import DIE_WITH_PARENT, MIB, NBDSERVE, SYSTEM_PATH, Daemon, require, run, run_nbdsh

SECTOR = 512


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon], data_directory: Path) -> Daemon:
    """Return a daemon with two volumes, in workers, and a snapshot of each."""
    started = start_daemon(data_directory, "--workers", "2")
    for volume in ("web", "mail"):
        started.create(volume, 16 * MIB)
        run_nbdsh("h.pwrite(b'w' * 2**20, 0); h.flush()", started.uri(volume))
        started.take_snapshot(f"{volume}@one")
        run_nbdsh("h.pwrite(b'x' * 65536, 2**21); h.flush()", started.uri(volume))
    return started


def check(daemon: Daemon, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run `nbdserve check --json`; return its status, its report and what it complained of."""
    done = daemon.command("check", *arguments, "--json", check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def ask(daemon: Daemon, volume: str | None = None, *, repair: bool = False) -> list[dict[str, Any]]:
    """Let a running daemon check, without the second that the command takes; the findings."""
    body = {"volume": volume, "repair": repair}
    with daemon.control().stream("POST", path("check"), body) as answer:
        *_, report = answer.lines()
    found: list[dict[str, Any]] = report["findings"]
    return found


def flip(path: Path, offset: int) -> None:
    """Change a byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def manifest_of(daemon: Daemon, volume: str) -> Path:
    return daemon.data / "volumes" / str(daemon.control().get(path("volumes", volume))["id"])


def start_client(daemon: Daemon, script: str) -> subprocess.Popen[bytes]:
    """Start nbdsh on the volume web."""
    require("nbdsh")
    return subprocess.Popen(
        [*DIE_WITH_PARENT, "nbdsh", "--uri", daemon.uri("web"), "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PATH": SYSTEM_PATH},
    )


def test_an_unreadable_manifest_stops_one_volume(daemon: Daemon) -> None:
    require("qemu-img")
    record = manifest_of(daemon, "web")
    assert check(daemon) == (0, {"volumes": 2, "snapshots": 2, "layers": 4, "findings": []}, "")
    assert daemon.stop() == 0
    flip(record, 25)
    status, report, line = check(daemon)
    (found,) = report["findings"]
    assert status == 1
    assert (found["file"], found["offset"], found["harms"]) == (str(record), 18, ["web"])
    assert line == f"nbdserve: 1 finding in {daemon.data}, the first is {record}: " + (
        "checksum mismatch at offset 18\n"
    )

    layers = sorted((daemon.data / "layers").iterdir())
    daemon.start()
    assert str(record) in daemon.read_log()
    assert ask(daemon) == report["findings"]
    listed = daemon.control().get(path("volumes"))
    assert [volume["name"] for volume in listed["volumes"]] == ["mail"]
    assert [(lost["name"], lost["id"]) for lost in listed["unreadable"]] == [("web", record.name)]
    for command in (["volume", "list"], ["status"]):
        said = daemon.command(*command)
        assert f"volume web cannot be read: {record}: checksum" in said.stdout + said.stderr
    shown = daemon.command("volume", "show", "web", check=False)
    assert (shown.returncode, len(shown.stderr.splitlines())) == (1, 1)
    assert str(record) in shown.stderr
    opened = run("qemu-img", "info", daemon.image("web"), check=False)
    assert opened.returncode
    assert f"volume web cannot be read: {record}: checksum" in opened.stderr
    assert run_nbdsh("print(bytes(h.pread(4, 2**21)))", daemon.uri("mail")) == "b'xxxx'\n"
    daemon.control().delete(path("volumes", "mail", with_snapshots="true"))
    assert daemon.stop() == 0
    assert set(layers) <= set((daemon.data / "layers").iterdir())

    flip(record, 25)
    daemon.start()
    script = "print(bytes(h.pread(4, 2**21)), bytes(h.pread(4, 0)))"
    assert run_nbdsh(script, daemon.uri("web")) == "b'xxxx' b'wwww'\n"
    assert ask(daemon) == []
    assert len(list((daemon.data / "layers").iterdir())) == 2


def test_a_journal_that_loses_its_end_under_the_daemon(daemon: Daemon) -> None:
    """And one that lost it while no daemon ran, which its volume's closing had marked."""
    client = start_client(daemon, "h.pwrite(b'y' * 4096, 2**22); h.flush(); print(1); input()")
    assert client.stdout is not None
    assert client.stdout.readline() == b"1\n"
    record = manifest_of(daemon, "web")
    manifest = unpack_manifest(record.read_bytes(), "web", record.name)
    journal = daemon.data / "layers" / manifest.head / "journal"
    whole = journal.read_bytes()
    end = len(whole.rstrip(b"\0")) // SECTOR * SECTOR
    with journal.open("r+b") as file:
        file.seek(end)
        file.write(bytes(SECTOR))
    (found,) = ask(daemon, "web")
    assert (found["file"], found["harms"]) == (str(journal), ["web"])
    assert ask(daemon, "mail") == []
    with journal.open("r+b") as file:
        file.write(whole)
    client.communicate(b"\n")
    assert client.returncode == 0
    assert daemon.stop() == 0

    mark = len(journal.read_bytes().rstrip(b"\0")) // SECTOR * SECTOR
    with journal.open("r+b") as file:
        file.seek(mark - SECTOR)
        file.write(bytes(SECTOR))
    daemon.start()
    (found,) = ask(daemon)
    lost = (str(journal), mark - SECTOR, ["web"])
    assert (found["file"], found["offset"], found["harms"]) == lost
    opened = run("qemu-img", "info", daemon.image("web"), check=False)
    assert str(journal) in opened.stderr
    assert run_nbdsh("print(bytes(h.pread(4, 0)))", daemon.uri("web@one")) == "b'wwww'\n"
    listed = daemon.control().get(path("volumes"))
    assert [lost["name"] for lost in listed["unreadable"]] == ["web"]


def test_while_clients_write_and_snapshots_come_and_go(daemon: Daemon) -> None:
    writer = """
import random
for turn in range(100000):
    for _ in range(50):
        h.pwrite(bytes([turn % 255 + 1]) * 4096, random.randrange(4096) * 4096)
    h.flush()
    if turn == 0:
        print("writing", flush=True)
"""
    client = start_client(daemon, writer)
    assert client.stdout is not None
    assert client.stdout.readline() == b"writing\n"
    try:
        for turn in range(4):
            daemon.take_snapshot(f"web@t{turn}", f"mail@t{turn}")
            with ThreadPoolExecutor() as pool:
                deleting = pool.submit(delete_snapshot, daemon.control(), "web", f"t{turn}")
                for _ in range(4):
                    assert ask(daemon) == []
                deleting.result()
        assert client.poll() is None, "it still writes"
    finally:
        client.kill()
        client.communicate()


def test_orphans_and_a_progress_on_a_terminal(daemon: Daemon) -> None:
    """With the daemon and without it; `lost` stays a finding."""
    orphan = daemon.data / "layers" / "00000000000000aa"
    lost = daemon.data / "lost" / orphan.name
    for running in (True, False):
        if not running:
            assert daemon.stop() == 0
        orphan.mkdir()
        (orphan / "data-00000").write_bytes(b"somebody's only copy")
        status, report, _ = check(daemon, "--repair")
        assert status == 1, "it is in lost, which somebody has to look at"
        found, left = report["findings"]
        assert (found["file"], found["repaired"]) == (str(orphan), True)
        assert (left["file"], left["repaired"]) == (str(lost), False)
        assert (lost / "data-00000").read_bytes() == b"somebody's only copy"
        shutil.rmtree(lost)
    daemon.start()

    terminal, other = pty.openpty()
    done = subprocess.run(
        [NBDSERVE, "check"], env=daemon.env, stdout=subprocess.PIPE, stderr=other, check=True
    )
    os.close(other)
    assert done.stdout.endswith(b"checked 2 volumes, 2 snapshots, 4 layers: 0 findings\n")
    assert b"checking" in os.read(terminal, 65536)
    os.close(terminal)
    assert daemon.command("check", "nothing", check=False).returncode == 1
    assert daemon.command("check", "web", "mail", check=False).returncode == 2
