"""The watchdog: who does not answer any more is ended and started again.

**The daemon**: the event loop tells the service manager at half of WATCHDOG_USEC that it runs. When
it hangs, nothing is told, and the service manager kills and restarts everything.

**A worker** is asked at the same times, from its first answer on. One that has not answered by the
next time is killed, and a new one started: only its volumes' clients notice. The service manager
goes on hearing that all is well, for its remedy would be worse: it would end the connections of all
volumes.

A worker that waits for a disk (state D of proc(5)) is left alone: no signal ends it before the disk
answers, and then there is no need. So is one that a debugger holds (t).
"""

import asyncio
import logging
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Protocol

from backends.errors import StorageError
from nbdserve.systemd.notify import Notifier

log = logging.getLogger(__name__)


class Answering(Protocol):
    """A worker."""

    @property
    def pid(self) -> int | None:
        """Its process; None while there is none."""

    async def ping(self) -> None:
        """Return when its event loop has answered; StorageError when its process has ended."""

    def kill(self) -> None:
        """End it; another one is started."""


def take_interval(environment: MutableMapping[str, str] = os.environ) -> float | None:
    """Half of what WATCHDOG_USEC says, in seconds; None when this process is not watched."""
    microseconds = environment.pop("WATCHDOG_USEC", "")
    process = environment.pop("WATCHDOG_PID", str(os.getpid()))
    if process != str(os.getpid()) or not microseconds.isdecimal() or not int(microseconds):
        return None
    return int(microseconds) / 2e6


class Watchdog:
    """Runs until it is cancelled, at ``interval`` seconds."""

    def __init__(self, notifier: Notifier, workers: Sequence[Answering], interval: float) -> None:
        self._notifier = notifier
        self._workers = workers
        self._interval = interval
        self._asked: dict[Answering, tuple[int, asyncio.Task[bool]]] = {}
        self._known: set[int] = set()  # processes that have answered
        self._excused: set[int] = set()

    async def run(self) -> None:
        try:
            while True:
                self.look()
                await asyncio.sleep(self._interval)
        finally:
            for _, question in self._asked.values():
                question.cancel()

    def look(self) -> None:
        """Say that the event loop runs, and see which workers do."""
        self._notifier.alive()
        for worker in self._workers:
            self._look_at(worker)

    def _look_at(self, worker: Answering) -> None:
        process, question = self._asked.get(worker, (None, None))
        if question is None or question.done():
            if question is not None and process is not None:
                self._excused.discard(process)
                (self._known.add if question.result() else self._known.discard)(process)
            if worker.pid is not None:
                self._asked[worker] = (worker.pid, asyncio.ensure_future(_answers(worker)))
            return
        assert process is not None
        if process not in self._known:
            return
        state = _state(process)
        if state in ("D", "t"):
            if process not in self._excused:
                self._excused.add(process)
                why = "waits for a disk" if state == "D" else "is held by a debugger"
                log.warning("worker process %d does not answer: it %s", process, why)
        elif worker.pid == process:
            log.error(
                "worker process %d has not answered for %g seconds, and is ended",
                process,
                self._interval,
            )
            worker.kill()


async def _answers(worker: Answering) -> bool:
    try:
        await worker.ping()
    except StorageError:  # that it has ended is known elsewhere
        return False
    return True


def _state(process: int) -> str:
    """The state of a process's main thread, as proc(5) has it; empty when it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""
