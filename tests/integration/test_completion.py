"""Completion in real shells: typed on a terminal, a tab, and what the command line is then."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .parts import NBDSERVE, require, run

PATIENCE = 60.0
DAMAGED = b"no manifest"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data directory with two volumes and a snapshot, which nobody serves."""
    data = tmp_path_factory.mktemp("made") / "data"
    for command in (
        ("volume", "create", "web", "--size", "1M"),
        ("volume", "create", "mail", "--size", "1M"),
        ("snapshot", "create", "web@monday"),
    ):
        run(NBDSERVE, *command, "--data", data)
    return data


@pytest.fixture
def names(made: Path, data_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of it that the environment names."""
    shutil.copytree(made, data_directory)
    monkeypatch.setenv("NBDSERVE_DATA", str(data_directory))
    monkeypatch.setenv("PATH", f"{NBDSERVE.parent}:{os.environ['PATH']}")
    return data_directory


class Terminal:
    """A shell at a terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._output = b""

    def say(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str) -> str:
        """Read up to `text`; return what came before it."""
        deadline = time.monotonic() + PATIENCE
        while (at := self._output.find(text.encode())) < 0:
            assert time.monotonic() < deadline, self._output
            if select.select([self._descriptor], [], [], 1.0)[0]:
                self._output += os.read(self._descriptor, 1 << 16)
        before = self._output[:at]
        self._output = self._output[at + len(text) :]
        return before.decode(errors="replace")

    def complete(self, typed: str, directory: Path) -> list[str]:
        """The arguments of nbdserve after `typed`, a tab and a moment for the shell to do it."""
        # What follows the tab stays in the terminal until the shell has dealt with it.
        self.say(f"{typed}\t")
        self.say("\n")
        answer = directory / "answer"
        deadline = time.monotonic() + PATIENCE
        while not answer.exists():
            assert time.monotonic() < deadline, typed
            time.sleep(0.02)
        arguments = answer.read_text().splitlines()
        answer.unlink()
        return arguments


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    child, descriptor = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, {**os.environ, "TERM": "dumb", "PS1": "ready> "})
    try:
        yield Terminal(descriptor)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(descriptor)


