"""What a command takes: time, processor time, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.process import (
    DIE_WITH_PARENT,
    BenchError,
    read_busy_seconds,
    read_cpu_seconds,
)

_METERING = Path(__file__).with_name("metering.py")
_LONGEST_SECONDS = 1800.0


@dataclass(frozen=True)
class Cost:
    """What a command took.

    ``cpu`` is user and system time, in seconds, of the command with its children, and of the
    daemon that it used; ``peak`` the bytes of resident memory of the command's largest process;
    ``others`` how many processors were busy with something else, an S3 server among it.
    """

    seconds: float
    cpu: float
    peak: int
    others: float


def measure(
    *command: str | Path,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    stdin: Path | None = None,
    stdout: Path | None = None,
    daemon: int | None = None,
) -> tuple[Cost, str]:
    """Run a command to its end; what it took, and what it printed unless ``stdout`` has it.

    ``environment`` is added to this process's. BenchError when the command fails. What is dirty in
    the page cache is written back first, so that nobody pays for the one before.
    """
    words = [str(word) for word in command]
    os.sync()
    with tempfile.TemporaryDirectory(prefix="metering-") as scratch:
        taken, printed, complaints = (Path(scratch) / name for name in ("taken", "out", "err"))
        metering = [sys.executable, "-I", "-S", str(_METERING), str(taken)]
        busy = read_busy_seconds()
        before = read_cpu_seconds(daemon) if daemon is not None else 0.0
        with (
            (stdin or Path(os.devnull)).open("rb") as source,
            (stdout or printed).open("wb") as sink,
            complaints.open("wb") as errors,
        ):
            process = subprocess.Popen(
                [*DIE_WITH_PARENT, *metering, *DIE_WITH_PARENT, *words],
                stdin=source,
                stdout=sink,
                stderr=errors,
                cwd=directory,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
            try:
                status = process.wait(_LONGEST_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise BenchError(
                    f"{' '.join(words)}: not done after {_LONGEST_SECONDS:.0f} s"
                ) from error
            finally:
                process.kill()
                process.wait()
        used = read_cpu_seconds(daemon) - before if daemon is not None else 0.0
        busy = read_busy_seconds() - busy
        output = "" if stdout else printed.read_text(errors="replace")
        if status:
            said = complaints.read_text(errors="replace").strip() or output.strip()
            lines = said.splitlines() or [f"status {status}"]
            raise BenchError(f"{' '.join(words)}: {lines[-1]}")
        found = json.loads(taken.read_text())
    cpu = found["cpu"] + used
    others = max(0.0, busy - cpu) / max(found["seconds"], 0.01)
    return Cost(found["seconds"], cpu, found["peak"], others), output
