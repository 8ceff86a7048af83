"""How far long work is: a bar on a terminal, a plain line now and then elsewhere.

Both go to standard error, so that results can be read from standard output.
"""

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

import click

from nbdserve.cli.output import format_size

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Use as a context manager; :meth:`update` may be called from any thread."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.render_finish()

    def update(self, done: int, total: int) -> None:
        """``done`` bytes of ``total`` are done; the total may still change."""
        with self._lock:
            if self._terminal:
                self._draw(done, total)
            elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
                self._said = time.monotonic()
                click.echo(f"{self._label}: {_position(done, total)}", err=True)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = click.progressbar(
                length=total, label=self._label, file=sys.stderr, item_show_func=_shown
            )
        self._bar.length = total
        self._bar.update(done - self._bar.pos, _position(done, total))


def _position(done: int, total: int) -> str:
    share = 100 if total == 0 else 100 * done // total
    return f"{format_size(done)} of {format_size(total)} ({share} %)"


def _shown(position: str | None) -> str:
    return position or ""
