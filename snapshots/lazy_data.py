"""The data of a lazy layer, as views read it: what is here now, the rest when it has come.

``try_read`` serves what is here, at the cost of one look; anything else "would wait for a disk".
Who
waits then asks for ``arrival`` first, which wants the missing chunks to be fetched, on the event
loop: no thread is kept while a store does not answer, and no other read has to wait with it.

What is here is a cache of what the fetcher knows: it begins with what the layer's ``fetched`` log
says, and ``fetched`` and ``lost`` tell the rest. Wants are asked for again and again, so that they
survive a fetcher that was ended and one that was not there yet.

**How long a read waits.** Until nothing at all has come for WAIT_SECONDS, or for LONGEST_WAIT, or
until the fetcher says that it cannot come. Then it fails with EIO and the log says why; the next
read asks anew.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from backends.errors import CorruptError
from backends.layers import Buffer, DataFile, LayerStore
from snapshots.extent_log import FETCHED, read_log
from snapshots.lazy import LazyLayer
from snapshots.owner_map import DATA, ZERO, OwnerMap

WAIT_SECONDS = 20.0
LONGEST_WAIT = 120.0
ASK_AGAIN = 1.0  # seconds
_TICK = 0.5
_MOST_AHEAD = 32 << 20  # bytes that are fetched for nobody but the cache
# The same reason is logged once in so many seconds.
_SAY_AGAIN = 60.0

_log = logging.getLogger(__name__)

Fetch = Callable[[str, int, int], None]
"""Want chunks of a layer: (its name, first chunk, end). None wanted: say which are here."""


@dataclass(eq=False)
class _Waiting:
    """Who waits for chunks ``first`` to ``end``; times of the event loop."""

    first: int
    end: int
    future: asyncio.Future[None]
    begun: float
    asked: float


class LazyDataFile:
    """A ``DataFile`` of which a part is here (see the module's text); it is never written."""

    def __init__(
        self, name: str, lazy: LazyLayer, data: DataFile, here: OwnerMap, fetch: Fetch | None
    ) -> None:
        self.name = name
        self.lazy = lazy
        self.data = data
        self._here = here
        self._raw = here.raw
        self._shift = lazy.chunk_size.bit_length() - 1
        self._try_read = data.try_read
        self._lend = data.lend
        self._fetch = fetch
        self._waiting: list[_Waiting] = []
        self._came = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop() if fetch else None
        self._said: dict[str, float] = {}
        if fetch:
            fetch(name, 0, 0)

    def _chunks(self, offset: int, length: int) -> tuple[int, int]:
        return offset >> self._shift, ((offset + length - 1) >> self._shift) + 1

    def _lacks(self, first: int, end: int) -> bool:
        return self._raw.find(b"\0", first, end) >= 0

    # Reading

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        first = offset >> self._shift
        end = ((offset + len(buffer) - 1) >> self._shift) + 1
        if self._raw.find(b"\0", first, end) >= 0:
            return False
        return self._try_read(offset, buffer)

    def read(self, offset: int, buffer: memoryview) -> None:
        if len(buffer) and self._lacks(*self._chunks(offset, len(buffer))):
            raise self._absent()
        self.data.read(offset, buffer)

    def lend(self, offset: int, length: int) -> tuple[int, int] | None:
        return None if self._lacks(*self._chunks(offset, length)) else self._lend(offset, length)

    def occupied_ranges(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return self.data.occupied_ranges(offset, length, limit)

    def cache(self, offset: int, length: int) -> None:
        first, end = self._chunks(offset, length)
        if not self._lacks(first, end):
            self.data.cache(offset, length)
        elif self._fetch is not None and self._loop is not None:
            end = min(end, first + max(1, _MOST_AHEAD >> self._shift))
            self._loop.call_soon_threadsafe(self._fetch, self.name, first, end)

    # Waiting

    def arrival(self, offset: int, length: int) -> asyncio.Future[None] | None:
        if not length:
            return None
        first, end = self._chunks(offset, length)
        if not self._lacks(first, end):
            return None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if self._fetch is None:
            future.set_exception(self._absent())
            return future
        now = loop.time()
        self._waiting.append(_Waiting(first, end, future, now, now))
        if self._timer is None:
            self._timer = loop.call_later(_TICK, self._tick)
        self._fetch(self.name, first, end)
        return future

    def fetched(self, runs: Iterable[tuple[int, int]]) -> None:
        """These runs of chunks (first, end) are here."""
        for first, end in runs:
            self._here.set(first, end, 1)
        if self._waiting:
            self._came = asyncio.get_running_loop().time()
            left = []
            for each in self._waiting:
                if self._lacks(each.first, each.end):
                    left.append(each)
                elif not each.future.done():
                    each.future.set_result(None)
            self._waiting = left

    def lost(self, runs: Iterable[tuple[int, int]]) -> None:
        """These runs of chunks were here, but the disk could not keep them."""
        for first, end in runs:
            self._here.set(first, end, 0)

    def refused(self, first: int, end: int, why: str) -> None:
        """Those of these chunks that are not here do not come, for now."""
        self._fail(
            why, lambda each: self._lacks(max(first, each.first), max(first, min(end, each.end)))
        )

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._fail(
            f"nothing came for {WAIT_SECONDS:g} seconds",
            lambda each: (
                now - max(each.begun, self._came) > WAIT_SECONDS or now - each.begun > LONGEST_WAIT
            ),
        )
        for each in self._waiting:
            if now - each.asked > ASK_AGAIN and self._fetch is not None:
                each.asked = now
                self._fetch(self.name, each.first, each.end)
        self._timer = loop.call_later(_TICK, self._tick) if self._waiting else None

    def _fail(self, why: str, chosen: Callable[[_Waiting], bool]) -> None:
        failing = {each for each in self._waiting if each.future.done() or chosen(each)}
        self._waiting = [each for each in self._waiting if each not in failing]
        failing = {each for each in failing if not each.future.done()}
        if failing:
            self._say(why)
        for each in failing:
            each.future.set_exception(OSError(errno.EIO, f"{self.lazy.source}: {why}"))

    def _say(self, why: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._said.get(why, -_SAY_AGAIN) >= _SAY_AGAIN:
            self._said = {old: at for old, at in self._said.items() if now - at < _SAY_AGAIN}
            self._said[why] = now
            _log.error("reads of what is not fetched yet of %s fail: %s", self.lazy.source, why)

    def _absent(self) -> OSError:
        return OSError(errno.EIO, f"not fetched yet from {self.lazy.source}")

    # The rest

    def write(self, offset: int, data: Buffer) -> None:
        raise OSError(errno.EROFS, "a lazy layer is never written")

    def write_zeroes(self, offset: int, length: int) -> None:
        raise OSError(errno.EROFS, "a lazy layer is never written")

    def punch(self, offset: int, length: int) -> None:
        raise OSError(errno.EROFS, "a lazy layer is never written")

    def prepare(self, offset: int, length: int) -> None:
        raise OSError(errno.EROFS, "a lazy layer is never written")

    def write_back(self) -> None:
        self.data.write_back()

    def unwritten(self) -> int | None:
        return self.data.unwritten()

    def sync(self) -> None:
        self.data.sync()

    def allocated(self) -> int:
        return self.data.allocated()

    def allocated_ranges(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return self.data.allocated_ranges(offset, length, limit)

    def find_short(self, ends: Sequence[int]) -> str | None:
        return self.data.find_short(ends)

    def close(self) -> None:
        self._fail("it is closed", lambda each: True)
        if self._timer is not None:
            self._timer.cancel()
        self.data.close()
        self._here.close()


async def open_lazy_data(
    store: LayerStore, name: str, lazy: LazyLayer, data: DataFile, fetch: Fetch | None
) -> LazyDataFile:
    """The data of a lazy layer; ``fetch`` wants chunks, None: there is nobody who could."""
    holds = OwnerMap(lazy.blocks)
    here = OwnerMap(lazy.chunks)
    try:
        content = await store.read_log(name, FETCHED)
        try:
            if content is not None:
                where = store.describe(name, FETCHED)
                await asyncio.to_thread(read_log, content, name, FETCHED, holds, where)
            await asyncio.to_thread(whole_chunks, holds, lazy, here)
        except CorruptError:
            # It may just be written to. The fetcher says what is here, or fetches it again.
            here.set(0, here.blocks, 0)
    except BaseException:
        here.close()
        raise
    finally:
        holds.close()
    return LazyDataFile(name, lazy, data, here, fetch)


def whole_chunks(holds: OwnerMap, lazy: LazyLayer, here: OwnerMap) -> None:
    """From blocks that a log says were fetched to chunks that are here, as a whole.

    DATA where a chunk holds any, ZERO where it reads as zeroes.
    """
    size = lazy.chunk_blocks
    for first, end in holds.owned_runs(0, holds.blocks):
        begin = -(-first // size)
        stop = here.blocks if end == holds.blocks else end // size
        if begin < stop:
            here.set(begin, stop, ZERO)
    for first, end, kind in holds.runs(0, holds.blocks):
        if kind == DATA:
            here.replace(first // size, -(-end // size), ZERO, DATA)
