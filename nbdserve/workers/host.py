"""A host of views in a worker process, as the daemon sees it.

::

    start --> RUNNING --process ends--> LOST --after a pause--> RUNNING
                 |                        |
                 +--------- close --------+--> CLOSED

A worker is a child of the daemon (child.py). Whatever goes wrong with the channel ends it; only
when it has ended are its calls answered (HostLostError), its connections ended, and the catalogue
told: nothing is written any more.

The pause is 0 the first time, and grows while workers of this place die soon after their start.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from backends.errors import UnavailableError
from nbdserve.logs import Logs
from nbdserve.server.meter import Numbers
from nbdserve.workers.child import Child, how_it_ended
from nbdserve.workers.export import Connections, WorkerExport
from snapshots.extent_log import Run
from snapshots.host import Cell, HostLostError, LayerCells, MergeNames, Watcher
from snapshots.limits import Limits

LONGEST_PAUSE: Final = 60.0
"""Seconds, at most, from the end of a worker that does not live long to the next one's start."""

MEASURE_SECONDS: Final = 1.0
"""Seconds that a worker has to tell what it has counted."""

STOP_SECONDS: Final = 30.0
"""Seconds that a worker has to end when it is told to; all its views are closed."""

_LONG_LIFE: Final = 60.0  # seconds, after which the pause begins anew

log = logging.getLogger(__name__)


class _Process:
    """One worker process from its start to its end."""

    def __init__(self, host: WorkerHost, arguments: tuple[str, ...], lock: int) -> None:
        self._host = host
        self.child = Child("nbdserve.workers", arguments, lock, self, self._on_end)
        self.channel = self.child.channel
        self.connections = Connections(self.channel)

    def _on_end(self, status: int) -> None:
        self._host.process_ended(self, status)
        self.channel.fail_calls(
            HostLostError(f"worker process {self.child.pid} has ended; try again")
        )
        self.connections.lost()

    # What comes from the worker

    def call(self, method: str, arguments: list[Any]) -> Coroutine[Any, Any, Any]:
        raise ValueError(f"a worker called {method!r}")

    def event(self, name: str, arguments: list[Any], sock: socket.socket | None) -> None:
        if name == "over":
            self.connections.over(*arguments)
        elif name == "gone":
            self.connections.gone(*arguments)
        elif name == "failed":
            self._host.volume_failed(*arguments)
        elif name == "wanted":
            self._host.chunks_wanted(*arguments)
        elif name == "measured":
            self._host.told(*arguments)
        elif name == "retired":
            self._host.retired(*arguments)
        else:
            raise ValueError(f"event {name!r}")

    def closed(self, wrong: str | None) -> None:
        if wrong is not None:
            log.error("worker process %d is ended: %s", self.child.pid, wrong)
        if wrong is not None or not self._host.closing:
            self.child.kill()


