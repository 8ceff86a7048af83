"""A line in the log for each request that takes long: while it still does, and when it has ended.

Each process looks at what is under way several times within the threshold, so that a disk which
hangs is noticed while it hangs. What a request waits because of its export's limits does not count,
nor what its client takes to receive the reply. There are LINES lines in INTERVAL seconds of one
export at most; what is left out is counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Final

from nbdserve.logs import about as about_line

DEFAULT_SECONDS: Final = 10.0
"""From when on a request is slow, where nothing else is configured."""

LINES: Final = 5
INTERVAL: Final = 10.0

_LOOKS: Final = 4  # within the threshold
_LEAST_PAUSE: Final = 0.05

log = logging.getLogger(__name__)


class SlowLog:
    """Of one export: ``seconds`` is the threshold."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begun = float("-inf")
        self._lines = 0
        self._left_out = 0

    def report(
        self,
        export: str,
        about: Mapping[str, object],
        what: str,
        seconds: float,
        *,
        ended: bool,
    ) -> None:
        """Write a line, unless there were too many; ``about`` is its ``extra``."""
        self.settle(export)
        if self._lines >= LINES:
            self._left_out += 1
            return
        if not self._lines:
            self._begun = perf_counter()
        self._lines += 1
        how = "took" if ended else "is under way for"
        log.warning("slow request: %s %s %.3f s", what, how, seconds, extra=about)

    def settle(self, export: str) -> None:
        """Say what was left out, once the time has come."""
        if self._lines and perf_counter() - self._begun >= INTERVAL:
            if self._left_out:
                log.warning(
                    "slow request: %d more lines", self._left_out, extra=about_line(export=export)
                )
            self._lines = self._left_out = 0


class Watch:
    """Calls ``look`` again and again while ``wanted``."""

    def __init__(
        self, seconds: float, look: Callable[[], None], wanted: Callable[[], bool]
    ) -> None:
        self._pause = max(_LEAST_PAUSE, seconds / _LOOKS)
        self._look = look
        self._wanted = wanted
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, unless it goes on."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pause, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._wanted():
            self._look()
            self.start()