@pytest.fixture
def stub(names: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program `nbdserve` first that completes as the real one; else it writes its arguments.

    Return the directory in which the file `answer` then is.
    """
    program = tmp_path / "bin" / "nbdserve"
    program.parent.mkdir()
    program.write_text(f"""#!/bin/sh
if [ -n "$_NBDSERVE_COMPLETE" ] || [ "$1" = completion ]; then
    exec {NBDSERVE} "$@"
fi
printf '%s\\n' "$@" >{tmp_path}/new
mv {tmp_path}/new {tmp_path}/answer
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path


CASES = [
    ("nbdserve volume sho", ["volume", "show"]),
    ("nbdserve volume show w", ["volume", "show", "web"]),
    ("nbdserve snapshot delete web@m", ["snapshot", "delete", "web@monday"]),
    ("nbdserve backup web m", ["backup", "web", "mail"]),
    ("nbdserve repo push file:///x --storage-c", ["repo", "push", "file:///x", "--storage-class"]),
    ("nbdserve volume show no-such", ["volume", "show", "no-such"]),
]
"""What is typed before the tab, and the arguments that come of it."""


def test_bash(stub: Path) -> None:
    require("bash")
    with terminal("bash", "--norc", "--noprofile", "-i") as shell:
        shell.say('eval "$(nbdserve completion bash)"; echo sour""ced\n')
        shell.wait_for("sourced")
        for typed, arguments in CASES:
            assert shell.complete(typed, stub) == arguments
        # In bash there is no space behind the @ of a new snapshot, whose name is still to come.
        assert shell.complete("nbdserve snapshot create we\tnew", stub) == [
            "snapshot", "create", "web@new"
        ]  # fmt: skip
        assert (
            shell.complete("nbdserve volume create x --from=web@m", stub)[3] == "--from=web@monday"
        )
        (stub / "some-directory").mkdir()
        assert shell.complete(f"nbdserve status --data {stub}/some-d", stub)[2] == (
            f"{stub}/some-directory/"
        )


def test_bash_finds_the_installed_script_by_itself(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `make install` lays it out, for the package bash-completion."""
    require("bash")
    library = Path("/usr/share/bash-completion/bash_completion")
    if not library.exists():
        pytest.skip("bash-completion not found: run scripts/install-test-dependencies")
    scripts = stub / "share" / "bash-completion" / "completions"
    scripts.mkdir(parents=True)
    (scripts / "nbdserve").write_text(run(NBDSERVE, "completion", "bash").stdout)
    monkeypatch.setenv("XDG_DATA_DIRS", str(stub / "share"))
    with terminal("bash", "--norc", "--noprofile", "-i") as shell:
        shell.say(f". {library}; echo sour''ced\n")
        shell.wait_for("sourced")
        for typed, arguments in CASES[2:3]:
            assert shell.complete(typed, stub) == arguments


def test_zsh(stub: Path) -> None:
    require("zsh")
    with terminal("zsh", "-f", "-i") as shell:
        shell.say('autoload -U compinit; compinit -u -D; eval "$(nbdserve completion zsh)"\n')
        shell.say("unsetopt prompt_cr; echo sour''ced\n")
        shell.wait_for("sourced")
        for typed, arguments in CASES[:4]:
            assert shell.complete(typed, stub) == arguments


def test_fish(stub: Path) -> None:
    """fish tells what it would complete."""
    require("fish")
    script = stub / "nbdserve.fish"
    script.write_text(run(NBDSERVE, "completion", "fish").stdout)
    environment = {**os.environ, "HOME": str(stub), "XDG_CONFIG_HOME": str(stub)}
    for typed, arguments in CASES[:4]:
        command = f"source {script}; complete --do-complete '{typed}'"
        done = run("fish", "--no-config", "-c", command, env=environment)
        words = [line.partition("\t")[0] for line in done.stdout.splitlines()]
        assert words == ([] if typed.endswith(arguments[-1]) else [arguments[-1]])


def ask(line: str, data: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COMPLETED_LINE": line, "_NBDSERVE_COMPLETE": "bash_complete"}
    environment.pop("NBDSERVE_DATA", None)
    if data is not None:
        environment["NBDSERVE_DATA"] = str(data)
    return run(NBDSERVE, env=environment)


def test_nothing_to_read_is_nothing_to_complete(names: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for data in (None, tmp_path / "none", tmp_path / "file", tmp_path / "empty"):
        done = ask("nbdserve volume show ", data)
        assert (done.stdout.strip(), done.stderr) == ("", "")
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "none").exists()
    manifest = next((names / "volumes").iterdir())
    manifest.write_bytes(DAMAGED)
    (names / "volumes" / ".new-1").write_bytes(b"")
    done = ask("nbdserve volume show ", names)
    assert len(done.stdout.split()) == 1
    assert done.stderr == ""


def test_completing_takes_no_lock_and_starts_nothing(names: Path) -> None:
    """Who holds the lock does not answer, and is not waited for; nothing is written."""
    before = {file: file.stat() for file in names.rglob("*")}
    with subprocess.Popen(["flock", names / "lock", "cat"], stdin=subprocess.PIPE) as holder:
        while subprocess.run(["flock", "-n", names / "lock", "true"], check=False).returncode == 0:
            time.sleep(0.05)
        done = ask("nbdserve snapshot delete ", names)
        holder.communicate()
    assert done.stdout.split() == ["plain,web@monday"]
    after = {file: file.stat() for file in names.rglob("*")}
    assert {file: found.st_mtime_ns for file, found in after.items()} == {
        file: found.st_mtime_ns for file, found in before.items()
    }


def test_completing_imports_no_server() -> None:
    program = "import nbdserve.cli.completion, nbdserve.cli.completing, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.decode().split()}
    assert not loaded & {"aiohttp", "asyncio", "boto3", "botocore"}
