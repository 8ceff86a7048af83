"""Verify: find damaged objects, and tell which snapshots each of them harms.

Always: every record decodes, every page that a snapshot refers to is there and matches its digest,
every segment is there and long enough for the entries. Deep: every chunk is fetched, decompressed
and compared with its SHA-256, and the headers and indexes of segments.

The snapshots of a volume are taken oldest first, and only the roots of two that follow one another
are in memory. A page met before is not looked at again, and neither is an entry that is the same
as in the page of the snapshot before: with many snapshots of a volume the work is that of their
different chunks. Of each page met, 4 bytes are kept.

When only one snapshot is verified and something is damaged, the pages of the volume's others are
read, too, to see which of them need it.

Others push, delete, collect and repack meanwhile: in the end, a snapshot that seems to be harmed
is forgotten when it was deleted, and looked at again when it has a newer root.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from backends.errors import CorruptError, InvalidError, NotFoundError, StorageError
from backends.objects import ObjectStore
from snapshots.repository.damage import Damage, Findings
from snapshots.repository.holdings import (
    THREADS,
    describe_object,
    in_order,
    list_pointers,
    list_pushes,
    read_outcome,
)
from snapshots.repository.insisting import insist
from snapshots.repository.interfaces import Progress
from snapshots.repository.layout import (
    INTENTS,
    OUTCOMES,
    PAGE_ENTRIES,
    RECORD_LIMIT,
    ROOTS,
    TOMBSTONES,
    intent_key,
    outcome_key,
    pages_key,
    parse_pointer_key,
    parse_root_key,
    tombstone_key,
)
from snapshots.repository.notes import drop_notes, note_damage
from snapshots.repository.pages import Entry, Page, PageRef, PageTable, pair_up
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import Range, plan_ranges, read_page
from snapshots.repository.records import Config, Intent, Repacked, Summary, Tombstone
from snapshots.repository.regions import chunk_length
from snapshots.repository.roots import finding_root
from snapshots.repository.segment_checks import SegmentChecks, Trouble
from snapshots.repository.steps import perform

Result = TypeVar("Result")

_LOOKS = 3  # at snapshots whose roots change meanwhile


@dataclass(frozen=True)
class VerifyReport:
    """What verify found; nothing is wrong when ``damaged`` is empty.

    ``snapshots``, ``pages`` and ``chunks`` count what was checked (each page and chunk once),
    ``fetched`` the bytes of segments that a deep run read. ``noted`` counts the objects that the
    next push is told of; ``warnings`` say what hindered that.
    """

    snapshots: int
    pages: int
    chunks: int
    fetched: int
    damaged: list[Damage]
    noted: int
    seconds: float
    warnings: list[str]


class _Known(NamedTuple):
    """A snapshot to verify. ``pointer`` is the key of its pointer, None without one."""

    summary: Summary
    pointer: str | None


class _Target(NamedTuple):
    """A snapshot that is being verified, by its newest root."""

    number: int
    volume: str
    size: int


class _PageCheck(NamedTuple):
    """A page that was not met before. None in place of ``page`` when it cannot be read."""

    ref: PageRef
    page: Page | None
    before: Page | None  # of the same region in the snapshot before
    problem: str
    missing: bool


class _Task(NamedTuple):
    """A range to fetch for chunks of one page; the last of a page has no range."""

    ref: PageRef
    planned: Range | None


class _Result(NamedTuple):
    task: _Task
    fetched: int
    damaged: list[Trouble]


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
        self._findings = Findings()
        self._met: dict[tuple[str, int], array[int]] = {}  # offsets of pages, by their object
        self._page_harm: dict[tuple[str, int, int], set[str]] = {}  # damaged keys, by page
        self._segments = SegmentChecks(store, config.chunk_size)
        self._verified: dict[int, tuple[_Known, int, str]] = {}  # by number: generation, repack
        self._tracing = False  # only looking who needs what is known to be damaged
        self._snapshots = self._pages = self._chunks = self._fetched = 0
        self._done = self._total = 0

    def run(self, volume: str | None, snapshot: str | None) -> VerifyReport:
        live = list_pushes(self._store, OUTCOMES)
        pointers = list_pointers(self._store)
        roots = (parse_root_key(key) for key, _ in self._store.list(ROOTS))
        repacked = [names for names in roots if names is not None]
        self._repacked = {names[0] for names in repacked}
        tombstones = list_pushes(self._store, TOMBSTONES)
        pointers = {push: key for push, key in pointers.items() if push not in tombstones}
        live -= tombstones | {names[2] for names in repacked}
        if volume is None:
            self._check_records(INTENTS, intent_key, Intent.decode)
            self._check_records(TOMBSTONES, tombstone_key, Tombstone.decode)
        chosen = self._survey(live, pointers, volume, snapshot)
        self._verify(chosen)
        if not self._snapshots and volume is not None and not len(self._findings):
            label = f"{volume}@{snapshot}" if snapshot else f"snapshot of {volume}"
            raise NotFoundError(f"there is no {label} in {self._store.name}")
        for _ in range(_LOOKS):
            again = self._settle()
            if not again:
                break
            self._verify(again)
        if snapshot is not None and self._findings.harmed():
            done = {known.summary.push for known in chosen}
            self._tracing = True
            others = self._survey(live, pointers, volume, None)
            self._verify([known for known in others if known.summary.push not in done])
            self._settle()
        noted, warnings = self._note(everything=self._deep and volume is None)
        return VerifyReport(
            self._snapshots,
            self._pages,
            self._chunks,
            self._fetched,
            self._findings.report(),
            noted,
            time.monotonic() - self._started,
            warnings,
        )

    def _note(self, *, everything: bool) -> tuple[int, list[str]]:
        """Note what is damaged; after a look at ``everything``, that all else is not."""
        needed = self._findings.needed()
        noted = 0
        try:
            noted = note_damage(self._store, needed)
            if everything:
                drop_notes(self._store, {finding.key for finding in needed})
        except StorageError as error:
            return noted, [f"the next push does not learn of all damage: {error}"]
        return noted, []

    def _read(self, key: str, decode: Callable[[bytes, str], Result]) -> Result:
        """A record, read again when it is damaged: perhaps it was on its way only."""
        where = describe_object(self._store, key)
        return insist(lambda: decode(self._store.get(key, RECORD_LIMIT), where))

    def _check_records(
        self, prefix: str, key_of: Callable[[str], str], decode: Callable[[bytes, str], object]
    ) -> None:
        """Check records that no snapshot's data depends on."""

        def check(push: str) -> tuple[str, str] | None:
            key = key_of(push)
            where = describe_object(self._store, key)
            try:
                decoded = self._read(key, decode)
            except NotFoundError:
                return None  # deleted meanwhile
            except CorruptError as error:
                return key, str(error)
            if getattr(decoded, "push", push) != push:
                return key, f"{where} is of another push"
            return None

        with Crew(THREADS, "records") as crew, leaving_promptly(self._store):
            for trouble in crew.ordered(check, sorted(list_pushes(self._store, prefix)), 64):
                if trouble is not None:
                    self._findings.add(*trouble)

    # Which snapshots there are

    def _survey(
        self, live: set[str], pointers: dict[str, str], volume: str | None, snapshot: str | None
    ) -> list[_Known]:
        """The chosen snapshots, by volume and oldest first; blames pointers and outcomes.

        A damaged pointer harms no snapshot: listings read the outcome instead.
        """
        names = {push: parse_pointer_key(key) for push, key in pointers.items()}
        chosen = [
            push
            for push, parsed in names.items()
            if parsed and volume in (None, parsed[0]) and snapshot in (None, parsed[1])
        ]
        # Without a pointer only the outcome can tell which snapshot it is.
        chosen += live - pointers.keys()

        def look(push: str) -> tuple[str, Summary | None, str, str]:
            """The summary, and what is wrong with the pointer, and with the outcome."""
            key, problem = pointers.get(push), ""
            if key is not None:
                where = describe_object(self._store, key)
                try:
                    summary = self._read(key, Summary.decode_pointer)
                    if (summary.volume, summary.snapshot, summary.push) == names[push]:
                        return push, summary, "", ""
                    problem = f"{where} does not belong to {key}"
                except NotFoundError:
                    problem = ""  # deleted meanwhile
                except CorruptError as error:
                    problem = str(error)
            try:
                outcome, _ = read_outcome(self._store, self._config, push)
            except (NotFoundError, CorruptError) as error:
                return push, None, problem, str(error)
            return push, outcome.root.summary if outcome.root else None, problem, ""

        found: dict[str, _Known] = {}
        with Crew(THREADS, "survey") as crew, leaving_promptly(self._store):
            for push, summary, of_pointer, of_outcome in crew.ordered(look, sorted(chosen), 64):
                pointer, parsed = pointers.get(push), names.get(push)
                if of_pointer and pointer is not None and not self._tracing:
                    self._findings.add(pointer, of_pointer)
                if of_outcome and not self._tracing:
                    self._blame_outcome(push, of_outcome, parsed)
                if (
                    summary is not None
                    and volume in (None, summary.volume)
                    and snapshot in (None, summary.snapshot)
                ):
                    found[push] = _Known(summary, pointer)
        return [
            found[summary.push] for summary in in_order(known.summary for known in found.values())
        ]

    def _blame_outcome(self, push: str, problem: str, names: tuple[str, str, str] | None) -> None:
        if names is None:
            self._findings.add(outcome_key(push), problem)
        elif self._store.size(tombstone_key(push)) is None:  # else deleted meanwhile
            number = self._findings.number(f"{names[0]}@{names[1]}")
            self._findings.add(outcome_key(push), problem, number)

    def _verify(self, chosen: list[_Known]) -> None:
        self._total += sum(known.summary.data for known in chosen)
        with (
            Crew(THREADS, "verify") as crew,
            Crew(THREADS, "pages") as readers,
            Crew(2, "roots") as loaders,
            leaving_promptly(self._store),
        ):
            before, volume = PageTable(), ""
            for known, found, problem in loaders.ordered(self._load_root, chosen, 2):
                label = known.summary.label
                if found is None:
                    if problem and not self._tracing:
                        names = known.summary.volume, known.summary.snapshot, ""
                        self._blame_outcome(known.summary.push, problem, names)
                    continue
                summary = found.root.summary
                if known.pointer is not None and summary.label != label:
                    where = describe_object(self._store, known.pointer)
                    self._findings.add(known.pointer, f"{where} does not belong to {summary.label}")
                number = self._findings.number(summary.label)
                self._verified[number] = known, found.generation, found.repack
                self._snapshots += not self._tracing
                if volume != summary.volume:
                    before, volume = PageTable(), summary.volume
                target = _Target(number, volume, summary.size)
                self._check_root(target, found.root.table, before, crew, readers)
                before = found.root.table

    def _load_root(self, known: _Known) -> tuple[_Known, Repacked | None, str]:
        """The newest root of a snapshot, or what is wrong with it."""
        push = known.summary.push
        try:
            # Collections and deletions need it, also when there is a newer root.
            outcome, _ = read_outcome(self._store, self._config, push)
            if outcome.root is None:
                return known, None, ""
            if push not in self._repacked:
                return known, Repacked(push, 0, outcome.root), ""
            return known, perform(self._store, self._config, finding_root(push)), ""
        except (NotFoundError, CorruptError) as error:
            return known, None, str(error)

    def _settle(self) -> list[_Known]:
        """Look again at what seems to be harmed; returns what has a newer root than we saw."""
        again: list[_Known] = []
        bits = self._findings.harmed()
        for number, (known, *seen) in list(self._verified.items()):
            if not bits >> number & 1:
                continue
            push = known.summary.push
            if self._store.size(tombstone_key(push)) is not None:
                self._findings.forgive(number)
                continue
            try:
                found = perform(self._store, self._config, finding_root(push))
            except (NotFoundError, CorruptError):
                continue
            if [found.generation, found.repack] != seen:
                self._findings.forgive(number)
                del self._verified[number]
                self._repacked.add(push)
                self._snapshots -= not self._tracing
                again.append(known)
        for (push, object_number, offset), keys in list(self._page_harm.items()):
            if any(key not in self._findings for key in keys):
                # Whoever still needs that page is to look at it again.
                del self._page_harm[push, object_number, offset]
                self._met[push, object_number].remove(offset)
        return again

    # One snapshot

    def _check_root(
        self, target: _Target, table: PageTable, before: PageTable, crew: Crew, readers: Crew
    ) -> None:
        fresh: list[tuple[PageRef, PageRef | None]] = []
        shared: list[PageRef] = []
        for ref, older in pair_up(table, before):
            if self._meet(ref):
                fresh.append((ref, older))
            else:
                shared.append(ref)

        def tasks() -> Iterator[_Task]:
            for check in readers.ordered(self._read_page, fresh, 2 * THREADS):
                yield from self._check_page(check, target)

        for result in crew.ordered(self._fetch(target.size), tasks(), 2 * THREADS):
            self._fetched += result.fetched
            ref = result.task.ref
            for trouble in result.damaged:
                self._blame(ref, trouble, target)
            if result.task.planned is None:
                self._advance(ref)
        for ref in shared:
            for key in self._page_harm.get(_place(ref), ()):
                if key in self._findings:
                    self._findings.add(key, "", target.number)
            self._advance(ref)

    def _meet(self, ref: PageRef) -> bool:
        """Whether a page was not met before."""
        offsets = self._met.setdefault((ref.push, ref.number), array("L"))
        if ref.offset in offsets:
            return False
        offsets.append(ref.offset)
        return True

    def _advance(self, ref: PageRef) -> None:
        self._done += ref.chunks * self._config.chunk_size
        if self._progress:
            self._progress(min(self._done, self._total), self._total)

    def _harm(
        self, ref: PageRef, key: str, offset: int | None, problem: str, target: _Target
    ) -> None:
        """An object is damaged at an offset, None: as a whole, and a page needs that."""
        self._page_harm.setdefault(_place(ref), set()).add(key)
        finding = self._findings.add(key, problem, target.number)
        finding.volume = target.volume
        finding.regions.add(ref.page)
        if offset is None:
            finding.whole = True
        else:
            finding.offsets.add(offset)

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
            return _PageCheck(ref, None, before, str(error), isinstance(error, NotFoundError))
        return _PageCheck(ref, page, before, "", False)

    def _check_page(self, check: _PageCheck, target: _Target) -> Iterable[_Task]:
        """Check the structure of a page, and yield what a deep run has to fetch for it."""
        ref = check.ref
        key = pages_key(ref.push, ref.number)
        wanted: list[tuple[int, Entry]] = []
        if check.page is None:
            if not self._tracing or self._findings.is_bad(key, ref.offset):
                offset = None if check.missing else ref.offset
                self._harm(ref, key, offset, check.problem, target)
        else:
            self._pages += not self._tracing
            for number, entry in enumerate(check.page):
                if entry is None:
                    continue
                if self._tracing or (check.before is not None and check.before[number] == entry):
                    for segment, offset in self._findings.find_bad(entry):
                        self._harm(ref, segment, offset, "", target)
                    continue
                chunk = ref.page * PAGE_ENTRIES + number
                if chunk_length(chunk, self._config.chunk_size, target.size) <= 0:
                    problem = f"page {ref.page} reaches beyond the volume"
                    self._harm(ref, key, ref.offset, problem, target)
                    continue
                self._chunks += 1
                wanted += [(chunk, one) for one in self._check_extents(ref, entry, target)]
        if self._deep and not self._tracing:
            for planned in plan_ranges(wanted):
                yield _Task(ref, planned)
        yield _Task(ref, None)

    def _check_extents(self, ref: PageRef, entry: Entry, target: _Target) -> list[Entry]:
        """What is there to be checked of a chunk: it, or some pieces; blames the other segments."""
        there = []
        pieces = entry.pieces()
        for piece in pieces:
            trouble = self._segments.check_extent(piece)
            if trouble is None:
                there.append(piece)
            else:
                self._blame(ref, trouble, target)
        return [entry] if len(there) == len(pieces) else there

    def _blame(self, ref: PageRef, trouble: Trouble, target: _Target) -> None:
        if trouble.piece is None:
            self._findings.add(trouble.key, trouble.problem)
        else:
            offset = None if trouble.missing else trouble.piece.offset
            self._harm(ref, trouble.key, offset, trouble.problem, target)

    def _fetch(self, size: int) -> Callable[[_Task], _Result]:
        """The work of a thread on a volume of ``size`` bytes."""

        def fetch(task: _Task) -> _Result:
            if task.planned is None:
                return _Result(task, 0, [])
            return _Result(task, *self._segments.check_range(task.planned, size))

        return fetch


def _place(ref: PageRef) -> tuple[str, int, int]:
    return ref.push, ref.number, ref.offset
