"""A fetcher in this process (snapshots/fetcher.py has the rules): a hydrator for each layer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backends.errors import StorageError, one_line
from backends.layers import LayerStore
from snapshots.fetcher import FetchWatcher
from snapshots.filling import open_filling
from snapshots.lazy import LazyLayer
from snapshots.repository.hydrating import Hydrator
from snapshots.repository.origin import Open, SnapshotOrigin, find_origin
from snapshots.repository.repository import open_repository

_log = logging.getLogger(__name__)

_TRY_AGAIN = 5.0  # seconds


@dataclass(eq=False)
class _Fetching:
    """One layer's; ``hydrator`` None while its log is read."""

    origin: SnapshotOrigin
    telling: _Telling
    hydrator: Hydrator | None = None
    beginning: asyncio.Task[None] | None = None


class LocalFetcher:
    """A ``Fetcher`` over a layer store; ``free`` says how many bytes are free there."""

    def __init__(
        self, store: LayerStore, free: Callable[[], int], opened: Open = open_repository
    ) -> None:
        self._store = store
        self._free = free
        self._open = opened
        self._watcher: FetchWatcher | None = None
        self._found: dict[str, SnapshotOrigin] = {}
        self._layers: dict[str, _Fetching] = {}

    async def start(self, watcher: FetchWatcher) -> None:
        self._watcher = watcher

    async def close(self) -> None:
        await asyncio.gather(*(self.end(layer) for layer in list(self._layers)))

    async def find(self, url: str, volume: str, snapshot: str, rate: int | None) -> LazyLayer:
        origin = await asyncio.to_thread(find_origin, url, volume, snapshot, rate, self._open)
        self._found[origin.lazy.pin] = origin
        return origin.lazy

    def begin(self, layer: str, lazy: LazyLayer) -> None:
        if layer in self._layers:
            return
        assert self._watcher is not None
        origin = self._found.pop(lazy.pin, None) or SnapshotOrigin(lazy, opened=self._open)
        telling = _Telling(layer, self._watcher)
        origin.pinned = telling.pinned
        fetching = self._layers[layer] = _Fetching(origin, telling)
        fetching.beginning = asyncio.get_running_loop().create_task(
            self._begin(layer, lazy, fetching)
        )

    async def _begin(self, layer: str, lazy: LazyLayer, fetching: _Fetching) -> None:
        while True:
            try:
                filling = await open_filling(self._store, layer, lazy)
                break
            except (OSError, StorageError) as error:
                fetching.telling.progress(0, one_line(error))
                await asyncio.sleep(_TRY_AGAIN)
        fetching.hydrator = Hydrator(
            filling, fetching.origin.lazy, fetching.origin, fetching.telling, self._free
        )
        fetching.hydrator.start()

    def want(self, layer: str, first: int, end: int) -> None:
        fetching = self._layers.get(layer)
        if fetching is None or fetching.hydrator is None:
            return
        if first == end:
            fetching.hydrator.tell()
        else:
            fetching.hydrator.want(first, end)

    def set_rate(self, layer: str, rate: int | None) -> None:
        fetching = self._layers.get(layer)
        if fetching is not None:
            fetching.origin.lazy = fetching.origin.lazy.changed(rate=rate)
            if fetching.hydrator is not None:
                fetching.hydrator.set_rate(rate)

    async def let_go(self, lazy: LazyLayer) -> None:
        origin = self._found.pop(lazy.pin, None) or SnapshotOrigin(lazy, opened=self._open)
        await asyncio.to_thread(origin.let_go)

    async def end(self, layer: str) -> None:
        fetching = self._layers.pop(layer, None)
        if fetching is None:
            return
        fetching.telling.silent = True
        if fetching.beginning is not None:
            fetching.beginning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await fetching.beginning
        if fetching.hydrator is not None:
            await asyncio.to_thread(fetching.hydrator.stop)


class _Telling:
    """From a hydrator's threads to who watches on the event loop, until it is ``silent``."""

    def __init__(self, layer: str, watcher: FetchWatcher) -> None:
        self.silent = False
        self._layer = layer
        self._watcher = watcher
        self._loop = asyncio.get_running_loop()

    def _tell(self, tell: Callable[..., None], *arguments: object) -> None:
        def now() -> None:
            if not self.silent:
                tell(self._layer, *arguments)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there
            self._loop.call_soon_threadsafe(now)

    def fetched(self, runs: Sequence[tuple[int, int]]) -> None:
        self._tell(self._watcher.fetched, runs)

    def lost_again(self, runs: Sequence[tuple[int, int]]) -> None:
        self._tell(self._watcher.lost_again, runs)

    def refused(self, first: int, end: int, why: str) -> None:
        self._tell(self._watcher.refused, first, end, why)

    def progress(self, done: int, problem: str | None) -> None:
        self._tell(self._watcher.progress, done, problem)

    def pinned(self, pin: str) -> None:
        self._tell(self._watcher.pinned, pin)

    def whole(self) -> None:
        self._tell(self._watcher.whole)
