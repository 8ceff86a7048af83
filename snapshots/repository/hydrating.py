"""Hydration: the chunks of one lazy layer, those that somebody waits for first.

::

    want ──▶ queue ──▶ DEMAND threads ─────┐ claim chunks, fetch ranges, verify,   ┌──▶ fetched
                                           ├─ put them into the layer ─────────────┤
    all pages, in order ──▶ BACKGROUND ────┘                                       └──▶ sync thread

A chunk is **claimed** by the thread that fetches it, so it is fetched once whoever wants it. With
a wanted chunk come those behind it, more of them when a stream goes on where the last fetch ended;
it is put and told of before them. The background stands back while anybody waits, keeps to
the rate, and stops where the disk is nearly full. What is wanted counts against the rate, but never
waits for it.

**What fails.** A store that does not answer is asked again until it does; who waits decides how
long (lazy_data.py). A chunk that fails its check, or is missing, is fetched again by itself a few
times, since it may have been damaged on its way; then whoever waits is refused, and the background
comes back to it later. A disk that is full refuses who waits; the background waits for room.

Memory: a range of at most 4 MiB and a chunk for each thread, 64 pages, and a byte for each chunk
of the volume that is here.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from backends.errors import CorruptError, NotFoundError, StorageError, UnavailableError, one_line
from snapshots.filling import Filling
from snapshots.lazy import LazyLayer
from snapshots.repository.chunk_reader import ChunkReader, entries
from snapshots.repository.layout import PAGE_ENTRIES
from snapshots.repository.pages import Entry, Page
from snapshots.repository.reading import MAX_READ, Fetched, Part, Range, plan_ranges

DEMAND = 4
BACKGROUND = 3
AHEAD = 512 << 10  # bytes that come with a wanted chunk, the chunk included
MAX_AHEAD = 4 << 20
MAX_WANTS = 4096
PAGES_PER_GROUP = 4

SYNC_SECONDS = 5.0
SYNC_BYTES = 64 << 20
MAX_UNSYNCED = 256 << 20
LOW_SPACE = 64 << 20  # free bytes that are left to those who write
PASS_SECONDS = 30.0  # until damaged chunks are tried again
RENEW_SECONDS = 3600.0
_FIRST_RENEWAL = 60.0
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 5.0
_LOOK_SECONDS = 0.5
_BACKGROUND_NICE = 10
# Seconds that the background stands still at most after much that was wanted.
_LONGEST_DEBT = 60.0

Chosen = list[tuple[int, Entry]]


class Watcher(Protocol):
    """Who is told; from any thread, never for long."""

    def fetched(self, runs: list[tuple[int, int]]) -> None:
        """Runs of chunks (first, end) can be read."""

    def lost_again(self, runs: list[tuple[int, int]]) -> None:
        """They were here, but the disk failed to keep them."""

    def refused(self, first: int, end: int, why: str) -> None:
        """What of these chunks is not here does not come for now."""

    def progress(self, done: int, problem: str | None) -> None:
        """Bytes that are here, and what hinders, if anything does."""

    def whole(self) -> None:
        """Everything is here, durably."""


class Origin(Protocol):
    """The snapshot in the repository."""

    def reader(self) -> ChunkReader:
        """Open it, or return what was opened. StorageError."""

    def renew(self) -> None:
        """Keep it alive for another while. StorageError."""

    def stop_retrying(self) -> None:
        """Let calls that are under way fail soon."""


class Hydrator:
    """See the module's text; ``start``, then any method from any thread, ``stop`` at last."""

    def __init__(
        self,
        filling: Filling,
        lazy: LazyLayer,
        origin: Origin,
        watcher: Watcher,
        free: Callable[[], int],
    ) -> None:
        self._filling = filling
        self._lazy = lazy
        self._origin = origin
        self._watcher = watcher
        self._free_space = free
        self._changed = threading.Condition()
        self._stopping = False
        self._queue: deque[tuple[int, int]] = deque()
        self._later: deque[tuple[float, tuple[int, int]]] = deque()
        self._queued: set[tuple[int, int]] = set()
        self._serving = 0
        self._busy: set[int] = set()
        self._rate = lazy.rate
        self._allowed = 0.0
        self._stream = -1
        self._ahead = AHEAD
        self._problem: str | None = None
        self._damage: str | None = None
        self._plan: Iterator[Range] | None = None
        self._planning = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin; what is here already is told."""
        self.tell()
        works = [self._demand] * DEMAND + [self._background] * BACKGROUND + [self._keep]
        for work in works:
            thread = threading.Thread(target=work, name=f"hydrate {work.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End all threads, and make durable what they brought."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._origin.stop_retrying()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(OSError):
            self._filling.sync()
        self._filling.close()

    def tell(self) -> None:
        """Tell which chunks are here."""
        self._watcher.fetched(self._filling.runs())

    def want(self, first: int, end: int) -> None:
        """Somebody waits for chunks ``first`` to ``end`` (exclusive)."""
        end = min(end, self._lazy.chunks)
        here = [(chunk, chunk + 1) for chunk in range(first, end) if self._filling.is_here(chunk)]
        if here:
            self._watcher.fetched(here)
        if len(here) == end - first:
            return
        want = (first, end)
        with self._changed:
            if want in self._queued:
                return
            if len(self._queue) >= MAX_WANTS:
                self._queued.discard(self._queue.popleft())  # asked for again, if still wanted
            self._queued.add(want)
            self._queue.append(want)
            self._changed.notify_all()

    def set_rate(self, rate: int | None) -> None:
        """Bytes a second that the background may fetch; None: no bound; 0: it stands still."""
        with self._changed:
            self._rate = rate
            self._allowed = 0.0
            self._changed.notify_all()

    # What somebody waits for

    def _demand(self) -> None:
        pause = _FIRST_PAUSE
        while (want := self._next_want()) is not None:
            again = False
            try:
                self._serve(*want)
                pause = _FIRST_PAUSE
            except UnavailableError as error:
                self._note(error)
                again = True
            except (StorageError, OSError) as error:
                self._note(error)
                self._watcher.refused(*want, one_line(error))
            with self._changed:
                self._serving -= 1
                if again and want not in self._queued:
                    self._queued.add(want)
                    self._later.append((time.monotonic() + pause, want))
                    pause = min(2 * pause, _LONGEST_PAUSE)
                self._changed.notify_all()

    def _next_want(self) -> tuple[int, int] | None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                for _ in range(len(self._later)):
                    due, want = self._later.popleft()
                    if due <= now:
                        self._queue.append(want)
                    else:
                        self._later.append((due, want))
                if self._queue:
                    self._serving += 1
                    want = self._queue.popleft()
                    self._queued.discard(want)
                    return want
                self._changed.wait(_FIRST_PAUSE if self._later else None)
        return None

    def _serve(self, first: int, end: int) -> None:
        if not self._filling.lacks(first, end):
            return
        reader = self._origin.reader()
        for number in range(first // PAGE_ENTRIES, -(-end // PAGE_ENTRIES)):
            page = reader.page(number)
            self._put_holes(number, page)
            begin = max(first, number * PAGE_ENTRIES)
            chosen = self._claim(number, page, begin, end)
            if not chosen:
                continue  # it is on its way already, and so are its neighbours
            stop = begin + max(1, self._reach(begin) // self._lazy.chunk_size)
            chosen += self._claim(number, page, end, stop)
            self._stream = max(end, stop)
            try:
                self._bring(reader, chosen, range(first, end), MAX_READ)
            finally:
                self._let_go(chosen)

    def _reach(self, first: int) -> int:
        """How many bytes to bring with a chunk: more when a stream goes on."""
        self._ahead = min(2 * self._ahead, MAX_AHEAD) if first == self._stream else AHEAD
        return self._ahead

    # Bringing chunks

    def _claim(self, number: int, page: Page, first: int, end: int) -> Chosen:
        """Chunks between ``first`` and ``end`` of a page: see ``_claim_all``."""
        begin = number * PAGE_ENTRIES
        return self._claim_all(
            (chunk, entry)
            for chunk, entry in enumerate(page[first - begin : max(first, end) - begin], first)
            if entry is not None
        )

    def _claim_all(self, chunks: Iterable[tuple[int, Entry]]) -> Chosen:
        """Those that are not here, and that nobody else fetches."""
        with self._changed:
            chosen = [
                (chunk, entry)
                for chunk, entry in chunks
                if chunk not in self._busy and not self._filling.is_here(chunk)
            ]
            self._busy.update(chunk for chunk, _ in chosen)
        return chosen

    def _let_go(self, chosen: Chosen) -> None:
        with self._changed:
            self._busy.difference_update(chunk for chunk, _ in chosen)

    def _bring(self, reader: ChunkReader, chosen: Chosen, wanted: range | None, most: int) -> None:
        """Fetch chunks, those that are ``wanted`` first; None: nobody waits. StorageError, OSError.

        Whoever waits for one that fails its check is refused.
        """

        def is_wanted(part: Part) -> bool:
            return wanted is not None and part.chunk in wanted

        ranges = plan_ranges(chosen, most)
        for planned in sorted(ranges, key=lambda planned: not any(map(is_wanted, planned.parts))):
            data = self._fetch(reader, planned)
            brought: list[tuple[int, int]] = []
            for part in sorted(planned.parts, key=lambda part: not is_wanted(part)):
                insist = wanted is None or is_wanted(part)
                plain = self._unpack(reader, planned, data, part, insist=insist)
                if plain is None:
                    continue
                self._filling.put(part.chunk, plain)
                brought.append((part.chunk, part.chunk + 1))
                if is_wanted(part):
                    self._watcher.fetched([brought.pop()])
            if brought:
                self._watcher.fetched(brought)

    def _fetch(self, reader: ChunkReader, planned: Range) -> Fetched | None:
        """The bytes of a range; None when they are missing, or not all there."""
        try:
            data = reader.fetch(planned)
        except (CorruptError, NotFoundError):
            return None
        with self._changed:
            self._problem = None
            if self._rate:
                now = time.monotonic()
                length = planned.length + sum(map(len, data.patches.values()))
                earliest = max(now, self._allowed) + length / self._rate
                self._allowed = min(earliest, now + _LONGEST_DEBT)
        return data

    def _unpack(
        self, reader: ChunkReader, planned: Range, data: Fetched | None, part: Part, *, insist: bool
    ) -> bytes | None:
        """A verified chunk; None when there is none."""
        try:
            if data is not None:
                with contextlib.suppress(CorruptError):
                    return reader.unpack(planned, data, part)
            if insist:
                return reader.fetch_alone(part)
        except (CorruptError, NotFoundError) as error:
            self._damage = one_line(error)
            self._watcher.refused(part.chunk, part.chunk + 1, self._damage)
        return None

    def _put_holes(self, number: int, page: Page) -> None:
        """What a page says is a hole need not be fetched."""
        first = number * PAGE_ENTRIES
        inside = min(PAGE_ENTRIES, self._lazy.chunks - first)
        if not self._filling.lacks(first, first + inside):
            return
        runs: list[tuple[int, int]] = []
        for chunk in range(first, first + inside):
            if page[chunk - first] is None:
                if runs and runs[-1][1] == chunk:
                    runs[-1] = (runs[-1][0], chunk + 1)
                else:
                    runs.append((chunk, chunk + 1))
        if any(self._filling.lacks(*run) for run in runs):
            for run in runs:
                self._filling.put_zeroes(*run)
            self._watcher.fetched(runs)

    # The background

    def _background(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICE)
        pause = _FIRST_PAUSE
        while self._await_turn():
            try:
                reader = self._origin.reader()
                planned = self._next_range(reader)
                if planned is None:
                    return
                self._take(reader, planned)
                pause = _FIRST_PAUSE
            except (StorageError, OSError) as error:
                # Nobody waits for it. What this range had comes in the next pass.
                self._note(error)
                self._wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _take(self, reader: ChunkReader, planned: Range) -> None:
        chosen = self._claim_all((part.chunk, part.entry) for part in planned.parts)
        try:
            self._bring(reader, chosen, None, self._most())
        finally:
            self._let_go(chosen)

    def _most(self) -> int:
        """Bytes of a range: with a low rate short ones, so that its pauses are."""
        return MAX_READ if not self._rate else max(1, min(MAX_READ, self._rate // 2))

    def _next_range(self, reader: ChunkReader) -> Range | None:
        """What to fetch next; None when nothing is missing, or it all stops."""
        with self._planning:
            while not self._stopping:
                if self._filling.missing == 0:
                    self._plan = None
                    self._wait(_FIRST_PAUSE)  # until it is durable, it may get lost
                    continue
                if self._plan is None:
                    self._damage = None
                    self._plan = self._ranges(reader)
                try:
                    return next(self._plan)
                except StopIteration:
                    self._plan = None
                    # What others fetch just now is here soon; what is damaged is not.
                    self._wait(PASS_SECONDS if self._damage else _FIRST_PAUSE)
                except BaseException:
                    self._plan = None  # a generator that raised has ended
                    raise
        return None

    def _ranges(self, reader: ChunkReader) -> Iterator[Range]:
        """One pass over all that is missing."""

        def lacks(number: int) -> bool:
            first = number * PAGE_ENTRIES
            return self._filling.lacks(first, min(first + PAGE_ENTRIES, self._lazy.chunks))

        for refs in reader.pages(lacks, PAGES_PER_GROUP):
            pages: list[tuple[int, Page]] = []
            try:
                pages = reader.load(refs)
            except (CorruptError, NotFoundError):
                for ref in refs:
                    try:
                        pages.append((ref.page, reader.page(ref.page)))
                    except (CorruptError, NotFoundError) as error:
                        self._damage = one_line(error)
            for number, page in pages:
                self._put_holes(number, page)
            yield from plan_ranges(
                (
                    (chunk, entry)
                    for number, page in pages
                    for chunk, entry in entries(number, page)
                    if entry is not None and not self._filling.is_here(chunk)
                ),
                self._most(),
            )

    def _await_turn(self) -> bool:
        """Wait until the background may fetch; False when it all stops."""
        yielded = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            with self._changed:
                if self._rate == 0:
                    self._changed.wait(1.0)
                    continue
                if self._allowed > now:
                    self._changed.wait(min(1.0, self._allowed - now))
                    continue
                if (self._queue or self._serving) and now - yielded < 1.0:
                    self._changed.wait(0.05)
                    continue
                if self._filling.unsynced > MAX_UNSYNCED:
                    self._changed.wait(0.05)
                    continue
            if self._free_space() >= LOW_SPACE:
                return True
            self._note(StorageError("the disk is nearly full: what nobody reads is not fetched"))
            self._wait(_LONGEST_PAUSE)
        return False

    # Keeping

    def _keep(self) -> None:
        """Make durable what came, tell how far it is, keep the snapshot alive."""
        synced = time.monotonic()
        # Soon at first: nobody knows how old the pin is that a process before us had.
        renew_at = synced + min(_FIRST_RENEWAL, RENEW_SECONDS)
        told: tuple[int, str | None] | None = None
        complete = False
        while not self._stopping:
            now = time.monotonic()
            full = self._filling.missing == 0
            if full or now - synced > SYNC_SECONDS or self._filling.unsynced > SYNC_BYTES:
                synced = now
                try:
                    lost = self._filling.sync()
                    if lost:
                        self._note(StorageError("the disk failed to keep what was fetched"))
                        self._watcher.lost_again(lost)
                        self._wait(_LONGEST_PAUSE)
                    elif full and not complete:
                        complete = True
                        self._watcher.whole()
                except OSError as error:
                    self._note(error)
                    self._wait(_LONGEST_PAUSE)
            if now > renew_at:
                renew_at = now + RENEW_SECONDS
                try:
                    self._origin.renew()
                except (StorageError, OSError) as error:
                    self._note(error)
            state = (self._filling.done, self._problem or self._damage)
            if state != told:
                told = state
                self._watcher.progress(*state)
            self._wait(_LOOK_SECONDS)

    def _note(self, error: BaseException) -> None:
        self._problem = one_line(error)

    def _wait(self, seconds: float) -> None:
        """For so long, or until it all stops."""
        end = time.monotonic() + seconds
        with self._changed:
            while not self._stopping and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
