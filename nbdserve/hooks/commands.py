"""Running one hook: no shell, nothing to read, and what it says goes to standard error."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

PAUSES: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts to thaw."""

_DYING: Final = 5.0
"""Seconds that a killed command may take to be gone."""


@dataclass(frozen=True)
class Outcome:
    """How a hook ended: ``status`` None when it could not be run or did not end by itself.

    ``error`` is a line about what went wrong, None when nothing did; ``seconds`` is how long it
    took, of ``attempts``. ``lingers`` is a process that was killed and is not gone.
    """

    status: int | None
    seconds: float
    error: str | None = None
    attempts: int = 1
    lingers: "subprocess.Popen[bytes] | None" = None

    def document(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "attempts": self.attempts,
            "error": self.error,
        }


def run_hook(
    hook: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    seconds: float,
    ended: int | None = None,
) -> Outcome:
    """Run a command for at most so many seconds, and until there is something to read of ``ended``.

    ``hook`` is ``freeze`` or ``thaw``, which the command finds in NBDSERVE_HOOK.
    """
    begun = time.monotonic()

    def outcome(status: int | None, error: str | None) -> Outcome:
        return Outcome(status, time.monotonic() - begun, error)

    named = f"{hook} command {words[0]!r}"
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=_output(),
            env={**environment, "NBDSERVE_HOOK": hook},
            process_group=0,
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return outcome(None, f"the {named} cannot be run: {reason.lower()}")
    pidfd = os.pidfd_open(process.pid)
    try:
        waiting = [pidfd] if ended is None else [pidfd, ended]
        ready = select.select(waiting, [], [], seconds)[0]
        if pidfd not in ready:
            with contextlib.suppress(PermissionError):  # of sudo, which is root's
                os.killpg(process.pid, signal.SIGKILL)
            gone = bool(select.select([pidfd], [], [], _DYING)[0])
            why = "was killed with the backup" if ready else f"took longer than {seconds:g} s"
            done = outcome(None, f"the {named} {why}")
            if not gone:
                return Outcome(
                    None, done.seconds, f"{done.error}, and cannot be killed", 1, process
                )
            process.wait()
            return done
    finally:
        os.close(pidfd)
    status = process.wait()
    if status > 0:
        return outcome(status, f"the {named} ended with status {status}")
    if status < 0:
        return outcome(None, f"the {named} was ended by signal {-status}")
    return outcome(0, None)


def thaw(words: Sequence[str], environment: Mapping[str, str], seconds: float) -> Outcome:
    """Run the thaw command until it succeeds, as often as there are PAUSES and once more."""
    begun = time.monotonic()
    attempts = 1
    last = run_hook("thaw", words, environment, seconds)
    for pause in PAUSES:
        if last.error is None:
            break
        say(f"warning: {last.error}: trying again in {pause:g} s")
        time.sleep(pause)
        last = run_hook("thaw", words, environment, seconds)
        attempts += 1
    return Outcome(last.status, time.monotonic() - begun, last.error, attempts)


def _output() -> int:
    """Standard error, where there is one."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def say(line: str) -> None:
    """A line for the user; nobody may be there to read it."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):
        sys.stderr.write(f"nbdserve: {line}\n")
        sys.stderr.flush()


def still_frozen(error: str, attempts: int) -> str:
    """What there is to say when a thaw has failed for good."""
    return (
        f"THAW FAILED, {attempts} times, and something may still be frozen: {error};"
        " run the thaw command by hand"
    )
