"""Warnings before a disk is full: each is logged once when it begins, and once when it is over.

::

    FINE --free < warn_free--> WARNING --free < critical_free--> CRITICAL

and back when there is a tenth more than that again: what goes up and down at a threshold is one
warning, not many. Inodes are looked at in the same way.

**When it will be full** is told only when the last minutes say so: what is free now, over what went
in a second since the oldest look of the last half hour, if that was five minutes ago at
least and both halves of the time took something. That is an extrapolation, and is worded as one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from backends.layers import Space
from snapshots.names import format_size

_log = logging.getLogger(__name__)

WARNING = "warning"
CRITICAL = "critical"
_LEVELS = (WARNING, CRITICAL)

_STEP = 30.0  # seconds between two looks that are remembered
_SPAN = 1800.0
_LEAST_SPAN = 300.0
_FAR = 30 * 86400.0


@dataclass(frozen=True)
class Threshold:
    """A part of something: ``share`` of it (0 to 1), or ``size``, whichever is more."""

    share: float = 0.0
    size: int = 0

    def of(self, total: int) -> int:
        """The part of ``total``."""
        return max(self.size, int(self.share * total))


# Volumes and snapshots need a handful each; a file system without any left takes none of either.
_INODES = (Threshold(share=0.05), Threshold(share=0.01))


@dataclass(frozen=True)
class SpaceWarning:
    """``kind`` is what runs out, ``level`` WARNING or CRITICAL; ``message`` is one line."""

    kind: str
    level: str
    message: str


class SpaceWatch:
    """See the module's text; ``thresholds`` are those of WARNING and CRITICAL."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.thresholds = (Threshold(), Threshold())
        self._clock = clock
        self._levels: dict[str, int] = {}
        self._looks: deque[tuple[float, int]] = deque()

    def look(self, space: Space) -> None:
        """Take note of what there is, and log what has changed."""
        now = self._clock()
        while self._looks and now - self._looks[0][0] > _SPAN:
            self._looks.popleft()
        if not self._looks or now - self._looks[-1][0] >= _STEP:
            self._looks.append((now, space.free))
        found = {warning.kind: warning for warning in self.warnings(space)}
        for kind, level in self._judge(space).items():
            before = self._levels.get(kind, 0)
            self._levels[kind] = level
            if level > before:
                _log.warning("%s", found[kind].message)
            elif level == 0 < before:
                _log.warning("enough %s again: %s", kind, _describe(kind, space))

    def warnings(self, space: Space) -> list[SpaceWarning]:
        """What is to be said of ``space`` now."""
        warnings = []
        for kind, level in self._judge(space).items():
            if level:
                message = f"the disk is nearly full: {_describe(kind, space)}"
                left = self.seconds_left(space.free) if kind == "space" else None
                if left is not None:
                    message += f"; at the rate of the last minutes none in {_duration(left)}"
                warnings.append(SpaceWarning(kind, _LEVELS[level - 1], message))
        return warnings

    def seconds_left(self, free: int) -> float | None:
        """Seconds until nothing is free if it goes on as in the last minutes; None: nobody knows.

        ``free`` is in bytes.
        """
        if len(self._looks) < 3:
            return None
        now = self._clock()
        (began, first), (middle, half) = self._looks[0], self._looks[len(self._looks) // 2]
        if now - began < _LEAST_SPAN or not began < middle < now or not first > half > free:
            return None
        left = free * (now - began) / (first - free)
        return left if left < _FAR else None

    def _judge(self, space: Space) -> dict[str, int]:
        """The level of each kind: 0, or 1 more than its place in _LEVELS."""
        levels = {"space": self._level("space", space.free, space.total, self.thresholds)}
        if space.inodes:
            levels["inodes"] = self._level("inodes", space.inodes_free, space.inodes, _INODES)
        return levels

    def _level(
        self, kind: str, free: int, total: int, thresholds: tuple[Threshold, Threshold]
    ) -> int:
        level = 0
        for number, threshold in enumerate(thresholds, 1):
            least = threshold.of(total)
            if self._levels.get(kind, 0) >= number:
                least += least // 10
            if free < least:
                level = number
        return level


def _describe(kind: str, space: Space) -> str:
    if kind == "inodes":
        share = 100 * space.inodes_free / space.inodes
        return f"{space.inodes_free} of {space.inodes} inodes ({share:.1f} %) are free"
    share = 100 * space.free / max(1, space.total)
    return f"{format_size(space.free)} of {format_size(space.total)} ({share:.1f} %) are free"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {max(1, seconds / 60):.0f} min"
