"""A keeper as a process of its own, and what it says to who waits for it."""

import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from backends.errors import StorageError, UnavailableError, one_line

_SYSLOG = "/dev/log"

Document = dict[str, Any]


def start(work: Callable[[Callable[[Document], None]], None]) -> Document:
    """Do ``work`` in a new process; return what it says it is ready with.

    ``work`` gets the function to call when it is ready; until then it may fail with StorageError,
    which is raised here. After that it logs to syslog, where there is one.
    """
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        _work(work, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    if not answer:
        raise UnavailableError("the keeper ended before it had attached anything")
    document: Document = json.loads(answer)
    if "failed" in document:
        raise StorageError(document["failed"])
    return document


def _work(work: Callable[[Callable[[Document], None]], None], pipe: int) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.chdir("/")

        def ready(document: Document) -> None:
            _detach_streams()
            _answer(pipe, document)

        try:
            work(ready)
            status = 0
        except StorageError as error:
            _answer(pipe, {"failed": one_line(error)})
        except Exception as error:
            line = f"internal error: {type(error).__name__}: {one_line(error)}"
            _answer(pipe, {"failed": line})
            logging.getLogger(__name__).error("%s", line)
    finally:
        os._exit(status)


def _answer(pipe: int, document: Document) -> None:
    try:
        os.write(pipe, json.dumps(document).encode())
        os.close(pipe)
    except OSError:
        return  # it has answered already, or nobody waits any more


def _detach_streams() -> None:
    """Let go of the terminal; log to syslog instead."""
    root = logging.getLogger()
    root.handlers.clear()
    if Path(_SYSLOG).exists():
        handler = logging.handlers.SysLogHandler(_SYSLOG)
        handler.setFormatter(logging.Formatter(f"nbdserve-attach[{os.getpid()}]: %(message)s"))
        root.addHandler(handler)
    else:
        root.addHandler(logging.NullHandler())
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        os.dup2(null, stream.fileno())
    os.close(null)
