"""Encrypted repositories from the command line: where the key comes from, and what is said."""

import os
import pty
import select
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snapshots.repository import key_slots
from tests.nbdserve.volume_content import read, write

from .conftest import CommandLine

TEXT = "correct horse stäple"
# The command line, with a scrypt that costs nothing where a key is made.
PROGRAM = """
from snapshots.repository import key_slots
key_slots.SCRYPT_N = 16
from nbdserve.cli import main
main()
"""


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_slots, "SCRYPT_N", 16)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "passphrase"
    file.write_text(TEXT + "\n")
    return file


@pytest.fixture
def url(tmp_path: Path, cli: CommandLine, secret: Path) -> str:
    """An encrypted repository, and a volume with a little data."""
    where = f"file://{tmp_path}/repository"
    made = cli.json("repo", "init", where, "--passphrase-file", secret)
    assert made["cipher"] == "aes-256-gcm"
    cli.done("volume", "create", "a", "--size", "1M")
    write(cli.data, "a", 0, os.urandom(100_000))
    return where


def test_every_command_with_the_environment(
    cli: CommandLine, url: str, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDSERVE_PASSPHRASE_FILE", str(secret))
    cli.done("backup", "a", "--repo", url)
    (first,) = cli.json("repo", "list", url)["snapshots"]
    write(cli.data, "a", 4096, b"x" * 4096)
    report = cli.json("backup", "a", "--repo", url)["backups"][0]
    assert report["parent"] == first["snapshot"]
    cli.done("snapshot", "create", "a@named")
    cli.done("repo", "push", "a@named", url)
    cli.done("repo", "restore", url, "a@named", "b")
    assert read(cli.data, "b") == read(cli.data, "a")
    assert cli.json("repo", "verify", url, "--deep")["damaged"] == []
    cli.done("repo", "delete", url, "a@named")
    assert len(cli.json("repo", "list", url, "a")["snapshots"]) == 2
    for path in (tmp_path / "repository").rglob("*"):
        assert "named" not in str(path.relative_to(tmp_path))
        if path.is_file():
            assert b"backup-2" not in path.read_bytes()


def test_each_way_to_give_the_key(
    cli: CommandLine, url: str, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "key"
    assert (
        "made the key file"
        in cli(
            "repo", "key", "add", url, "--passphrase-file", secret, "--new-repo-key-file", key_file
        ).err
    )
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert len(key_file.read_text()) == 65
    command = f"cat {shlex.quote(str(secret))}"
    for option, value in (
        ("passphrase-file", str(secret)),
        ("passphrase-command", command),
        ("repo-key-file", str(key_file)),
    ):
        assert cli.json("repo", "list", url, f"--{option}", value) == {"snapshots": []}
        variable = "NBDSERVE_" + option.upper().replace("-", "_")
        monkeypatch.setenv(variable, value)
        assert cli.json("repo", "list", url) == {"snapshots": []}
        # What the option says wins; and an empty variable is none.
        wrong = tmp_path / "wrong"
        wrong.write_text("wrong")
        refused = cli("repo", "list", url, "--passphrase-file", wrong).line
        assert refused == f"the passphrase given does not open the repository in {url}"
        monkeypatch.setenv(variable, "")
        assert "encrypted: give" in cli("repo", "list", url).line
    monkeypatch.setenv("NBDSERVE_PASSPHRASE_FILE", str(secret))
    monkeypatch.setenv("NBDSERVE_REPO_KEY_FILE", str(key_file))
    assert "exclude each other" in cli("repo", "list", url).line
    assert cli("repo", "list", url, "--repo-key-file", key_file).status == 0


def test_what_is_wrong_with_a_key_is_one_line_without_it(
    cli: CommandLine, url: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    said = []
    for content in (b"", b"\n", b"hunter2\nhunter3\n", b"\xffhunter2", b"hunter2" * 10_000,
                    b"hunter2\0"):  # fmt: skip
        bad.write_bytes(content)
        said.append(cli("repo", "list", url, "--passphrase-file", bad).line)
        said.append(cli("repo", "list", url, "--repo-key-file", bad).line)
        said.append(cli("repo", "list", url, "--passphrase-command", f"cat {bad}").line)
        assert all(str(bad) in line for line in said[-3:-1])
    for command, word in (
        ("/bin/sh -c 'echo hunter2; exit 3'", "status 3"),
        (f"{tmp_path}/absent", "absent"),
        (str(tmp_path), "permission"),
        ("'", "understood"),
        (" ", "empty"),
    ):
        said.append(cli("repo", "list", url, "--passphrase-command", command).line)
        assert word in said[-1]
    for option in ("passphrase-file", "repo-key-file"):
        for path, word in ((tmp_path / "absent", "absent"), (tmp_path, "directory")):
            said.append(cli("repo", "list", url, f"--{option}", path).line)
            assert word in said[-1]
    assert not [line for line in said if "hunter" in line]
    for option in ("passphrase-file", "passphrase-command", "repo-key-file"):
        assert cli("repo", "list", url, f"--{option}", "").status == 2
    assert cli("backup", "a", "--repo", url).line.startswith("the repository in")
    assert cli.json("snapshot", "list", "a") == {"snapshots": []}


def test_a_repository_that_is_not_encrypted_is_refused_when_a_key_is_given(
    cli: CommandLine, secret: Path, tmp_path: Path
) -> None:
    plain = f"file://{tmp_path}/plain"
    assert cli.json("repo", "init", plain)["cipher"] == "none"
    cli.done("volume", "create", "a", "--size", "1M")
    assert "not encrypted" in cli("backup", "a", "--repo", plain, "--passphrase-file", secret).line
    assert cli.json("repo", "list", plain) == {"snapshots": []}
    assert "no keys" in cli("repo", "key", "list", plain).line


def test_init_without_a_key_makes_nothing(cli: CommandLine, tmp_path: Path) -> None:
    where = f"file://{tmp_path}/none"
    assert "no passphrase" in cli("repo", "init", where, "--encrypt").line
    assert cli("repo", "init", where, "--passphrase-file", tmp_path / "absent").status == 1
    assert cli("repo", "init", where, "--repo-key-file", tmp_path / "a" / "b").status == 1
    key = tmp_path / "key"
    assert cli("repo", "init", where, "--repo-key-file", key, "--chunk-size", "5").status == 1
    assert not (tmp_path / "none").exists()
    assert not key.exists()
    assert cli("repo", "init", where, "--repo-key-file", key).status == 0
    made = key.read_bytes()
    assert cli("repo", "init", where, "--repo-key-file", key).status == 1
    assert key.read_bytes() == made
    assert cli("repo", "list", where, "--repo-key-file", key).status == 0


def test_keys_from_the_command_line(
    cli: CommandLine, url: str, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDSERVE_PASSPHRASE_FILE", str(secret))
    other = tmp_path / "other"
    other.write_text("another")
    added = cli.json("repo", "key", "add", url, "--new-passphrase-file", other)["added"]
    keys = cli.json("repo", "key", "list", url)["keys"]
    assert [(key["kind"], key["current"], key["problem"]) for key in keys] == [
        ("passphrase", True, None),
        ("passphrase", False, None),
    ]
    assert keys[1]["id"] == added
    assert added in cli.done("repo", "key", "list", url)
    assert "passwd" in cli("repo", "key", "remove", url, keys[0]["id"]).line
    assert cli.json("repo", "key", "remove", url, added) == {"removed": added}
    assert added in cli("repo", "key", "remove", url, added).line
    changed = cli.json("repo", "key", "passwd", url, "--new-passphrase-file", other)
    assert changed["removed"] == keys[0]["id"]
    assert "does not open" in cli("repo", "key", "list", url).line
    assert cli.done("repo", "key", "list", url, "--passphrase-file", other)
    add = ["repo", "key", "add", url, "--passphrase-file", other]
    both = ["--new-passphrase-file", other, "--new-repo-key-file", other]
    assert "exclude" in cli(*add, *both).line
    assert cli(*add).status == 2


def typed(*arguments: str, lines: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run a command on a terminal; type a line at each prompt. Status, and all that is shown."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, "-c", PROGRAM, *arguments],
        stdin=slave, stdout=slave, stderr=slave, env={**os.environ, **env},
    )  # fmt: skip
    os.close(slave)
    shown, prompts, waiting = "", 0, list(lines)
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                try:
                    piece = os.read(master, 4096)
                except OSError:  # the other end is closed
                    break
                if not piece:
                    break
                shown += piece.decode()
            # A prompt ends with ": " and switches echo off before it waits.
            if shown.count(": ") > prompts and shown.endswith(": ") and waiting:
                prompts = shown.count(": ")
                time.sleep(0.1)
                os.write(master, waiting.pop(0).encode() + b"\n")
        return process.wait(timeout=30), shown
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_on_a_terminal_it_asks(cli: CommandLine, tmp_path: Path) -> None:
    where = f"file://{tmp_path}/repository"
    env = {"NBDSERVE_DATA": str(cli.data)}
    status, shown = typed("repo", "init", where, "--encrypt", lines=["hunter2", "hunter2"], env=env)
    assert status == 0, shown
    assert "made an encrypted repository" in shown
    assert "hunter" not in shown
    status, shown = typed("repo", "list", where, lines=["hunter2"], env=env)
    assert (status, "SNAPSHOT" in shown, "hunter" in shown) == (0, True, False), shown
    status, shown = typed("repo", "list", where, lines=["hunter3"], env=env)
    assert status == 1
    assert "does not open" in shown
    assert "hunter" not in shown
    assert "Traceback" not in shown
