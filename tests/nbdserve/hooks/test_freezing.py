"""Whatever becomes of a backup or of its hooks, what was frozen is thawed afterwards.

The hooks are shell scripts that write to a file what they were run for; the backup is a process
that is inside of the context, and is ended there.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backends.errors import StorageError
from nbdserve.hooks import commands
from nbdserve.hooks.freezing import Freezing, Hooks
from nbdserve.hooks.watcher import watch

# What a backup does, as far as hooks are concerned.
BACKUP = """
import sys, time
from nbdserve.hooks.freezing import Freezing, Hooks
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
freeze, thaw, seconds = sys.argv[1:]
hooks = Hooks(("sh", "-c", freeze), ("sh", "-c", thaw), float(seconds))
freezing = Freezing(hooks, ["a"], "p", "s")
print("begins", flush=True)
with freezing:
    print("frozen", flush=True)
    time.sleep(600)
"""


class Notes:
    """What the hooks have done, a word a line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.freeze = f"echo freeze >>{file}"
        self.thaw = f"echo thaw >>{file}"

    def read(self) -> list[str]:
        return self.file.read_text().split() if self.file.exists() else []

    def wait_for(self, *words: str) -> None:
        deadline = time.monotonic() + 60
        while self.read() != list(words):
            assert time.monotonic() < deadline, self.read()
            time.sleep(0.02)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thaws that this process does; those of watchers take their time."""
    monkeypatch.setattr(commands, "PAUSES", (0.01, 0.01))


def freezing(freeze: str, thaw: str, seconds: float = 60) -> Freezing:
    return Freezing(
        Hooks(("sh", "-c", freeze), ("sh", "-c", thaw), seconds), ["a", "b"], "nightly", "one"
    )


@contextmanager
def backup(freeze: str, thaw: str, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to freeze."""
    process = subprocess.Popen(
        [sys.executable, "-c", BACKUP, freeze, thaw, str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_frozen(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "frozen\n"


def watchers(of: int) -> list[int]:
    """The processes that this one has started."""
    return [int(word) for word in Path(f"/proc/{of}/task/{of}/children").read_text().split()]


def test_frozen_inside_thawed_outside(notes: Notes) -> None:
    with freezing(notes.freeze, notes.thaw) as frozen:
        assert notes.read() == ["freeze"]
    assert notes.read() == ["freeze", "thaw"]
    frozen.check_in_time()
    assert frozen.problem is None
    assert frozen.freeze is not None
    assert frozen.thaw is not None
    assert (frozen.freeze["status"], frozen.thaw["status"]) == (0, 0)
    assert frozen.thaw["attempts"] == 1


def test_hooks_are_told_what_it_is_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTHER", "mine")
    shown = "NBDSERVE_HOOK NBDSERVE_VOLUMES NBDSERVE_POLICY NBDSERVE_SNAPSHOT OTHER PYTHONPATH"
    script = f"for name in {shown}; do eval echo \\$$name; done"
    before = os.environ.get("PYTHONPATH", "")
    with freezing(script, "true"):
        out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["freeze", "a b", "nightly", "one", "mine", before]


def test_a_failure_inside_thaws(notes: Notes) -> None:
    with pytest.raises(ZeroDivisionError), freezing(notes.freeze, notes.thaw):
        1 / 0  # noqa: B018
    assert notes.read() == ["freeze", "thaw"]


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        ("{}; exit 3", "ended with status 3"),
        ("{}; kill -9 $$", "ended by signal 9"),
        ("{}; sleep 600", "took longer than 1 s"),
        ("{}; sleep 600 & wait", "took longer than 1 s"),
    ],
)
def test_a_freeze_that_fails_is_thawed(notes: Notes, freeze: str, words: str) -> None:
    with (
        pytest.raises(StorageError, match=words),
        freezing(freeze.format(notes.freeze), notes.thaw, 1),
    ):
        pytest.fail("not frozen")
    assert notes.read() == ["freeze", "thaw"]


def test_a_command_that_is_not_there(notes: Notes) -> None:
    hooks = Hooks(("/nowhere/freeze",), ("sh", "-c", notes.thaw), 5)
    with pytest.raises(StorageError, match=r"'/nowhere/freeze' cannot be run: no such file"):
        Freezing(hooks, ["a"], None, "one").__enter__()
    assert notes.read() == ["thaw"]


def test_nothing_stays_frozen_beyond_the_time(notes: Notes) -> None:
    with freezing(notes.freeze, notes.thaw, 1) as frozen:
        notes.wait_for("freeze", "thaw")
    assert notes.read() == ["freeze", "thaw"]
    with pytest.raises(StorageError, match="freeze_timeout"):
        frozen.check_in_time()


def test_a_thaw_that_fails_is_tried_again(notes: Notes, tmp_path: Path) -> None:
    again = f"{notes.thaw}; test $(grep -c thaw {notes.file}) -ge 2"
    with freezing(notes.freeze, again) as frozen:
        pass
    assert notes.read() == ["freeze", "thaw", "thaw"]
    assert frozen.problem is None
    assert frozen.thaw is not None
    assert frozen.thaw["attempts"] == 2


def test_a_watcher_that_is_killed_is_made_up_for(
    notes: Notes, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = set(watchers(os.getpid()))
    frozen = freezing(notes.freeze, f"{notes.thaw}; exit 1")
    (watcher,) = set(watchers(os.getpid())) - mine
    with frozen:
        os.kill(watcher, signal.SIGKILL)
    assert notes.read() == ["freeze", "thaw", "thaw", "thaw"]
    with pytest.raises(StorageError):
        frozen.check_in_time()
    assert frozen.problem is not None
    assert "THAW FAILED, 3 times" in frozen.problem
    assert "status 1" in frozen.problem
    assert "ended unexpectedly" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_backup_that_is_ended_while_frozen(notes: Notes, number: signal.Signals) -> None:
    with backup(notes.freeze, notes.thaw) as process:
        wait_until_frozen(process)
        assert notes.read() == ["freeze"]
        process.send_signal(number)
        process.wait(timeout=60)
        if number != signal.SIGKILL:
            assert notes.read() == ["freeze", "thaw"]
        notes.wait_for("freeze", "thaw")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_backup_that_is_ended_while_it_freezes(notes: Notes, number: signal.Signals) -> None:
    """The freeze command ends first: it must not freeze anything behind the thaw."""
    with backup(f"{notes.freeze}; sleep 600; echo late >>{notes.file}", notes.thaw) as process:
        notes.wait_for("freeze")
        process.send_signal(number)
        process.wait(timeout=60)
        notes.wait_for("freeze", "thaw")


def test_a_signal_to_all_processes_of_a_backup(notes: Notes) -> None:
    """As systemd and a closed terminal send it: the watcher stays until it is done."""
    with backup(notes.freeze, f"sleep 1; {notes.thaw}") as process:
        wait_until_frozen(process)
        (watcher,) = watchers(process.pid)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(watcher, number)
        assert notes.read() == ["freeze"]
        process.kill()
        os.kill(watcher, signal.SIGTERM)
        notes.wait_for("freeze", "thaw")


def test_a_thaw_that_fails_after_the_backup_was_killed_is_said(notes: Notes) -> None:
    script = f"{notes.thaw}; test $(grep -c thaw {notes.file}) -ge 2"
    with backup(notes.freeze, script) as process:
        wait_until_frozen(process)
        process.kill()
        notes.wait_for("freeze", "thaw", "thaw")
        assert process.stderr is not None
        assert "trying again" in process.stderr.readline()


def test_a_freeze_that_cannot_be_killed_is_thawed_twice(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sudo's child cannot by who is not root: at once, and when it has ended after all."""

    def refuse(group: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refuse)
    monkeypatch.setattr(commands, "_DYING", 0.1)
    backup, watched = socket.socketpair()
    script = f"{notes.freeze}; while test $(wc -l <{notes.file}) -lt 2; do sleep 0.1; done"
    told = {
        "freeze": ["sh", "-c", f"{script}; {notes.freeze}"], "thaw": ["sh", "-c", notes.thaw],
        "seconds": 0.5, "environment": dict(os.environ),
    }  # fmt: skip
    with backup, watched:
        backup.sendall(json.dumps(told).encode() + b"\n")
        watch(watched)
        frozen, thawed = backup.recv(1 << 16).splitlines()
    assert "cannot be killed" in json.loads(frozen)["error"]
    assert json.loads(thawed)["error"] is None
    assert notes.read() == ["freeze", "thaw", "freeze", "thaw"]


def test_a_backup_that_ends_before_it_freezes_runs_nothing(notes: Notes) -> None:
    begun = Freezing(Hooks(("false",), ("sh", "-c", notes.thaw), 5), ["a"], None, "one")
    (watcher,) = watchers(os.getpid())[-1:]
    begun._socket.close()
    begun._answers.close()
    assert os.waitpid(watcher, 0)[1] == 0
    assert notes.read() == []
