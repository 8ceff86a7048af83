"""What all processes have counted of the requests since the daemon started.

Each process counts by itself (server/meter.py) and is asked when somebody wants to know. An export
that nobody uses any more, and one whose worker ended, is in ``_past``: what the worker had told of
it last. So a sum never goes back, as far as anybody has seen it. What a worker counted after that
and before it died is lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdserve.server.meter import Meters, Numbers
from snapshots.limits import Limits

Names = Callable[[Iterable[str]], Mapping[str, tuple[str, str | None]]]
"""The volumes and snapshots of these keys, as they are called now; those that are gone left out."""


class Process(Protocol):
    """A process that serves exports, as it is measured."""

    @property
    def counted(self) -> Mapping[str, Numbers]:
        """What its exports in use had counted when it told last, by key."""

    @property
    def responding(self) -> bool:
        """Whether it answered when it was asked last."""

    @property
    def restarts(self) -> int:
        """How often it was started again after it had died."""

    async def measure(self) -> None:
        """Let it tell; returns in any case, soon."""

    def limit(self, key: str, limits: Limits) -> None:
        """Let other limits hold for an export, if it is in use there."""


@dataclass(frozen=True)
class Measurement:
    """Of a volume (``snapshot`` is None) or a snapshot."""

    volume: str
    snapshot: str | None
    numbers: Numbers


class Measuring:
    """``meters`` are this process's own; ``processes`` are added by whoever starts them.

    Requests that take ``slow_seconds`` are in the log; 0: none are.
    """

    def __init__(self, slow_seconds: float = 0.0) -> None:
        self.meters = Meters(self.retire, slow_seconds)
        self.processes: Sequence[Process] = ()
        self._past: dict[str, Numbers] = {}
        self._begun = time.monotonic()
        self._asking: asyncio.Task[None] | None = None

    @property
    def uptime(self) -> float:
        """Seconds since the counting began."""
        return time.monotonic() - self._begun

    def retire(self, key: str, numbers: Numbers) -> None:
        """An export is not used any more, or not by the process that counted this."""
        self._past.setdefault(key, Numbers()).include(numbers.at_rest())

    def limit(self, key: str, limits: Limits) -> None:
        """Let other limits hold for an export, wherever it is in use."""
        self.meters.limit(key, limits)
        for process in self.processes:
            process.limit(key, limits)

    async def ask(self) -> None:
        """Let all processes tell; however many want to know, they are asked once at a time."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        await asyncio.shield(self._asking)

    async def _ask(self) -> None:
        try:
            await asyncio.gather(*(process.measure() for process in self.processes))
        finally:
            self._asking = None

    async def read(self, names: Names) -> list[Measurement]:
        """Everything that was used since the daemon started and is still there, by name."""
        await self.ask()
        read = self._sum_up()
        found = names(read)
        for key in self._past.keys() - found.keys():
            del self._past[key]  # deleted, with all that was known of it
        measured = [
            Measurement(*found[key], numbers) for key, numbers in read.items() if key in found
        ]
        return sorted(measured, key=lambda one: (one.volume, one.snapshot or ""))

    def count(self) -> int:
        """Requests that were answered and those in flight, as far as is known."""
        return sum(
            numbers.in_flight + sum(command.count for command in numbers.commands.values())
            for numbers in self._sum_up().values()
        )

    def _sum_up(self) -> dict[str, Numbers]:
        # Without await: what is retired meanwhile would be counted twice or not at all.
        read: dict[str, Numbers] = {}
        counted = (process.counted for process in self.processes)
        for source in (self._past, self.meters.read(), *counted):
            for key, numbers in source.items():
                read.setdefault(key, Numbers()).include(numbers)
        return read
