"""Wrong usage, exit statuses, and what becomes of errors that nobody expects."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdserve.cli import volume as volume_commands

from .conftest import CommandLine

PROGRAM = [sys.executable, "-m", "nbdserve"]


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["frobnicate"], "frobnicate"),
        (["volume", "frobnicate"], "frobnicate"),
        (["volume", "create", "a"], "--size"),
        (["volume", "create", "--size", "1M"], "NAME"),
        (["volume", "list", "--frobnicate"], "--frobnicate"),
        (["volume", "list", "--data", ""], "--data"),
        (["snapshot", "create"], "VOL@SNAP"),
        (["backup", "a"], "--repo"),
        (["serve", "--log-level", "loud"], "loud"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    cli: CommandLine, arguments: list[str], mentions: str
) -> None:
    outcome = cli(*arguments)
    assert outcome.status == 2
    assert mentions in outcome.line
    assert "--help" in outcome.line
    assert not cli.data.exists()


def test_no_data_directory_named(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NBDSERVE_DATA")
    for arguments in (["volume", "list"], ["status"], ["backup", "a", "--repo", "file:///r"]):
        outcome = cli(*arguments)
        assert outcome.status == 2
        assert "--data" in outcome.line
        assert "NBDSERVE_DATA" in outcome.line
    outcome = cli("serve")
    assert outcome.status in (1, 2)
    assert "--data" in outcome.line


def test_the_data_option_behind_the_command_wins_over_the_one_before_and_the_environment(
    cli: CommandLine, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    cli.done("--data", first, "volume", "create", "a", "--size", "1M", "--data", second)
    assert second.is_dir()
    assert not first.exists()
    assert not cli.data.exists()
    assert "a" in cli.done("--data", second, "volume", "list")


def test_only_commands_that_make_a_volume_make_the_directory(cli: CommandLine) -> None:
    for arguments in (
        ["volume", "list"],
        ["volume", "delete", "a"],
        ["snapshot", "create", "a@b"],
        ["status"],
    ):
        outcome = cli(*arguments)
        assert outcome.status == 1
        assert str(cli.data) in outcome.line
        assert not cli.data.exists()


def test_every_command_has_help(cli: CommandLine) -> None:
    top = cli.done("--help")
    for command in ("serve", "volume", "snapshot", "repo", "backup", "status"):
        assert command in top
        assert "Usage: nbdserve" in cli.done(command, "--help")


def test_completion_knows_the_commands() -> None:
    environment = os.environ | {
        "_NBDSERVE_COMPLETE": "bash_complete",
        "COMPLETED_LINE": "nbdserve vol",
    }
    done = subprocess.run(
        [Path(sys.executable).parent / "nbdserve"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split(",")[-1].strip() == "volume"


def test_an_error_that_nobody_expects_is_one_line_too(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str) -> int:
        raise ZeroDivisionError("of all\nthings")

    monkeypatch.setattr(volume_commands, "parse_size", fail)
    line = cli("volume", "create", "a", "--size", "1M").line
    assert "internal error: ZeroDivisionError: of all things" in line


def test_standard_output_that_is_closed_or_full(data: Path) -> None:
    environment = os.environ | {"NBDSERVE_DATA": str(data)}
    subprocess.run([*PROGRAM, "volume", "create", "a", "--size", "1M"], env=environment, check=True)
    read, write = os.pipe()
    os.close(read)
    try:
        closed = subprocess.run(
            [*PROGRAM, "volume", "list"],
            env=environment,
            stdout=write,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(write)
    assert closed.stderr == b""
    assert closed.returncode in (0, 1)
    with open("/dev/full", "wb") as full:
        outcome = subprocess.run(
            [*PROGRAM, "volume", "list"],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert outcome.returncode == 1
    assert len(outcome.stderr.splitlines()) == 1, outcome.stderr


def test_a_locale_that_lacks_a_character_is_no_error() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [*PROGRAM, "backup", "--help"], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Usage: nbdserve backup [OPTIONS] [VOL?]")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_without_a_traceback(
    data: Path, number: signal.Signals, status: int
) -> None:
    """A command that waits for the lock is interrupted while it waits."""
    data.mkdir()
    holder = subprocess.Popen(["flock", data / "lock", "cat"], stdin=subprocess.PIPE)
    try:
        while subprocess.run(["flock", "-n", data / "lock", "true"], check=False).returncode == 0:
            time.sleep(0.05)
        command = subprocess.Popen(
            [*PROGRAM, "volume", "list", "--data", data], stderr=subprocess.PIPE, text=True
        )
        # It makes the directories and then finds the lock taken, again and again.
        while not (data / "layers").is_dir():
            assert command.poll() is None
            time.sleep(0.02)
        command.send_signal(number)
        _, error = command.communicate(timeout=30)
    finally:
        holder.communicate()
    assert command.returncode == status
    assert error.strip() == ""


def test_a_command_imports_no_server_before_it_has_to_be_one() -> None:
    program = "import nbdserve.cli.backup, nbdserve.cli.repositories, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.decode().split()}
    assert "snapshots" in loaded
    assert not loaded & {"aiohttp", "boto3", "botocore"}


def test_a_lazy_restore_imports_nothing_that_reads_repositories() -> None:
    program = "import nbdserve.cli.repo, nbdserve.cli.restoring, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    loaded = set(done.stdout.decode().split())
    assert "nbdserve.control.client" in loaded
    assert not loaded & {"snapshots.repository", "nbdserve.control.documents", "asyncio"}
