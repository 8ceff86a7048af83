"""Bad input on the command line: an exit status, one clear line, and nothing changed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .parts import Daemon, run

BAD_NAMES = ["a/b", "..", "../up", "/etc", "with space", "x" * 128, "", "a@b", "né", "line\nbreak"]
BAD_SIZES = [
    "0",
    "-1",
    "17T",
    "ten",
    "",
    "1.5.2G",
    "10X",
    "99999999999999999999",
    "0x10",
    "1G1G",
    "4097",
]


@pytest.fixture(params=["daemon", "offline"])
def served(
    request: pytest.FixtureRequest, start_daemon: object, data_directory: Path
) -> Iterator[Daemon]:
    """Yield a data directory with one volume, with a daemon and without: they must answer alike."""
    if request.param == "daemon":
        assert callable(start_daemon)
        target = start_daemon(data_directory)
    else:
        data_directory.mkdir()
        target = Daemon(data_directory)
    target.command("volume", "create", "disk", "--size", "1M")
    target.command("snapshot", "create", "disk@first")
    yield target
    # Whatever was refused changed nothing.
    assert [volume["name"] for volume in target.json("volume", "list")["volumes"]] == ["disk"]
    assert [entry["name"] for entry in target.json("snapshot", "list")["snapshots"]] == ["first"]


def expect_refusal(target: Daemon, *arguments: str, status: int | None = None) -> str:
    """Run a command that must fail with one line on standard error; return that line."""
    result = target.command(*arguments, check=False)
    if status is None:
        assert result.returncode in (1, 2), (arguments, result)
    else:
        assert result.returncode == status, (arguments, result)
    assert result.stdout == "", (arguments, result)
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, (arguments, result.stderr)
    return result.stderr


def test_names(served: Daemon) -> None:
    for name in BAD_NAMES:
        expect_refusal(served, "volume", "create", name, "--size", "1M")
    for name in BAD_NAMES[:3]:
        expect_refusal(served, "volume", "rename", "disk", name)
        expect_refusal(served, "snapshot", "create", f"disk@{name}")


def test_sizes(served: Daemon) -> None:
    for size in BAD_SIZES:
        line = expect_refusal(served, "volume", "create", "new", f"--size={size}")
        assert "size" in line.lower(), line
    for size in BAD_SIZES[:4]:
        expect_refusal(served, "volume", "resize", "disk", f"--size={size}")


def test_shrinking_is_refused_with_the_reason(served: Daemon) -> None:
    assert "smaller" in expect_refusal(
        served, "volume", "resize", "disk", "--size", "512K", status=1
    )


def test_what_does_not_exist(served: Daemon) -> None:
    for arguments in (
        ["volume", "show", "nothing"],
        ["volume", "delete", "nothing"],
        ["volume", "resize", "nothing", "--size", "2M"],
        ["volume", "rename", "nothing", "other"],
        ["volume", "create", "new", "--from", "nothing@first"],
        ["volume", "create", "new", "--from", "disk@nothing"],
        ["snapshot", "create", "nothing@first"],
        ["snapshot", "list", "nothing"],
        ["snapshot", "delete", "disk@nothing"],
        ["snapshot", "rollback", "disk@nothing"],
        ["snapshot", "diff", "disk@nothing"],
        ["snapshot", "diff", "disk@first", "disk@nothing"],
    ):
        assert "nothing" in expect_refusal(served, *arguments, status=1)


def test_names_that_are_taken(served: Daemon) -> None:
    assert "disk" in expect_refusal(served, "volume", "create", "disk", "--size", "1M", status=1)
    assert "first" in expect_refusal(served, "snapshot", "create", "disk@first", status=1)


def test_a_group_of_snapshots_is_taken_whole_or_not_at_all(served: Daemon) -> None:
    expect_refusal(served, "snapshot", "create", "disk@second", "nothing@second", status=1)
    expect_refusal(served, "snapshot", "create", "disk@second", "disk@second")


def test_wrong_usage(served: Daemon) -> None:
    for arguments in (
        ["volume", "create", "new"],
        ["volume", "create", "--size", "1M"],
        ["volume", "frobnicate"],
        ["frobnicate"],
        ["snapshot", "create"],
        ["volume", "list", "--frobnicate"],
    ):
        expect_refusal(served, *arguments, status=2)


def test_snapshot_names_without_a_volume(served: Daemon) -> None:
    for name in ("disk", "disk@", "@first", "@", "disk@first@first"):
        expect_refusal(served, "snapshot", "delete", name)
        expect_refusal(served, "snapshot", "rollback", name)


def test_data_directory(data_directory: Path) -> None:
    target = Daemon(data_directory)
    expect_refusal(target, "volume", "list", status=1)
    data_directory.write_text("a file")
    expect_refusal(target, "volume", "create", "disk", "--size", "1M", status=1)
    target.env.pop("NBDSERVE_DATA")
    assert "--data" in expect_refusal(target, "volume", "list", status=2)


def test_serve(data_directory: Path) -> None:
    target = Daemon(data_directory)
    for address in ("nonsense", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x", "unix:", ":"):
        line = expect_refusal(target, "serve", "--listen", address)
        assert address in line, line


def test_unknown_export(daemon: Daemon) -> None:
    for name in ("nothing", "a/b", "..", "disk@nothing"):
        refused = run("nbdinfo", "--size", daemon.uri(name.replace("/", "%2F")), check=False)
        assert refused.returncode != 0
    assert daemon.is_running()
