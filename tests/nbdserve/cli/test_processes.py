"""Commands as processes: several at once, killed ones, and a progress that is seen."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshots.repository import packing
from tests.nbdserve.volume_content import read, write

from .conftest import CommandLine

PROGRAM = [sys.executable, "-m", "nbdserve"]
MIB = 1 << 20
# The command line, with a repository that says so when it is reached and then does not go on.
STUCK = """
import os, sys, time
import snapshots.repository.repository as repository
def stuck(*arguments, **more):
    os.write(1, b"stuck\\n")
    time.sleep(600)
repository.Repository.{method} = stuck
from nbdserve.cli import main
main()
"""


@pytest.fixture
def url(tmp_path: Path, cli: CommandLine) -> str:
    where = f"file://{tmp_path}/repository"
    cli.done("repo", "init", where)
    cli.done("volume", "create", "a", "--size", "4M")
    write(cli.data, "a", 0, os.urandom(MIB))
    cli.done("snapshot", "create", "a@one")
    cli.done("repo", "push", "a@one", where)
    return where


@contextmanager
def stuck(method: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that has reached this method of its repository and stays there."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(method=method), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def daemon(cli: CommandLine, url: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon on the data directory, on its Unix socket alone."""
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--listen", f"unix:{cli.data}/nbd.sock"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "nbd.sock" in process.stdout.readline()
    yield process
    if process.poll() is None:
        process.terminate()
    process.communicate(timeout=60)


def wait_until_done(cli: CommandLine, *arguments: str) -> None:
    """Run a command until it is done: what keeps it back is about to end."""
    deadline = time.monotonic() + 30
    while (outcome := cli(*arguments)).status:
        assert time.monotonic() < deadline, outcome
        time.sleep(0.05)


def test_many_commands_at_once_with_no_daemon(cli: CommandLine) -> None:
    names = [f"v{number}" for number in range(6)]
    processes = [
        subprocess.Popen([*PROGRAM, "volume", "create", name, "--size", "1M"], text=True)
        for name in names
    ]
    assert [process.wait(timeout=60) for process in processes] == [0] * len(names)
    assert [v["name"] for v in cli.json("volume", "list")["volumes"]] == names


@pytest.mark.usefixtures("daemon")
def test_a_killed_push_holds_nothing(cli: CommandLine, url: str) -> None:
    with stuck("push", "repo", "push", "a@one", url) as process:
        assert "a@one" in cli("snapshot", "delete", "a@one").line
        process.kill()
        process.wait()
        wait_until_done(cli, "snapshot", "delete", "a@one")


@pytest.mark.usefixtures("daemon")
def test_a_killed_restore_leaves_nothing(cli: CommandLine, url: str) -> None:
    layers = sorted((cli.data / "layers").iterdir())
    with stuck("restore", "repo", "restore", url, "a@one", "b") as process:
        assert "b" in cli("volume", "create", "b", "--size", "1M").line
        assert sorted((cli.data / "layers").iterdir()) != layers
        process.kill()
        process.wait()
        wait_until_done(cli, "volume", "create", "b", "--size", "1M")
    cli.done("volume", "delete", "b")
    assert sorted((cli.data / "layers").iterdir()) == layers


@pytest.mark.usefixtures("daemon")
def test_a_second_backup_says_that_there_is_one(cli: CommandLine, url: str) -> None:
    with stuck("push", "backup", "a", "--repo", url) as process:
        other = cli("backup", "a", "--repo", url)
        assert other.status == os.EX_TEMPFAIL
        assert f"being backed up by process {process.pid} since" in other.err
        assert cli.json("status")["backups"] == ["a"]
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert [s["name"] for s in cli.json("snapshot", "list", "a")["snapshots"]] == ["one"]
    cli.done("backup", "a", "--repo", url)


def test_a_second_backup_with_no_daemon_says_it_too(cli: CommandLine, url: str) -> None:
    with stuck("push", "backup", "a", "--repo", url) as process:
        other = cli("backup", "a", "--repo", url)
        assert other.status == os.EX_TEMPFAIL
        assert f"being backed up by process {process.pid} since" in other.err
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == ""
    assert [s["name"] for s in cli.json("snapshot", "list", "a")["snapshots"]] == ["one"]


def test_what_a_killed_backup_left_is_deleted_by_the_next(cli: CommandLine, url: str) -> None:
    with stuck("push", "backup", "a", "--repo", url) as process:
        process.kill()
        process.wait()
    left = [s["name"] for s in cli.json("snapshot", "list", "a")["snapshots"]]
    assert len(left) == 2
    name = cli.json("backup", "a", "--repo", url)["backups"][0]["snapshot"]
    assert name not in left
    assert [s["name"] for s in cli.json("snapshot", "list", "a")["snapshots"]] == ["one", name]


# The command line, whose seventh segment is never stored; segments are small.
STALLED = """
import itertools, os, time
from backends.directory_objects import DirectoryObjectStore
from snapshots.repository import packing
packing.SEGMENT_TARGET = 1 << 18
put, count = DirectoryObjectStore.put, itertools.count(1)
def stall(self, key, data):
    if key.startswith("segments/") and next(count) > 6:
        os.write(1, b"stuck\\n")
        time.sleep(600)
    put(self, key, data)
DirectoryObjectStore.put = stall
from nbdserve.cli import main
main()
"""