class WorkerHost:
    """A ``ViewHost`` (see the module's text).

    ``retire`` gets what was counted of an export, by its key, when the worker does not serve it any
    more. Requests that take ``slow_seconds`` are in the log; 0: none are. ``restarts`` counts the
    processes that followed one that died.
    """

    def __init__(
        self,
        data: Path,
        logs: Logs,
        lock: Callable[[], int],
        retire: Callable[[str, Numbers], None] = lambda key, numbers: None,
        slow_seconds: float = 0.0,
    ) -> None:
        self._data = data
        self._logs = logs
        self._slow_seconds = slow_seconds
        self._lock = lock
        self._retire = retire
        self.counted: dict[str, Numbers] = {}
        self.responding = True
        self.restarts = 0
        self._watcher: Watcher | None = None
        self._process: _Process | None = None
        self._pause = 0.0
        self._restart: asyncio.TimerHandle | None = None
        self.closing = False

    @property
    def available(self) -> bool:
        return self._process is not None and self._process.channel.open

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.child.pid

    async def start(self, watcher: Watcher) -> None:
        self._watcher = watcher
        try:
            self._process = self._spawn()
        except OSError as error:
            raise UnavailableError(f"a worker cannot be started: {error.strerror}") from error

    def _arguments(self) -> tuple[str, ...]:
        return (str(self._data), self._logs.level, self._logs.form, str(self._slow_seconds))

    def change_logs(self, logs: Logs) -> None:
        """Log in this way from now on, in processes that are started later, too."""
        self._logs = logs
        self._tell("logs", logs.level, logs.form)

    def _spawn(self) -> _Process:
        return _Process(self, self._arguments(), self._lock())

    def _start_again(self) -> None:
        self._restart = None
        try:
            self._process = self._spawn()
            self.restarts += 1
        except OSError as error:
            log.error("a worker cannot be started: %s", error.strerror)
            self._plan_restart()

    def _plan_restart(self) -> None:
        loop = asyncio.get_running_loop()
        self._restart = loop.call_later(self._pause, self._start_again)
        self._pause = min(2 * self._pause or 1.0, LONGEST_PAUSE)

    def process_ended(self, process: _Process, status: int) -> None:
        """Called by the process, before anybody else learns of its end."""
        self._process = None
        for key, numbers in self.counted.items():
            self._retire(key, numbers)
        self.counted = {}
        if self.closing:
            if status:
                log.warning("worker process %d %s", process.child.pid, how_it_ended(status))
            return
        log.error("worker process %d %s", process.child.pid, how_it_ended(status))
        assert self._watcher is not None
        self._watcher.lost(self)
        if asyncio.get_running_loop().time() - process.child.begun > _LONG_LIFE:
            self._pause = 0.0
        self._plan_restart()

    def volume_failed(self, key: str, why: str) -> None:
        """Called by the process."""
        assert self._watcher is not None
        self._watcher.failed(key, why)

    def chunks_wanted(self, layer: str, first: int, end: int) -> None:
        """Called by the process."""
        assert self._watcher is not None
        self._watcher.wanted(self, layer, first, end)

    # Measuring

    async def measure(self) -> None:
        """Ask the worker what it has counted; ``responding`` says whether it has answered."""
        if self._process is None:
            self.responding = False
            return
        try:
            async with asyncio.timeout(MEASURE_SECONDS):
                await self._process.channel.call("measure")
            self.responding = True
        except (HostLostError, TimeoutError):
            self.responding = False

    def limit(self, key: str, limits: Limits) -> None:
        """Let other limits hold for an export, if the worker serves it."""
        self._tell("limit", key, limits.as_map())

    def told(self, read: Mapping[str, Sequence[Any]]) -> None:
        """Called by the process."""
        self.counted = {key: Numbers.unpack(packed) for key, packed in read.items()}

    def retired(self, key: str, packed: Sequence[Any]) -> None:
        """Called by the process."""
        self.counted.pop(key, None)
        self._retire(key, Numbers.unpack(packed))

    async def close(self) -> None:
        self.closing = True
        if self._restart is not None:
            self._restart.cancel()
        process = self._process
        if process is None:
            return
        process.channel.event("stop")
        if not await process.child.wait(STOP_SECONDS):
            log.warning("worker process %d did not end by itself", process.child.pid)

    def kill(self) -> None:
        if self._process is not None:
            self._process.child.kill()

    def lease(
        self,
        key: str,
        name: str,
        size: int,
        read_only: bool,
        bases: Mapping[str, str],
        revoke: Callable[[], None],
    ) -> WorkerExport:
        if self._process is None:
            raise HostLostError(f"{name}: its worker has ended; try again")
        return WorkerExport(self._process.connections, key, name, size, read_only, bases, revoke)

    # Calls

    async def ping(self) -> None:
        """Return when the worker's event loop has answered. HostLostError."""
        await self._call("ping")

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._process is None:
            raise HostLostError("a worker has ended; try again")
        return await self._process.channel.call(method, *arguments)

    async def open_volume(
        self,
        key: str,
        name: str,
        size: int,
        stack: Sequence[str],
        merges: Sequence[MergeNames],
        failure: str | None,
    ) -> None:
        await self._call("open_volume", key, name, size, stack, merges, failure)

    async def open_snapshot(
        self, key: str, name: str, size: int, stack: Sequence[str], merges: Sequence[MergeNames]
    ) -> None:
        await self._call("open_snapshot", key, name, size, stack, merges)

    async def close_view(self, key: str) -> None:
        await self._call("close_view", key)

    async def flush(self, key: str) -> None:
        await self._call("flush", key)

    async def record(self, key: str) -> None:
        await self._call("record", key)

    async def free_hidden(self, key: str, layer: str | None) -> None:
        await self._call("free_hidden", key, layer)

    async def grow(self, key: str, size: int) -> None:
        await self._call("grow", key, size)

    async def count_owned(self, key: str) -> int:
        return int(await self._call("count_owned", key))

    async def count_cells(
        self, key: str, blocks: int, cell_blocks: int, since: str | None
    ) -> LayerCells:
        layers, cells = await self._call("count_cells", key, blocks, cell_blocks, since)
        return [(name, held) for name, held in layers], [Cell(*cell) for cell in cells]

    async def list_changed(
        self, key: str, layers: Sequence[str], blocks: int
    ) -> list[tuple[int, int, bool]]:
        found = await self._call("list_changed", key, layers, blocks)
        return [(offset, length, zero) for offset, length, zero in found]

    async def check_journal(self, key: str) -> None:
        await self._call("check_journal", key)

    async def settle(self, key: str) -> None:
        await self._call("settle", key)

    async def add_head(self, key: str, layer: str) -> None:
        await self._call("add_head", key, layer)

    async def drop_head(self, key: str) -> None:
        await self._call("drop_head", key)

    async def freeze(self, keys: Sequence[str]) -> None:
        await self._call("freeze", keys)

    async def thaw(self, keys: Sequence[str]) -> None:
        await self._call("thaw", keys)

    async def swap_heads(self, keys: Sequence[str]) -> None:
        await self._call("swap_heads", keys)

    async def finish_seal(self, key: str) -> None:
        await self._call("finish_seal", key)

    async def fail(self, key: str, why: str) -> None:
        await self._call("fail", key, why)

    async def end_commit(self, key: str) -> None:
        await self._call("end_commit", key)

    async def recall(self, layer: str) -> None:
        await self._call("recall", layer)

    async def move(self, source: str, target: str, runs: Sequence[Run]) -> None:
        await self._call("move", source, target, runs)

    async def follow_merge(self, source: str, target: str) -> None:
        await self._call("follow_merge", source, target)

    async def drop_layer(self, layer: str) -> None:
        await self._call("drop_layer", layer)

    def fetched(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        self._tell("fetched", layer, runs)

    def lost_again(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        self._tell("lost_again", layer, runs)

    def refused(self, layer: str, first: int, end: int, why: str) -> None:
        self._tell("refused", layer, first, end, why)

    def _tell(self, name: str, *arguments: Any) -> None:
        if self._process is not None:
            self._process.channel.event(name, *arguments)

    async def complete(self, layer: str) -> None:
        await self._call("complete", layer)
