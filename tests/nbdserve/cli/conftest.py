"""A command line that is run in this process, on a real data directory."""

import json
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.application import run
from nbdserve.configuration import file


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on standard error of a command that failed."""
        assert self.status in (1, 2), self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("nbdserve: "), self
        return lines[0].removeprefix("nbdserve: ")


class CommandLine:
    """Runs command lines with ``--data`` in the environment."""

    def __init__(self, data: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.data = data
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> Outcome:
        self._capture.readouterr()
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        try:
            status = run([str(argument) for argument in arguments])
        finally:  # as if it had been another process
            root.handlers[:] = handlers
            root.setLevel(level)
        captured = self._capture.readouterr()
        return Outcome(status, captured.out, captured.err)

    def done(self, *arguments: str | Path) -> str:
        """Standard output of a command that must succeed."""
        outcome = self(*arguments)
        assert outcome.status == 0, outcome
        return outcome.out

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.done(*arguments, "--json"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def cli(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CommandLine]:
    monkeypatch.setenv("NBDSERVE_DATA", str(data))
    # Whatever this machine has configured is none of our business.
    monkeypatch.setattr(file, "DEFAULT_FILE", data.with_name("absent.toml"))
    handler = signal.getsignal(signal.SIGTERM)
    yield CommandLine(data, capsys)
    signal.signal(signal.SIGTERM, handler)
