"""A command line in a process of its own that says ``held`` where it is, and waits."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``code`` with the arguments, until it is there; it is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()
