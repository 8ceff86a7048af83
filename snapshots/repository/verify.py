"""Verify: find damaged objects, and tell which snapshots each of them harms.

Always: every record decodes, every page that a snapshot refers to is there and matches its digest,
every segment is there and long enough for the entries. Deep: every chunk is fetched, decompressed
and compared with its SHA-256, and the headers and indexes of segments.

The snapshots of a volume are taken oldest first. A page met before is not looked at again, and
neither is an entry that is the same as in the page of the snapshot before: with many snapshots of
a volume the work is that of their different chunks, and memory needs no list of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from backends.errors import CorruptError, InvalidError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.donors import read_index
from snapshots.repository.envelope import Kind
from snapshots.repository.holdings import (
    THREADS,
    describe_object,
    in_order,
    list_pointers,
    list_pushes,
    read_outcome,
)
from snapshots.repository.interfaces import Progress
from snapshots.repository.layout import (
    INTENTS,
    OUTCOMES,
    PAGE_ENTRIES,
    SEGMENTS,
    TOMBSTONES,
    intent_key,
    outcome_key,
    pages_key,
    parse_numbered_key,
    parse_pointer_key,
    segment_key,
    tombstone_key,
)
from snapshots.repository.pages import Entry, Page, PageRef, PageTable, pair_up
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import Range, plan_ranges, read_page
from snapshots.repository.records import Config, Intent, Root, Summary, Tombstone
from snapshots.repository.regions import chunk_length
from snapshots.repository.roots import find_root
from snapshots.repository.segments import (
    SEGMENT_HEADER_SIZE,
    PackedChunk,
    segment_header,
    unpack_chunk,
)


@dataclass
class Damage:
    """One damaged object. ``snapshots`` are those that cannot be restored whole, sorted."""

    key: str
    problem: str  # the first that was found, one line
    snapshots: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VerifyReport:
    """What verify found; nothing is wrong when ``damaged`` is empty.

    ``snapshots``, ``pages`` and ``chunks`` count what was checked (each page and chunk once),
    ``fetched`` the bytes of segments that a deep run read.
    """

    snapshots: int
    pages: int
    chunks: int
    fetched: int
    damaged: list[Damage]
    seconds: float


class _PageCheck(NamedTuple):
    """A page that was not met before. None in place of ``page`` when it cannot be read."""

    ref: PageRef
    page: Page | None
    before: Page | None  # of the same region in the snapshot before
    problem: str


class _Task(NamedTuple):
    """A range to fetch for chunks of one page; the last of a page has no range."""

    ref: PageRef
    planned: Range | None


class _Result(NamedTuple):
    task: _Task
    fetched: int
    damaged: list[tuple[str, str, Entry | None]]  # key, problem, entry


def verify_snapshots(
    store: ObjectStore,
    config: Config,
    volume: str | None,
    snapshot: str | None,
    deep: bool,
    progress: Progress | None,
) -> VerifyReport:
    """Check all, or the snapshots of one volume, or one of them; see the module's text.

    Raises NotFoundError when there is no such snapshot, and UnavailableError when the store does
    not answer: that says nothing about damage.
    """
    return _Verifier(store, config, deep, progress).run(volume, snapshot)


class _Verifier:
    def __init__(
        self, store: ObjectStore, config: Config, deep: bool, progress: Progress | None
    ) -> None:
        self._store = store
        self._config = config
        self._deep = deep
        self._progress = progress
        self._started = time.monotonic()
        self._damage: dict[str, Damage] = {}
        self._page_harm: dict[PageRef, set[str]] = {}  # pages met, with the damaged keys
        self._bad_entries: dict[Entry, str] = {}
        self._bad_segments: set[tuple[str, int]] = set()
        self._headers_seen: set[tuple[str, int]] = set()
        self._segment_sizes: dict[str, dict[int, int]] = {}
        self._pages = self._chunks = self._fetched = 0
        self._done = self._total = 0

    def run(self, volume: str | None, snapshot: str | None) -> VerifyReport:
        outcomes = list_pushes(self._store, OUTCOMES)
        pointers = list_pointers(self._store)
        tombstones = list_pushes(self._store, TOMBSTONES)
        if volume is None:
            self._check_records(INTENTS, intent_key, Intent.decode)
            self._check_records(TOMBSTONES, tombstone_key, Tombstone.decode)
        roots = self._load_roots(
            outcomes - tombstones,
            {push: key for push, key in pointers.items() if push not in tombstones},
            volume,
            snapshot,
        )
        if not roots and volume is not None and not self._damage:
            label = f"{volume}@{snapshot}" if snapshot else f"snapshot of {volume}"
            raise NotFoundError(f"there is no {label} in {self._store.name}")
        self._total = sum(root.summary.data for root in roots)
        by_volume: dict[str, list[Root]] = {}
        for root in roots:
            by_volume.setdefault(root.summary.volume, []).append(root)
        with (
            Crew(THREADS, "verify") as crew,
            Crew(THREADS, "pages") as readers,
            leaving_promptly(self._store),
        ):
            for of_volume in by_volume.values():
                before = PageTable()
                for root in of_volume:
                    self._check_root(root, before, crew, readers)
                    before = root.table
        for damage in self._damage.values():
            damage.snapshots.sort()
        return VerifyReport(
            len(roots),
            self._pages,
            self._chunks,
            self._fetched,
            sorted(self._damage.values(), key=lambda damage: damage.key),
            time.monotonic() - self._started,
        )

    def _blame(self, key: str, problem: str, label: str | None) -> None:
        damage = self._damage.setdefault(key, Damage(key, problem))
        if label is not None and label not in damage.snapshots:
            damage.snapshots.append(label)

    def _check_records(
        self, prefix: str, key_of: Callable[[str], str], decode: Callable[[bytes, str], object]
    ) -> None:
        """Check records that no snapshot's data depends on."""
        for push in sorted(list_pushes(self._store, prefix)):
            key = key_of(push)
            try:
                decoded = decode(
                    self._store.get(key, Kind.INTENT.limit), describe_object(self._store, key)
                )
                if getattr(decoded, "push", push) != push:
                    self._blame(
                        key, f"{describe_object(self._store, key)} is of another push", None
                    )
            except NotFoundError:
                continue  # deleted meanwhile
            except CorruptError as error:
                self._blame(key, str(error), None)

    def _load_roots(
        self, live: set[str], pointers: dict[str, str], volume: str | None, snapshot: str | None
    ) -> list[Root]:
        """The roots of the chosen snapshots that can be read; blames what cannot."""
        labels: dict[str, str] = {}
        for push, key in pointers.items():
            parsed = parse_pointer_key(key)
            assert parsed is not None
            if volume in (None, parsed[0]) and snapshot in (None, parsed[1]):
                labels[push] = f"{parsed[0]}@{parsed[1]}"
        # Without a pointer only the outcome can tell which snapshot it is.
        chosen = labels.keys() | (live - pointers.keys())
        roots: dict[str, Root] = {}
        for push in sorted(chosen):
            label = labels.get(push)
            try:
                outcome, _ = read_outcome(self._store, self._config, push)
            except NotFoundError as error:
                self._blame(outcome_key(push), str(error), label)
                continue
            except CorruptError as error:
                self._blame(outcome_key(push), str(error), label)
                continue
            if outcome.root is None:
                continue
            try:
                root = find_root(self._store, self._config, push)
            except (NotFoundError, CorruptError) as error:
                self._blame(outcome_key(push), str(error), label)
                continue
            summary = root.summary
            if volume in (None, summary.volume) and snapshot in (None, summary.snapshot):
                roots[push] = root
        for push, label in labels.items():
            self._check_pointer(pointers[push], label, roots.get(push))
        ordered = in_order(root.summary for root in roots.values())
        return [roots[summary.push] for summary in ordered]

    def _check_pointer(self, key: str, label: str, root: Root | None) -> None:
        """A damaged pointer harms no snapshot: listings read the outcome instead."""
        where = describe_object(self._store, key)
        try:
            summary = Summary.decode_pointer(self._store.get(key, Kind.POINTER.limit), where)
        except NotFoundError:
            return  # deleted meanwhile
        except CorruptError as error:
            self._blame(key, str(error), None)
            return
        pair = (summary.label, summary.push)
        if root is not None and pair != (root.summary.label, root.summary.push):
            self._blame(key, f"{where} does not belong to {label}", None)

    def _check_root(self, root: Root, before: PageTable, crew: Crew, readers: Crew) -> None:
        label = root.summary.label
        fresh: list[tuple[PageRef, PageRef | None]] = []
        shared: list[PageRef] = []
        for ref, older in pair_up(root.table, before):
            if ref in self._page_harm:
                shared.append(ref)
            else:
                self._page_harm[ref] = set()
                fresh.append((ref, older))

        def tasks() -> Iterator[_Task]:
            for check in readers.ordered(self._read_page, fresh, 2 * THREADS):
                yield from self._check_page(check, root)

        for result in crew.ordered(self._fetch(root), tasks(), 2 * THREADS):
            self._fetched += result.fetched
            ref = result.task.ref
            for key, problem, entry in result.damaged:
                if entry is None:  # the header, which restores do without
                    self._blame(key, problem, None)
                else:
                    self._harm(ref, key, problem, label)
                    self._bad_entries[entry] = key
            if result.task.planned is None:
                self._advance(ref)
        for ref in shared:
            for key in self._page_harm[ref]:
                self._blame(key, "", label)
            self._advance(ref)

    def _advance(self, ref: PageRef) -> None:
        self._done += ref.chunks * self._config.chunk_size
        if self._progress:
            self._progress(min(self._done, self._total), self._total)

    def _harm(self, ref: PageRef, key: str, problem: str, label: str) -> None:
        self._page_harm[ref].add(key)
        self._blame(key, problem, label)

    def _read_page(self, pair: tuple[PageRef, PageRef | None]) -> _PageCheck:
        ref, older = pair
        before: Page | None = None
        if older is not None:
            try:
                before = read_page(self._store, self._config.chunk_size, older)
            except (CorruptError, NotFoundError, InvalidError):
                before = None  # blamed when it was looked at itself
        try:
            page = read_page(self._store, self._config.chunk_size, ref)
        except (CorruptError, NotFoundError) as error:
            return _PageCheck(ref, None, before, str(error))
        return _PageCheck(ref, page, before, "")

    def _check_page(self, check: _PageCheck, root: Root) -> Iterable[_Task]:
        """Check the structure of a page, and yield what a deep run has to fetch for it."""
        ref, label = check.ref, root.summary.label
        wanted: list[tuple[int, Entry]] = []
        if check.page is None:
            self._harm(ref, pages_key(ref.push, ref.number), check.problem, label)
        else:
            self._pages += 1
            for number, entry in enumerate(check.page):
                if entry is None:
                    continue
                if check.before is not None and check.before[number] == entry:
                    key = self._bad_entries.get(entry)
                    if entry[:2] in self._bad_segments:
                        key = segment_key(*entry[:2])
                    if key is not None:
                        self._harm(ref, key, "", label)
                    continue
                chunk = ref.page * PAGE_ENTRIES + number
                if chunk_length(chunk, self._config.chunk_size, root.summary.size) <= 0:
                    key = pages_key(ref.push, ref.number)
                    self._harm(ref, key, f"page {ref.page} reaches beyond the volume", label)
                    continue
                self._chunks += 1
                if self._check_extent(ref, entry, label):
                    wanted.append((chunk, entry))
        if self._deep:
            for planned in plan_ranges(wanted):
                yield _Task(ref, planned)
        yield _Task(ref, None)

    def _check_extent(self, ref: PageRef, entry: Entry, label: str) -> bool:
        """Tell whether the entry's segment is there and long enough; blames it otherwise."""
        sizes = self._segment_sizes.get(entry.push)
        if sizes is None:
            sizes = {}
            for key, size in self._store.list(f"{SEGMENTS}{entry.push}/"):
                number = parse_numbered_key(key)
                if number is not None:
                    sizes[number] = size
            self._segment_sizes[entry.push] = sizes
        key = segment_key(entry.push, entry.segment)
        found = sizes.get(entry.segment)
        if found is None:
            self._bad_segments.add(entry[:2])
            self._harm(ref, key, f"{describe_object(self._store, key)} is missing", label)
            return False
        if found < entry.offset + entry.length:
            self._bad_entries[entry] = key
            where = describe_object(self._store, key)
            self._harm(ref, key, f"{where} is too short: it ends at {found}", label)
            return False
        return True

    def _check_index(
        self, key: str, segment: tuple[str, int]
    ) -> list[tuple[str, str, Entry | None]]:
        """The index of a segment, which only a push that goes on with another one reads."""
        try:
            read_index(self._store, key, self._segment_sizes[segment[0]][segment[1]])
        except CorruptError as error:
            return [(key, str(error), None)]
        return []

    def _fetch(self, root: Root) -> Callable[[_Task], _Result]:
        """The work of a thread: fetch a range and check all that is in it."""
        size, chunk_size = root.summary.size, self._config.chunk_size

        def fetch(task: _Task) -> _Result:
            planned = task.planned
            if planned is None:
                return _Result(task, 0, [])
            where = describe_object(self._store, planned.key)
            damaged: list[tuple[str, str, Entry | None]] = []
            offset, end = planned.offset, planned.offset + planned.length
            segment = planned.parts[0].entry[:2]
            header = segment not in self._headers_seen
            if header:
                self._headers_seen.add(segment)
                offset = offset if offset > 2 * SEGMENT_HEADER_SIZE else 0
            try:
                data = self._store.get_range(planned.key, offset, end - offset)
                if header:
                    found = data[:SEGMENT_HEADER_SIZE]
                    if offset:
                        found = self._store.get_range(planned.key, 0, SEGMENT_HEADER_SIZE)
                    if found == segment_header(*segment):
                        damaged += self._check_index(planned.key, segment)
                    elif found != segment_header(*segment, indexed=False):
                        damaged.append((planned.key, f"{where}: its header is wrong", None))
            except (NotFoundError, CorruptError) as error:
                return _Result(
                    task, 0, [(planned.key, str(error), part.entry) for part in planned.parts]
                )
            for start, entry, chunk in planned.parts:
                begin = planned.offset - offset + start
                packed = PackedChunk(entry.codec, data[begin : begin + entry.length], entry.digest)
                length = chunk_length(chunk, chunk_size, size)
                try:
                    unpack_chunk(packed, length, f"{where} at {entry.offset}")
                except CorruptError as error:
                    damaged.append((planned.key, str(error), entry))
            return _Result(task, end - offset, damaged)

        return fetch
