"""Lines of the log: fields, both forms, and the journal's priorities."""

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from nbdserve.logs import JsonFormatter, TextFormatter, about


def record(message: str, *arguments: object, level: int = logging.INFO, **more: Any) -> Any:
    made = logging.LogRecord("nbdserve", level, __file__, 1, message, arguments, None)
    made.created = 1_700_000_000.5
    made.msecs = 500.0
    for name, value in more.items():
        setattr(made, name, value)
    return made


FIELDS = about(connection=7, client="127.0.0.1:1", export=None)


def test_text() -> None:
    text = TextFormatter(dated=True)
    assert text.format(record("%d words", 2)) == "2023-11-14T22:13:20Z INFO 2 words"
    assert text.format(record("opened", **FIELDS)) == (
        "2023-11-14T22:13:20Z INFO connection=7 client=127.0.0.1:1: opened"
    )
    assert TextFormatter(dated=False).format(record("x")) == "INFO x"


def test_json() -> None:
    line = JsonFormatter("worker").format(record('a "b"\nc', level=logging.WARNING, **FIELDS))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.500Z",
        "level": "warning",
        "process": "worker",
        "pid": os.getpid(),
        "connection": 7,
        "client": "127.0.0.1:1",
        "message": 'a "b"\nc',
    }


def failure() -> Any:
    try:
        raise ValueError("inner")
    except ValueError:
        return sys.exc_info()


def test_tracebacks() -> None:
    found = record("failed", level=logging.ERROR, exc_info=failure())
    assert TextFormatter(dated=False).format(found).splitlines()[-1] == "ValueError: inner"
    line = JsonFormatter("daemon").format(found)
    assert "\n" not in line
    assert json.loads(line)["traceback"].endswith("ValueError: inner")


SCRIPT = """
import logging, sys
from nbdserve.logs import Logs, write_logs
write_logs(Logs("debug", sys.argv[1]))
for level in ("debug", "info", "warning", "error", "critical"):
    getattr(logging, level)("a line")
try:
    raise ValueError
except ValueError:
    logging.exception("failed")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_in_the_journal_lines_have_priorities(form: str) -> None:
    """Standard error is the journal's when it is the socket that JOURNAL_STREAM names."""
    reading, writing = os.pipe()
    status = os.fstat(writing)
    for stream, priorities in (
        (f"{status.st_dev}:{status.st_ino}", "764323"),
        (f"{status.st_dev}:{status.st_ino + 1}", None),
        ("nonsense", None),
    ):
        subprocess.run(
            [sys.executable, "-c", SCRIPT, form],
            stderr=writing,
            env={**os.environ, "JOURNAL_STREAM": stream},
            check=True,
        )
        lines = os.read(reading, 1 << 16).decode().splitlines()
        if priorities is None:
            assert all(line.startswith("2" if form == "text" else "{") for line in lines[:5])
            continue
        assert all(line[0] == "<" and line[2] == ">" for line in lines), lines
        assert "".join(line[1] for line in lines)[:6] == priorities
        assert {line[1] for line in lines[5:]} == {"3"}  # all of the traceback
        if form == "json":
            assert json.loads(lines[1][3:])["message"] == "a line"
        else:
            assert lines[1] == "<6>INFO a line"
    os.close(reading)
    os.close(writing)
