"""Logs go to standard error, a line an event, from all processes alike.

What a line is about is no part of its message but in fields (``about``), so that all lines of a
connection can be found by its number::

    2026-11-22T03:00:00Z INFO connection=7 client=127.0.0.1:50234 export=web: opened
    {"time": "2026-11-22T03:00:00.123Z", "level": "info", "process": "daemon", "pid": 4711,
     "connection": 7, "client": "127.0.0.1:50234", "export": "web", "message": "opened"}

Where standard error is the journal's (``JOURNAL_STREAM``, see systemd.exec(5)), the journal notes
the time by itself, and each line begins with its priority, as in sd-daemon(3).
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_PRIORITIES: Final = (  # of syslog(3), from the level on
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
_DEBUG_PRIORITY: Final = 7


@dataclass(frozen=True)
class Logs:
    """What is logged, from ``level`` on, and how: ``form`` is "text" or "json"."""

    level: str = "info"
    form: str = "text"

    def describe(self) -> str:
        return f"{self.level}, {self.form}"


DEFAULT_LOGS: Final = Logs()


def about(**fields: object) -> dict[str, Mapping[str, object]]:
    """The ``extra`` of a log call: what the line is about; a field that is None is left out."""
    return {"fields": {name: value for name, value in fields.items() if value is not None}}


def write_logs(logs: Logs, process: str = "daemon") -> None:
    """Write events as ``logs`` says from now on; ``process`` says which of ours this is."""
    in_journal = _stderr_is_the_journal()
    formatter: logging.Formatter
    formatter = (
        JsonFormatter(process) if logs.form == "json" else TextFormatter(dated=not in_journal)
    )
    handler = logging.StreamHandler()
    handler.setFormatter(_WithPriority(formatter) if in_journal else formatter)
    logging.basicConfig(level=logs.level.upper(), handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """A line for people; the lines of a traceback follow it."""

    def __init__(self, *, dated: bool) -> None:
        super().__init__()
        self._dated = dated

    def format(self, record: logging.LogRecord) -> str:
        words = [f"{name}={value}" for name, value in _fields(record).items()]
        line = f"{record.levelname} {' '.join(words)}{': ' if words else ''}{record.getMessage()}"
        if self._dated:
            line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(record.created))} {line}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """A JSON object on one line, a traceback included."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        document: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": os.getpid(),
            **_fields(record),
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


class _WithPriority(logging.Formatter):
    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        priority = next(
            (number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG_PRIORITY
        )
        text = self._formatter.format(record)
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields


def _stderr_is_the_journal() -> bool:
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
