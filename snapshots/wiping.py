"""Wiping: what only a deleted volume held is overwritten before its files are removed.

::

    volume --the manifest is removed--> condemned, to be wiped --all overwritten--> gone

The deletion's record (manifest_store.py) says that its layers are to be wiped, and is durable
before the manifest goes. So a volume is whole and served, or it is gone and its layers are wiped by
this process or a later one; they are deleted one by one, each when it has been overwritten. A layer
that another volume lists is not touched.

**One layer.** What its data files have allocated, written or only reserved, is overwritten with
zeroes in place, 16 MiB at a time: write, sync, then punch. So it needs no space, it gives the space
back as it goes, and whoever goes on after a crash finds only the rest. The order matters: what is
punched before the zeroes are on the disk is free space that still holds the data.

**Guests first.** It runs in a thread, never has more than those 16 MiB waiting for the disk, and
while clients are connected it rests as long after each piece as the piece has taken.

**An error** of the disk leaves that piece as it is; the rest is wiped nevertheless. Then the layer
stays, with a line in the log and among the warnings, until the next start tries again, or somebody
asks for the deletion once more: with wiping, or without.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Coroutine, Set
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from backends.errors import (
    NotFoundError,
    StorageError,
    UnavailableError,
    one_line,
)
from backends.layers import DataFile, LayerStore
from snapshots.manifest_store import ManifestStore
from snapshots.names import MAX_VOLUME_SIZE
from snapshots.space_watch import WARNING, SpaceWarning
from snapshots.threads import Threads

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_PIECE = 16 << 20
_WRITE = 1 << 20
_ZEROES = memoryview(bytes(_WRITE))
_LOOKED_UP = 256


@dataclass
class Wipe:
    """A deleted volume that is being wiped; in bytes. ``problem`` says why it does not go on."""

    volume: str
    done: int = 0
    total: int = 0
    problem: str | None = None
    watchers: list[Progress] = field(default_factory=list)

    def tell(self) -> None:
        """Let those know who follow it."""
        for watcher in self.watchers:
            watcher(self.done, max(self.done, self.total))


@dataclass(frozen=True)
class Deleted:
    """A volume that was deleted, and what of it was wiped, in bytes.

    ``shared`` is the disk space of layers that ``others`` use too, which were not.
    """

    volume: str
    wiped: int = 0
    shared: int = 0
    others: tuple[str, ...] = ()


class Wiping:
    """See the module's text; ``commits`` is held wherever manifests change."""

    def __init__(
        self,
        store: LayerStore,
        manifests: ManifestStore,
        commits: asyncio.Lock,
        threads: Threads,
        in_use: Callable[[], Set[str]],
        settled: Callable[[], Awaitable[None]],
        guests: Callable[[], bool],
    ) -> None:
        """``in_use`` are layers that something may still read or write, mostly until ``settled``;
        ``guests``: whether there are any clients."""
        self._store = store
        self._manifests = manifests
        self._commits = commits
        self._threads = threads
        self._in_use = in_use
        self._settled = settled
        self._guests = guests
        self._under_way: dict[str, Wipe] = {}
        self._lock = asyncio.Lock()
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    def wipes(self) -> list[Wipe]:
        """What is being wiped, or cannot be."""
        return [
            self._under_way.get(record) or Wipe(volume)
            for record, volume in self._manifests.wipes.items()
        ]

    def has(self, volume: str) -> bool:
        """Whether a deleted volume of that name is being wiped, or cannot be."""
        return volume in self._manifests.wipes.values()

    def warnings(self) -> list[SpaceWarning]:
        """What could not be wiped."""
        return [
            SpaceWarning("wiping", WARNING, _complaint(wipe))
            for wipe in self.wipes()
            if wipe.problem is not None
        ]

    def resume(self) -> None:
        """Go on in the background with what is left, but for what has failed."""
        if not self._stopping and self._manifests.wipes:
            self._start(self._wipe_quietly())

    def go_on(self) -> None:
        """The same, unless it is running."""
        if not self._lock.locked():
            self.resume()

    async def stop(self) -> None:
        """Stop after the piece in hand."""
        self._stopping = True
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def wipe_now(self, volume: str, progress: Progress | None = None) -> int:
        """Wipe what a deleted volume has left, and return how many bytes that were.

        StorageError when all of it cannot be wiped now.
        """
        wiped = 0
        for record in self._records(volume):
            wipe = self._under_way.get(record)
            if wipe is None or wipe.problem is not None:
                wipe = self._under_way[record] = Wipe(volume)
            if progress is not None:
                wipe.watchers.append(progress)
            await asyncio.shield(self._start(self._wipe(record, wipe)))
            if record in self._manifests.wipes and wipe.problem is None and not self._stopping:
                await self._settled()
                await asyncio.shield(self._start(self._wipe(record, wipe)))
            wiped += wipe.done
            if record in self._manifests.wipes:
                why = wipe.problem or (
                    "nbdserve stops, and goes on at its next start"
                    if self._stopping
                    else "some of it is still in use; it goes on when it is not"
                )
                raise UnavailableError(_complaint(replace(wipe, problem=why)))
        return wiped

    async def give_up(self, volume: str) -> None:
        """Let what is left of a deleted volume go as it is; the caller holds ``commits``."""
        for record in self._records(volume):
            await self._manifests.give_up_wiping(record)
            self._under_way.pop(record, None)

    def _records(self, volume: str) -> list[str]:
        return [found for found, name in self._manifests.wipes.items() if name == volume]

    async def _wipe_quietly(self) -> None:
        for record, volume in list(self._manifests.wipes.items()):
            wipe = self._under_way.setdefault(record, Wipe(volume))
            if wipe.problem is None:
                await self._wipe(record, wipe)

    async def _wipe(self, record: str, wipe: Wipe) -> None:
        async with self._lock:
            try:
                await self._wipe_layers(record, wipe)
            except (OSError, StorageError) as error:
                wipe.problem = one_line(error)
            if wipe.problem is not None and record in self._manifests.wipes:
                _log.error("%s", _complaint(wipe))

    async def _wipe_layers(self, record: str, wipe: Wipe) -> None:
        async with self._commits:
            layers = self._layers(record)
            there = set(await self._store.list_layers())
        wipe.total = wipe.done
        for layer in layers & there:
            wipe.total += await self._store.allocated(layer)
        for layer in sorted(layers & there):
            if layer in self._in_use() or not await self._wipe_layer(record, layer, wipe):
                continue
            async with self._commits:
                if layer in self._layers(record):
                    await self._store.delete_layer(layer)
                    layers.discard(layer)
        async with self._commits:
            left = self._layers(record) & set(await self._store.list_layers())
            if not left and record in self._manifests.wipes and not self._manifests.unreadable:
                await self._manifests.end_wiping(record)
                self._under_way.pop(record, None)

    def _layers(self, record: str) -> set[str]:
        """The layers of a record that may be wiped; the caller holds ``commits``."""
        if self._manifests.unreadable or record not in self._manifests.wipes:
            return set()  # any layer may be an unreadable volume's
        self._manifests.check()
        return set(self._manifests.condemned[record]) - self._manifests.live_layers()

    async def _wipe_layer(self, record: str, layer: str, wipe: Wipe) -> bool:
        """Overwrite one layer; whether all of it was."""
        try:
            claim = await self._store.claim_layer(layer)
        except NotFoundError:
            return True
        except OSError as error:
            # Its file may have to be made.
            if error.errno != errno.ENOSPC or not await self._store.release_reserve():
                raise
            claim = await self._store.claim_layer(layer)
        if claim is None:
            return False  # a backup that outlived the daemon it began under reads it
        try:
            data = await self._store.open_data(layer, writable=True)
            try:
                return await self._overwrite(record, data, wipe, layer)
            finally:
                data.close()
        finally:
            claim.release()

    async def _overwrite(self, record: str, data: DataFile, wipe: Wipe, layer: str) -> bool:
        await self._threads.sync(data.sync)
        whole = True
        position = 0
        while True:
            if self._stopping or record not in self._manifests.wipes:
                return False
            begun = perf_counter()
            pieces = await self._threads.sync(_next_pieces, data, position)
            if not pieces:
                return whole
            position = sum(pieces[-1])
            try:
                await self._threads.sync(_overwrite, data, pieces)
            except OSError as error:
                whole = False
                where = self._store.describe_layer(layer)
                wipe.problem = (
                    f"{where}: {error.strerror} between offsets {pieces[0][0]} and {position}"
                )
            else:
                wipe.done += sum(length for _, length in pieces)
            wipe.tell()
            if self._guests():
                await asyncio.sleep(perf_counter() - begun)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _complaint(wipe: Wipe) -> str:
    return f"volume {wipe.volume} is deleted, but not all of it wiped: {wipe.problem}"


def _next_pieces(data: DataFile, position: int) -> list[tuple[int, int]]:
    """What has space behind ``position``, (offset, length), _PIECE bytes at most; blocking."""
    pieces: list[tuple[int, int]] = []
    room = _PIECE
    for offset, length in data.occupied_ranges(position, MAX_VOLUME_SIZE - position, _LOOKED_UP):
        taken = min(length, room)
        pieces.append((offset, taken))
        room -= taken
        if room == 0:
            break
    return pieces


def _overwrite(data: DataFile, pieces: list[tuple[int, int]]) -> None:
    """Overwrite ranges with zeroes, durably, then give their space back; blocking."""
    for offset, length in pieces:
        for start in range(offset, offset + length, _WRITE):
            data.write(start, _ZEROES[: min(_WRITE, offset + length - start)])
    data.sync()
    for offset, length in pieces:
        data.punch(offset, length)
