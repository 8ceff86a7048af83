"""Commands of nbdserve as processes that start fast, and can be killed in the middle.

    python -m tests.integration.faulty_store.commands

imports what nbdserve imports and then, for each line of JSON that it reads, {"arguments", "output",
"errors"}, forks a process that is one command, as if it had been started as a program. It answers
with the process id and, when that has ended, its status: that of the shell, or -9 for SIGKILL.
"""

import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.integration.parts import DIE_WITH_PARENT, NBDSERVE, PROJECT

LONGEST = 400  # seconds that a command may take, outages included


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``status`` is -9 when it was killed."""

    arguments: tuple
    status: int
    output: str
    errors: str
    seconds: float

    @property
    def done(self):
        """Whether it says that it did what it was told."""
        return self.status == 0

    @property
    def killed(self):
        """Whether it was killed."""
        return self.status == -signal.SIGKILL

    def json(self):
        """Return what a command with --json printed."""
        return json.loads(self.output)

    def __str__(self):
        return f"nbdserve {' '.join(self.arguments)}: status {self.status}\n{self.errors}"


class Commands:
    """Runs one command at a time; ``with`` ends the process that forks."""

    def __init__(self, environment):
        self._environment = {**os.environ, **environment}
        self._launcher = subprocess.Popen(
            [*DIE_WITH_PARENT, sys.executable, "-m", __spec__.name],
            cwd=PROJECT, env=self._environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._launcher.stdin.close()
        self._launcher.wait(timeout=60)
        self._launcher.stdout.close()

    def run(self, *arguments, kill_after=None, afresh=False):
        """Run a command; SIGKILL it after so many seconds, unless it has ended by then.

        ``afresh``: start the program itself, as a shell does.
        """
        words = [str(word) for word in arguments]
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="nbdserve-command-") as directory:
            output, errors = Path(directory) / "output", Path(directory) / "errors"
            for path in (output, errors):
                path.touch()  # the command may be killed before it gets there
            run = self._start if afresh else self._fork
            status = run(words, output, errors, kill_after)
            texts = [path.read_text(errors="replace") for path in (output, errors)]
        return Ended(tuple(words), status, *texts, time.monotonic() - started)

    @contextlib.contextmanager
    def background(self, *arguments):
        """Run a command beside what is in the ``with``; yields what waits for its end."""
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(self.run, *arguments)
            yield ending.result

    def _start(self, words, output, errors, kill_after):
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                [*DIE_WITH_PARENT, NBDSERVE, *words], env=self._environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            )  # fmt: skip
            try:
                return process.wait(timeout=LONGEST if kill_after is None else kill_after)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                if kill_after is None:
                    raise
                return -signal.SIGKILL

    def _fork(self, words, output, errors, kill_after):
        order = {"arguments": words, "output": str(output), "errors": str(errors)}
        self._launcher.stdin.write(json.dumps(order) + "\n")
        self._launcher.stdin.flush()
        process = int(self._launcher.stdout.readline())

        def kill():
            # The launcher does not collect a process before we have read that it ended.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

        timer = threading.Timer(LONGEST if kill_after is None else kill_after, kill)
        timer.start()
        status = int(self._launcher.stdout.readline())
        timer.cancel()
        timer.join()
        self._launcher.stdin.write("\n")
        self._launcher.stdin.flush()
        if status == -signal.SIGKILL and kill_after is None:
            raise TimeoutError(f"nbdserve {' '.join(words)} hangs")
        return status


def main():
    """Fork commands until standard input ends."""
    import botocore.auth  # noqa: F401, PLC0415

    import backends.s3_objects  # noqa: F401, PLC0415
    import nbdserve.cli.backup  # noqa: PLC0415
    import nbdserve.cli.repositories  # noqa: PLC0415
    import nbdserve.cli.volume  # noqa: F401, PLC0415

    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if not process:
            run_command(order)
        print(process, flush=True)
        # It stays a zombie until the reader knows, so that nobody else is killed in its place.
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        exited = ended.si_code == os.CLD_EXITED
        print(ended.si_status if exited else -ended.si_status, flush=True)
        sys.stdin.readline()
        os.waitpid(process, 0)


def run_command(order):
    """Be the command; does not return."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
    random.seed()
    sys.argv = ["nbdserve", *order["arguments"]]
    from nbdserve.cli import main as command  # noqa: PLC0415

    status = 70
    try:
        command()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
