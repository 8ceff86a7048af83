"""Merging: two neighbouring sealed layers become one, chunk by chunk, the smaller copied.

When a snapshot is deleted, nothing tells its top layer (the **lower**) from the one above (the
**upper**) any more. One of them, the **target**, takes over what the other, the **source**, adds:

* target = lower: every block that the upper holds or says is zero is copied down;
* target = upper: every block that the lower holds and the upper says nothing of is copied up.

Whichever copies fewer blocks. A chunk is at most 4 MiB of data:

1. copy the blocks into the target's data, fdatasync;
2. append the extents to the target's **merge log**, fdatasync: from here on they are the target's;
3. let every open view know;
4. wait for reads that began before, then punch the blocks out of the source.

So no more than a chunk of space is needed. Until step 2 the source still has everything; whoever
opens a stack applies the merge log after the upper layer's index, and so sees each block where it
is. A merge that was interrupted anywhere begins again with what is not in its log.

At the end the target gets a new index, the manifests drop the source in one commit, and the merge's
record, its log and the source go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

from backends.errors import CorruptError, NoSpaceError
from backends.layers import LayerStore, LogFile
from snapshots.examining import Nothing, missing_from
from snapshots.extent_log import MERGE, SECTOR, Run, encode_extents, encode_mark
from snapshots.head import JOURNAL_STEP
from snapshots.layer import OpenLayer, apply_layer, apply_merge, check_no_merge, write_index
from snapshots.manifest import Merge
from snapshots.manifest_store import ManifestStore, is_no_space
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.open_views import OpenViews
from snapshots.owner_map import DATA, ZERO, OwnerMap
from snapshots.reserve import with_reserve

CHUNK = 4 << 20
_CHUNK_BLOCKS = CHUNK >> BLOCK_SHIFT
_CHUNK_RUNS = 1024


async def plan_merge(store: LayerStore, lower: str, upper: str, blocks: int) -> Merge:
    """Choose the target: the layer into which fewer blocks must be copied. CorruptError."""
    for layer in (lower, upper):
        await check_no_merge(store, layer, blocks)
    below, above = OwnerMap(blocks), OwnerMap(blocks)
    try:
        await apply_layer(store, lower, below)
        await apply_layer(store, upper, above)
        down = sum(end - start for start, end, kind in above.runs(0, blocks) if kind == DATA)
        for start, end in above.owned_runs(0, blocks):
            below.set(start, end, 0)
        up = sum(end - start for start, end, kind in below.runs(0, blocks) if kind == DATA)
    finally:
        below.close()
        above.close()
    return Merge(lower, upper, lower if down <= up else upper)


Pace = Callable[[float], Awaitable[None]]
"""Called after each chunk with the seconds that it took; returns when the next may be moved."""


class Merger:
    """One merge from where it stands to its end (see the module's text)."""

    def __init__(
        self,
        store: LayerStore,
        manifests: ManifestStore,
        views: OpenViews,
        commits: asyncio.Lock,
        merge: Merge,
        blocks: int,
        pace: Pace,
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._views = views
        self._commits = commits
        self._merge = merge
        self._blocks = blocks
        self._pace = pace
        self._sequence = 0
        self._durable = 0

    async def run(
        self, wanted: Callable[[], bool], progress: Callable[[int, int], None] | None
    ) -> bool:
        """Merge while ``wanted()``; whether it came to its end. Progress in bytes: done, total."""
        merge = self._merge
        pool = self._views.pool
        source = await pool.acquire(merge.source)
        try:
            target = await pool.acquire(merge.target)
        except BaseException:
            pool.release(source)
            raise
        try:
            await self._check(source, target)
            log, todo = await self._begin()
            try:
                total = todo.count_owned()
                done = 0
                for runs in _chunks(todo):
                    if not wanted():
                        return False
                    begun = time.monotonic()
                    await self._move(source, target, log, runs)
                    await self._pace(time.monotonic() - begun)
                    done += sum(end - start for start, end, _ in runs)
                    if progress is not None:
                        progress(done << BLOCK_SHIFT, total << BLOCK_SHIFT)
            finally:
                log.close()
                todo.close()
            async with self._commits:
                if not wanted():
                    return False
                await self._finish()
        finally:
            pool.release(target)
            pool.release(source)
        return True

    async def _check(self, source: OpenLayer, target: OpenLayer) -> None:
        """CorruptError when data of either layer is missing: see ``DataFile.find_short``."""
        nothing = Nothing(self._blocks)
        for layer in (source, target):
            states = [await apply_layer(self._store, layer.name, nothing)]
            if layer is target and (merged := await apply_merge(self._store, layer.name, nothing)):
                states.append(merged)
            for state in states:
                missing = await asyncio.to_thread(missing_from, layer.data, state)
                if missing is not None:
                    raise CorruptError(missing)

    async def _begin(self) -> tuple[LogFile, OwnerMap]:
        """Open the merge log and find out what is still to be moved."""
        merge, store, blocks = self._merge, self._store, self._blocks
        todo = OwnerMap(blocks)
        done = OwnerMap(blocks)
        try:
            async with self._views.stacks:
                state = await apply_merge(store, merge.target, done)
                if state is None:
                    raise CorruptError(f"{store.describe(merge.target, MERGE)} is missing")
                if state.ragged:
                    content = await store.read_log(merge.target, MERGE)
                    assert content is not None
                    whole = content[: state.end] + bytes(SECTOR)
                    await store.create_log(merge.target, MERGE, whole)
                # What an interrupted attempt logged may not have reached the views.
                await self._views.follow_merge(merge)
                recalled = asyncio.ensure_future(self._views.recall(merge))
                await asyncio.sleep(0)  # it begins while nothing is opened or closed
            await recalled
            self._sequence = self._durable = state.sequence
            await apply_layer(store, merge.source, todo)
            if merge.target == merge.upper:
                # Blocks that the upper one has anyway; what it took over before is among them.
                await apply_layer(store, merge.upper, todo, 0, 0)
            for first, last in done.owned_runs(0, blocks):
                todo.set(first, last, 0)
            log = await store.open_log(merge.target, MERGE, state.end)
            try:
                # What a killed process appended may not be durable; what follows will say it is.
                await self._views.threads.sync(log.sync)
            except BaseException:
                log.close()
                raise
            return log, todo
        except BaseException:
            todo.close()
            raise
        finally:
            done.close()

    async def _move(
        self, source: OpenLayer, target: OpenLayer, log: LogFile, runs: list[Run]
    ) -> None:
        threads = self._views.threads
        sectors = b"".join(encode_extents(target.name, runs, self._sequence, durable=self._durable))
        self._durable = self._sequence + len(sectors) // SECTOR
        # Durable with the next chunk; before the source's blocks go, it should be there.
        mark = encode_mark(target.name, self._durable)
        try:
            await threads.sync(_copy, source, target, log, len(sectors), runs)
        except OSError as error:
            if not is_no_space(error):
                raise
            if not await self._store.release_reserve():
                raise NoSpaceError(
                    "no space left to merge a deleted snapshot's layer;"
                    " it goes on once 8 MiB are free"
                ) from error
            await threads.sync(_copy, source, target, log, len(sectors), runs)
        async with self._views.stacks:
            await threads.sync(_record, log, sectors, mark)
            self._sequence = self._durable + 1
            moved = asyncio.ensure_future(self._views.move(self._merge, runs))
            await asyncio.sleep(0)  # it begins while nothing is opened or closed
        await moved
        await threads.sync(_punch, source, target, runs)

    async def _finish(self) -> None:
        merge, store, blocks = self._merge, self._store, self._blocks
        holds = OwnerMap(blocks)
        below = OwnerMap(blocks)
        try:
            await apply_layer(store, merge.lower, holds)
            if merge.target == merge.upper:
                await apply_layer(store, merge.lower, below)
            await apply_layer(store, merge.upper, holds)
            await apply_merge(store, merge.target, holds)
            users = self._manifests.uses(merge.target)
            if all(not user.parents[merge.lower] for user in users):
                # Nothing below: what it says is zero is zero anyway. But until the commit the
                # lower one is still there, and what it holds must stay hidden.
                for first, last, kind in list(holds.runs(0, blocks)):
                    hides = any(found == DATA for _, _, found in below.runs(first, last))
                    if kind == ZERO and not hides:
                        holds.set(first, last, 0)
            await with_reserve(store, lambda: write_index(store, merge.target, holds))
        finally:
            holds.close()
            below.close()
        async with self._views.stacks:
            users = self._manifests.uses(merge.source)
            await self._manifests.commit([user.merged(merge) for user in users])
            await self._views.drop_layer(merge.source)
            await self._manifests.end_merge(merge)


def _chunks(todo: OwnerMap) -> Iterator[list[Run]]:
    """Cut what is to be moved into chunks: at most 4 MiB of data, of zeroes any length."""
    chunk: list[Run] = []
    room = _CHUNK_BLOCKS
    for start, end, kind in todo.runs(0, todo.blocks):
        position = start
        while position < end:
            stop = end if kind == ZERO else min(end, position + room)
            chunk.append((position, stop, kind))
            if kind == DATA:
                room -= stop - position
            position = stop
            if room == 0 or len(chunk) >= _CHUNK_RUNS:
                yield chunk
                chunk = []
                room = _CHUNK_BLOCKS
    if chunk:
        yield chunk


def _copy(source: OpenLayer, target: OpenLayer, log: LogFile, logged: int, runs: list[Run]) -> None:
    # With the mark, and the zeroes that end the log.
    log.reserve(max(logged + 2 * SECTOR, JOURNAL_STEP))
    longest = max((end - start for start, end, kind in runs if kind == DATA), default=0)
    buffer = memoryview(bytearray(longest * BLOCK_SIZE))
    for start, end, kind in runs:
        if kind == DATA:
            part = buffer[: (end - start) << BLOCK_SHIFT]
            source.data.read(start << BLOCK_SHIFT, part)
            target.data.write(start << BLOCK_SHIFT, part)
    target.data.sync()


def _record(log: LogFile, sectors: bytes, mark: bytes) -> None:
    log.append(sectors)
    log.sync()
    log.append(mark)


def _punch(source: OpenLayer, target: OpenLayer, runs: list[Run]) -> None:
    for start, end, kind in runs:
        source.data.punch(start << BLOCK_SHIFT, (end - start) << BLOCK_SHIFT)
        if kind == ZERO:
            target.data.punch(start << BLOCK_SHIFT, (end - start) << BLOCK_SHIFT)
