"""A ``Fetcher`` in a process of its own, as the daemon sees it.

::

             +--------- after IDLE_SECONDS with no layer ---------+
             v                                                    |
    --> NOT NEEDED --a call, or a layer begins--> RUNNING --------+
                                                   ^   |
             after a pause, if a layer is begun ---+   +--it ends by itself--> (calls fail)

Who restores nothing lazily has no such process. The pause grows while one after the other dies
soon after its start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from backends.errors import UnavailableError
from nbdserve.logs import Logs
from nbdserve.workers.child import Child, how_it_ended
from snapshots.fetcher import FetchWatcher
from snapshots.lazy import LazyLayer, lazy_from_map

STOP_SECONDS: Final = 5.0
"""Seconds that it has to end when told to: what it does not note now is fetched again."""

LONGEST_PAUSE: Final = 30.0
"""Seconds, at most, from its end to the next one's start."""

IDLE_SECONDS: Final = 30.0
"""Seconds until one that no layer needs is ended."""

_LONG_LIFE: Final = 60.0

_TOLD: Final = frozenset(("fetched", "lost_again", "refused", "progress", "pinned", "whole"))

log = logging.getLogger(__name__)


class _Process:
    """One process from its start to its end, and what comes from it."""

    def __init__(self, fetcher: FetcherProcess, arguments: tuple[str, ...], lock: int) -> None:
        self._fetcher = fetcher
        self.child = Child(
            "nbdserve.fetcher",
            arguments,
            lock,
            self,
            lambda status: fetcher.has_ended(self.child, status),
        )

    def call(self, method: str, arguments: list[Any]) -> Coroutine[Any, Any, Any]:
        raise ValueError(f"the fetcher called {method!r}")

    def event(self, name: str, arguments: list[Any], sock: socket.socket | None) -> None:
        if name not in _TOLD:
            raise ValueError(f"event {name!r}")
        self._fetcher.told(self.child, name, *arguments)

    def closed(self, wrong: str | None) -> None:
        if wrong is not None:
            log.error("fetcher process %d is ended: %s", self.child.pid, wrong)
            self.child.kill()


class FetcherProcess:
    """See the module's text; ``lock`` gives the locked descriptor of the data directory."""

    def __init__(self, data: Path, logs: Logs, lock: Callable[[], int]) -> None:
        self._data = data
        self._logs = logs
        self._lock = lock
        self._watcher: FetchWatcher | None = None
        self._child: Child | None = None
        self._leaving: set[Child] = set()
        self._calls = 0
        self._idle: asyncio.TimerHandle | None = None
        self._layers: dict[str, LazyLayer] = {}
        self._pause = 0.0
        self._restart: asyncio.TimerHandle | None = None
        self._closing = False

    async def start(self, watcher: FetchWatcher) -> None:
        self._watcher = watcher

    async def close(self) -> None:
        self._closing = True
        for timer in (self._restart, self._idle):
            if timer is not None:
                timer.cancel()
        self._dismiss()
        await asyncio.gather(*(child.wait(STOP_SECONDS) for child in self._leaving))

    def kill(self) -> None:
        """End it at once; it is started again if it is needed."""
        for child in (self._child, *self._leaving):
            if child is not None:
                child.kill()

    def _arguments(self) -> tuple[str, ...]:
        return (str(self._data), self._logs.level, self._logs.form)

    def change_logs(self, logs: Logs) -> None:
        """Log in this way from now on, in a process that is started later, too."""
        self._logs = logs
        if self._child is not None:
            self._child.channel.event("logs", logs.level, logs.form)

    def _dismiss(self) -> None:
        """Let it end; who needs one from here on gets another."""
        if self._child is not None:
            self._child.channel.event("stop")
            self._leaving.add(self._child)
            self._child = None

    def _end_if_idle(self) -> None:
        self._idle = None
        if not self._layers and not self._calls:
            self._dismiss()

    async def _call(self, method: str, *arguments: Any) -> Any:
        child = self._running()
        self._calls += 1
        try:
            return await child.channel.call(method, *arguments)
        finally:
            self._calls -= 1
            if self._idle is None and not self._closing:
                loop = asyncio.get_running_loop()
                self._idle = loop.call_later(IDLE_SECONDS, self._end_if_idle)

    # Its life

    def _running(self) -> Child:
        """The process, started if need be. UnavailableError."""
        if self._closing:
            raise UnavailableError("nbdserve is shutting down")
        if self._child is None:
            try:
                self._child = _Process(self, self._arguments(), self._lock()).child
            except OSError as error:
                raise UnavailableError(
                    f"the fetcher process cannot be started: {error.strerror}"
                ) from error
            for layer, lazy in self._layers.items():
                self._child.channel.event("begin", layer, asdict(lazy))
        return self._child

    def has_ended(self, child: Child, status: int) -> None:
        """Called by the process."""
        child.channel.fail_calls(UnavailableError("the fetcher process has ended; try again"))
        if child is not self._child:
            self._leaving.discard(child)
            return
        self._child = None
        log.error("fetcher process %d %s", child.pid, how_it_ended(status))
        loop = asyncio.get_running_loop()
        if loop.time() - child.begun > _LONG_LIFE:
            self._pause = 0.0
        if self._layers:
            self._plan_restart()

    def _plan_restart(self) -> None:
        loop = asyncio.get_running_loop()
        self._restart = loop.call_later(self._pause, self._start_again)
        self._pause = min(2 * self._pause or 1.0, LONGEST_PAUSE)

    def _start_again(self) -> None:
        self._restart = None
        try:
            self._running()
        except UnavailableError as error:
            log.error("%s", error)
            self._plan_restart()

    def told(self, child: Child, name: str, layer: str, *rest: Any) -> None:
        """Called by the process."""
        if child is not self._child or layer not in self._layers:
            return  # it was ended meanwhile
        if name == "pinned":
            self._layers[layer] = self._layers[layer].changed(pin=rest[0])
        getattr(self._watcher, name)(layer, *rest)

    # Calls

    async def find(self, url: str, volume: str, snapshot: str, rate: int | None) -> LazyLayer:
        found = await self._call("find", url, volume, snapshot, rate)
        return lazy_from_map(found)

    def begin(self, layer: str, lazy: LazyLayer) -> None:
        self._layers[layer] = lazy
        if self._child is not None:
            self._child.channel.event("begin", layer, asdict(lazy))
        elif self._restart is None:
            self._start_again()

    def want(self, layer: str, first: int, end: int) -> None:
        if self._child is not None:
            self._child.channel.event("want", layer, first, end)

    def set_rate(self, layer: str, rate: int | None) -> None:
        if layer in self._layers:
            self._layers[layer] = self._layers[layer].changed(rate=rate)
        if self._child is not None:
            self._child.channel.event("set_rate", layer, rate)

    async def end(self, layer: str) -> None:
        self._layers.pop(layer, None)
        if self._child is not None:
            # One that has ended fetches no more.
            with contextlib.suppress(UnavailableError):
                await self._call("end", layer)

    async def let_go(self, lazy: LazyLayer) -> None:
        await self._call("let_go", asdict(lazy))
