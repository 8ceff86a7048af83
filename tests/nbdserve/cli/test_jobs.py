"""What the daemon tells of pushes and restores while they run, and of how backups ended."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.errors import UnavailableError
from snapshots.repository import Repository
from tests.nbdserve.volume_content import write

from .conftest import CommandLine
from .holding import held

PROGRAM = [sys.executable, "-m", "nbdserve"]
MIB = 1 << 20
# The command line, whose repository is at 5 bytes of 9 until it is told to go on.
HELD = """
import sys
import snapshots.repository.repository as repository
real = repository.Repository.{method}
def held(self, *arguments, **more):
    progress = next(found for found in arguments if callable(found))
    progress(5, 9)
    print("held", flush=True)
    sys.stdin.readline()
    return real(self, *arguments, **more)
repository.Repository.{method} = held
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
    return where


def start_daemon(data: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--workers", "1", "--listen", f"unix:{data}/nbd.sock"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "nbd.sock" in process.stdout.readline()
    return process


@pytest.fixture
def daemons(cli: CommandLine, url: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts daemons on the data directory."""
    started = []

    def start() -> subprocess.Popen[str]:
        started.append(start_daemon(cli.data))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def status(cli: CommandLine) -> Any:
    return cli.json("status")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_push_is_seen_while_it_runs_also_by_a_daemon_that_was_restarted(
    cli: CommandLine, url: str, daemons: Callable[[], subprocess.Popen[str]]
) -> None:
    daemon = daemons()
    with held(HELD.format(method="push"), "repo", "push", "a@one", url) as process:
        for _ in range(2):
            wait_for(lambda: [job["done"] for job in status(cli)["jobs"]] == [5])
            assert "push of a@one" in cli.done("status")
            (job,) = status(cli)["jobs"]
            assert job.pop("started") > 0
            assert job == {
                "kind": "push", "volume": "a", "snapshot": "one", "repository": url,
                "done": 5, "total": 9,
            }  # fmt: skip
            daemon.kill()
            daemon.communicate()
            daemon = daemons()
        assert status(cli)["history"] == []
        _, error = process.communicate("\n", timeout=60)
        assert process.returncode == 0
        assert "warning" not in error
    after = status(cli)
    assert after["jobs"] == []
    (record,) = after["history"]
    assert (record["volume"], record["snapshot"], record["failure"]) == ("a", "one", None)
    assert record["uploaded"] > MIB


@pytest.mark.parametrize("serves", [True, False], ids=["daemon", "no daemon"])
def test_a_push_that_was_interrupted(
    cli: CommandLine, url: str, daemons: Callable[[], subprocess.Popen[str]], serves: bool
) -> None:
    if serves:
        daemons()
    with held(HELD.format(method="push"), "repo", "push", "a@one", url) as process:
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 143
    found = status(cli)
    assert found["jobs"] == []
    (record,) = found["history"]
    assert (record["last_success"], record["failure"]) == (None, "it was interrupted")


def test_a_push_that_was_killed(
    cli: CommandLine, url: str, daemons: Callable[[], subprocess.Popen[str]]
) -> None:
    daemons()
    with held(HELD.format(method="push"), "repo", "push", "a@one", url) as process:
        wait_for(lambda: bool(status(cli)["jobs"]))
        process.kill()
        process.wait()
        wait_for(lambda: bool(status(cli)["history"]))
    assert status(cli)["jobs"] == []
    assert "was it killed?" in status(cli)["history"][0]["failure"]


def test_a_restore_is_seen_and_is_no_backup(
    cli: CommandLine, url: str, daemons: Callable[[], subprocess.Popen[str]]
) -> None:
    cli.done("repo", "push", "a@one", url)
    daemons()
    before = status(cli)["history"]
    with held(HELD.format(method="restore"), "repo", "restore", url, "a@one", "b") as process:
        wait_for(lambda: [job["done"] for job in status(cli)["jobs"]] == [5])
        (job,) = status(cli)["jobs"]
        assert (job["kind"], job["volume"], job["snapshot"]) == ("restore", "b", "a@one")
        process.kill()
        process.wait()
        wait_for(lambda: status(cli)["jobs"] == [])
    assert status(cli)["history"] == before


def test_history_is_written_without_a_daemon(
    cli: CommandLine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = cli.json("backup", "a", "--repo", url)["backups"][0]
    (good,) = status(cli)["history"]
    assert good["snapshot"] == report["snapshot"]
    assert good["uploaded"] == report["uploaded"]
    assert good["last_failure"] is None

    def refuse(*arguments: Any, **more: Any) -> None:
        raise UnavailableError("the store went away")

    monkeypatch.setattr(Repository, "push", refuse)
    assert cli("backup", "a", "--repo", url).status == 1
    (bad,) = status(cli)["history"]
    assert bad.pop("failure") == "the store went away"
    assert bad.pop("last_failure") > good["last_success"]
    assert bad == {name: good[name] for name in bad}
