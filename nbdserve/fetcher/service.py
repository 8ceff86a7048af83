"""What runs in the fetcher process: a ``LocalFetcher``, told over the channel what to do.

The key of an encrypted repository comes from the environment, which is the daemon's.

When the daemon is gone so is this process, at once: another one may be waiting for the directory.
"""

import asyncio
import logging
import os
import shutil
import socket
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from backends.local_layers import LocalLayerStore
from nbdserve.logs import Logs, write_logs
from nbdserve.repository_keys import source_from_environment
from nbdserve.workers.channel import Channel
from snapshots.lazy import lazy_from_map
from snapshots.repository import Repository, open_repository
from snapshots.repository.local_fetcher import LocalFetcher

_METHODS: Final = frozenset(("find", "end", "let_go"))

log = logging.getLogger(__name__)


def _open_repository(url: str) -> Repository:
    return open_repository(url, source_from_environment().secret())


class Service:
    """See the module's text; ``run`` does it all."""

    def __init__(self, sock: socket.socket, data: Path) -> None:
        self._fetcher = LocalFetcher(
            LocalLayerStore(data), lambda: shutil.disk_usage(data).free, _open_repository
        )
        self._stop = asyncio.Event()
        logging.getLogger("botocore").setLevel(logging.WARNING)
        self._channel = Channel(sock, self)

    async def run(self) -> None:
        """Until the daemon says stop."""
        await self._fetcher.start(self)
        await self._stop.wait()
        await self._fetcher.close()
        await self._channel.sent()
        self._channel.close()
        # Threads may still wait for a store that does not answer: nothing of theirs is needed.
        os._exit(0)

    # What comes from the daemon

    def call(self, method: str, arguments: list[Any]) -> Coroutine[Any, Any, Any]:
        if method not in _METHODS:
            raise ValueError(f"method {method!r}")
        operation: Coroutine[Any, Any, Any] = getattr(self, f"_{method}")(*arguments)
        return operation

    async def _find(self, url: str, volume: str, snapshot: str, rate: int | None) -> dict[str, Any]:
        return asdict(await self._fetcher.find(url, volume, snapshot, rate))

    async def _end(self, layer: str) -> None:
        await self._fetcher.end(layer)

    async def _let_go(self, lazy: dict[str, Any]) -> None:
        await self._fetcher.let_go(lazy_from_map(lazy))

    def event(self, name: str, arguments: list[Any], sock: socket.socket | None) -> None:
        if name == "begin":
            layer, lazy = arguments
            self._fetcher.begin(layer, lazy_from_map(lazy))
        elif name == "want":
            self._fetcher.want(*arguments)
        elif name == "set_rate":
            self._fetcher.set_rate(*arguments)
        elif name == "stop":
            self._stop.set()
        elif name == "logs":
            write_logs(Logs(*arguments), "fetcher")
        else:
            raise ValueError(f"event {name!r}")

    def closed(self, wrong: str | None) -> None:
        if wrong is not None:
            log.error("fetcher process %d ends: %s", os.getpid(), wrong)
        os._exit(1)

    # What the fetcher tells

    def fetched(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        self._channel.event("fetched", layer, runs)

    def lost_again(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        self._channel.event("lost_again", layer, runs)

    def refused(self, layer: str, first: int, end: int, why: str) -> None:
        self._channel.event("refused", layer, first, end, why)

    def progress(self, layer: str, done: int, problem: str | None) -> None:
        self._channel.event("progress", layer, done, problem)

    def pinned(self, layer: str, pin: str) -> None:
        self._channel.event("pinned", layer, pin)

    def whole(self, layer: str) -> None:
        self._channel.event("whole", layer)