def test_a_backup_goes_on_with_the_one_that_was_killed(
    cli: CommandLine, url: str, tmp_path: Path
) -> None:
    objects = tmp_path / "repository" / "segments"
    before = set(objects.glob("*/0*"))
    write(cli.data, "a", MIB, os.urandom(3 * MIB))
    arguments = ["backup", "a", "--repo", url]
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", STALLED, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        process.kill()
        process.communicate()
        write(cli.data, "a", 2 * MIB, os.urandom(65536))
    stored = [path.stat().st_size for path in set(objects.glob("*/0*")) - before]
    assert len(stored) >= 6
    report = cli.json(*arguments)["backups"][0]
    # All but what was overwritten since, headers and indexes.
    assert report["resumed"] >= sum(stored) - 2 * 65536 - len(stored) * 1000
    assert report["uploaded"] <= 3 * MIB - report["resumed"] + 100_000
    assert "had been uploaded" not in cli.done(*arguments)
    cli.done("repo", "restore", url, f"a@{report['snapshot']}", "b")
    assert read(cli.data, "b") == read(cli.data, "a")
    left = [s["name"] for s in cli.json("snapshot", "list", "a")["snapshots"]]
    assert len(left) == 2


# The command line, which stands still when it has read so much; it notes what it has each 256 K.
HALTED = """
import itertools, os, time
from backends.directory_objects import DirectoryObjectStore
from snapshots import sink
sink.STEP = 1 << 18
read, count = DirectoryObjectStore.get_range, itertools.count(1)
def halt(self, key, offset, length):
    if key.startswith("segments/") and next(count) > 9:
        time.sleep(2)
        os.write(1, b"stuck\\n")
        time.sleep(600)
    return read(self, key, offset, length)
DirectoryObjectStore.get_range = halt
from nbdserve.cli import main
main()
"""


@pytest.mark.parametrize("served", [True, False])
def test_a_killed_restore_goes_on(
    cli: CommandLine,
    url: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    served: bool,
) -> None:
    monkeypatch.setattr(packing, "SEGMENT_TARGET", 1 << 18)
    write(cli.data, "a", MIB, os.urandom(3 * MIB))
    cli.done("snapshot", "create", "a@two")
    cli.done("repo", "push", "a@two", url)
    daemon = request.getfixturevalue("daemon") if served else None
    arguments = ["repo", "restore", url, "a@two", "b"]
    process = subprocess.Popen(
        [sys.executable, "-c", HALTED, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    if daemon is not None:
        # It is not dead, only its daemon: it must not write to what another fills and commits.
        daemon.kill()
        daemon.wait()
        assert "still being restored by another" in cli(*arguments).line
    process.kill()
    process.communicate()
    listed = cli("volume", "list", "--json")
    assert [v["name"] for v in json.loads(listed.out)["volumes"]] == ["a"]
    assert [v["volume"] for v in json.loads(listed.out)["half_restored"]] == ["b"]
    assert "b is half restored from a@two" in cli("volume", "list").err
    assert cli.json("check")["findings"] == []
    assert "volume delete b" in cli("volume", "create", "b", "--size", "1M").line
    assert "volume delete b" in cli("repo", "restore", url, "a@one", "b").line
    report = cli.json(*arguments)
    assert report["resumed"] >= MIB
    # The first MiB is of a@one.
    assert report["resumed"] + report["written"] == 4 * MIB
    assert read(cli.data, "b") == read(cli.data, "a@two")
    assert cli.json("volume", "list")["half_restored"] == []
    assert cli.json("check")["findings"] == []


def test_a_restore_whose_daemon_dies_says_so(
    cli: CommandLine, url: str, daemon: subprocess.Popen[str]
) -> None:
    """It is told while it works: it would otherwise read for hours for nothing."""
    waiting = STUCK.replace(
        "time.sleep(600)",
        "sys.stdin.readline()\n"
        "    progress = arguments[4]\n"
        "    for done in range(1 << 30):\n"
        "        progress(done, 1 << 30)\n"
        "        time.sleep(0.01)",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", waiting.format(method="restore"),
         "repo", "restore", url, "a@one", "b"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    daemon.kill()
    daemon.wait()
    _, error = process.communicate("go on\n", timeout=60)
    assert process.returncode == 1
    assert len(error.splitlines()) == 1
    assert "daemon stopped" in error
    assert [v["name"] for v in cli.json("volume", "list")["volumes"]] == ["a"]


def test_a_push_goes_on_when_the_daemon_dies(
    cli: CommandLine, url: str, daemon: subprocess.Popen[str]
) -> None:
    """What it reads is shared with a lock of its own, which no daemon can take away."""
    waiting = STUCK.replace("time.sleep(600)", "sys.stdin.readline()\n    return push(*arguments)")
    waiting = waiting.replace("def stuck", "push = repository.Repository.push\ndef stuck")
    write_second = ["snapshot", "create", "a@two"]
    cli.done(*write_second)
    process = subprocess.Popen(
        [sys.executable, "-c", waiting.format(method="push"), "repo", "push", "a@two", url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    daemon.kill()
    daemon.wait()
    cli.done("snapshot", "delete", "a@two")
    cli.done("snapshot", "delete", "a@one")
    _, error = process.communicate("go on\n", timeout=60)
    assert (process.returncode, error) == (0, "")
    assert cli.json("repo", "verify", url, "--deep")["snapshots"] == 2
    cli.done("repo", "restore", url, "a@two", "b")


def test_a_bar_on_a_terminal(cli: CommandLine, url: str) -> None:
    reader, terminal = pty.openpty()
    try:
        subprocess.run(
            [*PROGRAM, "repo", "restore", url, "a@one", "b"],
            stdout=subprocess.PIPE, stderr=terminal, check=True,
        )  # fmt: skip
        os.close(terminal)
        shown = b""
        while True:
            try:
                shown += os.read(reader, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
    finally:
        os.close(reader)
    assert b"restoring a@one" in shown
    assert b"100%" in shown
    assert b"1M of 1M" in shown
