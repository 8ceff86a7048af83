"""Packing: read what changed in a snapshot, and store it as segments and pages.

The data's way: pages that may have changed are cut into units of at most 1 MiB; workers read a
unit, drop zero chunks, hash, drop what the parent has too, and compress; the calling thread takes
the units in order, appends to the segment and completes pages; uploaders put what is full.
Of a chunk of which at most half is unlike what the parent's base has, only these blocks are stored,
as a patch of that base.
Memory: READ_WINDOW of plain bytes and as much compressed, IN_FLIGHT + 1 segments, about 120 MiB at
most (and what the store's client copies), plus 64 bytes for each page of the snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from backends.errors import CorruptError, NotFoundError, StorageError, one_line
from backends.objects import ObjectStore
from snapshots.repository.donors import Donors
from snapshots.repository.envelope import digest_of
from snapshots.repository.interfaces import Progress, Source
from snapshots.repository.layout import (
    PAGE_ENTRIES,
    PAGES_TARGET,
    SEGMENT_TARGET,
    pages_key,
    segment_key,
)
from snapshots.repository.notes import KnownDamage
from snapshots.repository.pages import Entry, Page, PageRef, PageTable, Patch, encode_page
from snapshots.repository.pipeline import Crew, Uploader, leaving_promptly
from snapshots.repository.reading import read_page
from snapshots.repository.records import Root
from snapshots.repository.regions import (
    ChangedBlocks,
    Run,
    by_page,
    chunk_length,
    chunk_runs,
    count_chunks,
    intersect,
    join,
)
from snapshots.repository.segments import (
    INDEXED_CHUNK_SIZE,
    PATCHED,
    PackedChunk,
    digest_chunk,
    index_entry,
    pack_chunk,
    pack_patch,
    segment_header,
    segment_index,
)

# One processor is left: to the thread that packs, and to guests. More only wait for each other.
WORKERS = max(1, min(4, len(os.sched_getaffinity(0)) - 1))
PAGE_READERS = 4
UPLOAD_THREADS = 4
IN_FLIGHT = 4  # objects being uploaded
READ_WINDOW = 16 << 20  # plain bytes between reading and packing
UNIT = 1 << 20  # bytes that one worker reads at a time, unless a chunk is longer


class ParentUnusableError(Exception):
    """The parent was deleted meanwhile, or its root is damaged: do without it."""


class _TouchedPage(NamedTuple):
    """A page in which something may have changed. Chunks are numbered through the volume."""

    number: int
    changed: list[Run]
    reads: list[Run]  # those of ``changed`` that may not be zero


@dataclass
class _PageWork:
    """A page that is being built; ``entries`` begins as the parent's and is changed in place.

    ``changed`` counts the plain bytes of what is unlike the parent's.
    ``lost`` has what is not taken over because it is damaged, with the digest that it should have
    when it was not written since.
    """

    touched: _TouchedPage
    inherited: PageRef | None
    entries: Page
    changed: int = 0
    lost: dict[int, bytes | None] = field(default_factory=dict)


class _Unit(NamedTuple):
    """Some chunks of a page, of at most UNIT bytes. The last one of a page completes it."""

    work: _PageWork
    runs: list[Run]
    last: bool
    donated: dict[int, list[Entry]]  # chunks that pushes gone on with have stored


class _PackedPatch(NamedTuple):
    """A patch of ``base``; ``piece`` is what to store, or where a push gone on with has it.

    ``mask`` has the blocks in it, ``digest`` is that of the plain chunk.
    """

    base: Entry
    piece: PackedChunk | Entry
    mask: int
    digest: bytes


_Content = PackedChunk | _PackedPatch | Entry | None


class _Packed(NamedTuple):
    """A unit, and for each chunk: packed, None for a hole, or an equal entry of another push."""

    unit: _Unit
    chunks: list[_Content]


class SnapshotPacker:
    """Stores the segments and pages of one push. ``_load`` and ``_pack`` run on threads.

    Afterwards ``table`` refers to every page of the snapshot. Sizes are in bytes: ``read`` from the
    source, ``changed`` (plain) of chunks unlike the parent's, or of the blocks in patches, ``data``
    (plain) and ``stored`` of all chunks that are no holes, ``uploaded`` of the ``segments`` and
    ``pages`` objects, ``resumed`` of chunks that earlier pushes of the snapshot had stored,
    ``repaired`` (plain) of chunks of which the parent's are damaged. ``warnings`` are lines about
    that.
    """

    def __init__(self, store: ObjectStore, chunk_size: int, source: Source, push: str) -> None:
        self._store = store
        self._chunk_size = chunk_size
        self._source = source
        self._push = push
        self._segment = bytearray()
        self._index = bytearray()  # of the segment
        self._pages = bytearray()
        self._zero_chunk = bytes(chunk_size)
        self.table = PageTable()
        self.read = 0
        self.changed = 0
        self.data = 0
        self.stored = 0
        self.uploaded = 0
        self.retained = 0.0  # for the root; ``retaining`` says it
        self.resumed = 0
        self.repaired = 0
        self.segments = 0
        self.pages = 0
        self.warnings: list[str] = []
        self._holding: list[Run] = []
        self._blocks = ChangedBlocks([], chunk_size)
        self._parent_size = 0
        self._damage = KnownDamage()
        self._unlike: list[int] = []  # chunks
        self._rebuilt: list[str] = []  # why, for each page

    def run(
        self,
        parent: Root | None,
        donors: Sequence[str],
        progress: Progress | None,
        damage: KnownDamage | None = None,
    ) -> None:
        """Store what ``parent`` does not have, and wait until the store has acknowledged it.

        What the pushes ``donors`` had stored of this snapshot is referred to. What of the parent is
        known to be damaged, or described by a page that cannot be read, is read from the source and
        stored anew.
        """
        self._damage = damage or KnownDamage()
        touched = self._plan(parent)
        numbers = {page.number for page in touched}
        table = parent.table if parent else PageTable()
        inherited = {ref.page: ref for ref in table if ref.page in numbers}
        untouched = (ref for ref in table if ref.page not in numbers and ref.page < self._end_page)
        total = sum(count_chunks(page.reads) for page in touched) * self._chunk_size
        done = 0
        unit_bytes = max(UNIT, self._chunk_size)

        def load(page: _TouchedPage) -> _PageWork:
            return self._load(page, inherited.get(page.number))

        with (
            Crew(UPLOAD_THREADS, "upload") as uploads,
            Crew(PAGE_READERS, "pages") as readers,
            Crew(WORKERS, "pack") as workers,
            leaving_promptly(self._store),
        ):
            uploader = Uploader(self._store, uploads, IN_FLIGHT)
            works = readers.ordered(load, touched, 2 * PAGE_READERS)
            given = Donors(self._store, list(donors), self._chunk_size)
            units = _cut(works, unit_bytes // self._chunk_size, given)
            shared = next(untouched, None)
            for packed in workers.ordered(self._pack, units, READ_WINDOW // unit_bytes):
                while shared is not None and shared.page < packed.unit.work.touched.number:
                    self._refer(shared)
                    shared = next(untouched, None)
                self._take(packed, uploader)
                done += len(packed.chunks) * self._chunk_size
                if progress:
                    progress(min(done, total), total)
            while shared is not None:
                self._refer(shared)
                shared = next(untouched, None)
            self._flush_segment(uploader)
            self._flush_pages(uploader)
            uploader.finish()
        self.uploaded = uploader.bytes
        if self._rebuilt:
            self.warnings.append(
                f"what {len(self._rebuilt)} damaged pages of the parent described was read and"
                f" stored anew: {self._rebuilt[0]}"
            )
        if self._unlike:
            self.warnings.append(
                f"{len(self._unlike)} chunks whose copies in the repository are damaged, the first"
                f" at offset {min(self._unlike) * self._chunk_size}, are not what was pushed, and"
                " nothing was written there since: they were stored as they are now; check the disk"
            )

    @property
    def _end_chunk(self) -> int:
        return -(-self._source.size // self._chunk_size)

    @property
    def _end_page(self) -> int:
        return -(-self._end_chunk // PAGE_ENTRIES)

    def _plan(self, parent: Root | None) -> list[_TouchedPage]:
        source, size = self._source, self._source.size
        extents = source.extents()
        holding = chunk_runs(extents, self._chunk_size, size)
        if parent is None:
            changed = holding
        else:
            differing = list(source.changed_extents(parent.summary.snapshot_id))
            old_size = self._parent_size = parent.summary.size
            if old_size != size:
                # The chunk at the smaller end may have another length, its page entries beyond the
                # end; and what was added is new, whatever the source says of it.
                differing.append((min(old_size, size) - 1, 1))
                for offset, length in extents:
                    start = max(offset, old_size)
                    if start < offset + length:
                        differing.append((start, offset + length - start))
            changed = chunk_runs(differing, self._chunk_size, size)
            self._blocks = ChangedBlocks(differing, self._chunk_size)
        self._holding = holding
        reads = dict(by_page(intersect(changed, holding)))
        touched = dict(by_page(changed))
        if parent is not None:
            for page in self._damage.regions:
                if page < self._end_page and parent.table.find(page) is not None:
                    touched.setdefault(page, [])
        return [_TouchedPage(page, touched[page], reads.get(page, [])) for page in sorted(touched)]

    def _load(self, page: _TouchedPage, inherited: PageRef | None) -> _PageWork:
        """Begin a page with the parent's entries; chunks that became holes are emptied."""
        if inherited is None:
            return _PageWork(page, None, [None] * PAGE_ENTRIES)
        try:
            entries = read_page(self._store, self._chunk_size, inherited)
        except (CorruptError, NotFoundError) as error:
            return self._rebuild(page.number, error)
        work = self._drop_damaged(_PageWork(page, inherited, entries))
        page, base = work.touched, page.number * PAGE_ENTRIES
        reads = {chunk for first, end in page.reads for chunk in range(first, end)}
        gone = [chunk for first, end in page.changed for chunk in range(first, end)]
        gone += range(max(base, self._end_chunk), base + PAGE_ENTRIES)
        for chunk in gone:
            if chunk not in reads and entries[chunk - base] is not None:
                entries[chunk - base] = None
                work.changed += self._chunk_size
        return work

    def _rebuild(self, number: int, error: StorageError) -> _PageWork:
        """Begin a page anew whose predecessor cannot be read: all that the source has."""
        base = number * PAGE_ENTRIES
        region = (base, min(base + PAGE_ENTRIES, self._end_chunk))
        reads = list(intersect([region], self._holding))
        self._rebuilt.append(one_line(error))
        work = _PageWork(_TouchedPage(number, [region], reads), None, [None] * PAGE_ENTRIES)
        work.lost = dict.fromkeys(range(*region))
        return work

    def _drop_damaged(self, work: _PageWork) -> _PageWork:
        """Let chunks be read anew whose stored copies are known to be damaged."""
        if work.touched.number not in self._damage.regions:
            return work
        page, base = work.touched, work.touched.number * PAGE_ENTRIES
        changed = {chunk for first, end in page.changed for chunk in range(first, end)}
        for chunk, entry in enumerate(work.entries, base):
            if entry is not None and self._damage.hits(entry):
                work.lost[chunk] = None if chunk in changed else entry.digest
                work.entries[chunk - base] = None
        if work.lost:
            lost = join((chunk, chunk + 1) for chunk in work.lost if chunk < self._end_chunk)
            reads = join(sorted([*page.reads, *intersect(lost, self._holding)]))
            work.touched = page._replace(reads=reads)
            read = {chunk for first, end in reads for chunk in range(first, end)}
            self._unlike += [
                chunk for chunk, digest in work.lost.items() if digest and chunk not in read
            ]
        return work

    def _pack(self, unit: _Unit) -> _Packed:
        """Read, hash and compress a unit."""
        base = unit.work.touched.number * PAGE_ENTRIES
        chunks: list[_Content] = []
        for first, end in unit.runs:
            view = self._read(first, end)
            for chunk in range(first, end):
                start = (chunk - first) * self._chunk_size
                plain = bytes(view[start : start + self._chunk_size])
                if plain == self._zero_chunk[: len(plain)]:
                    chunks.append(None)
                else:
                    known = unit.work.entries[chunk - base]
                    chunks.append(self._pack_chunk(unit, chunk, plain, known))
        return _Packed(unit, chunks)

    def _read(self, first: int, end: int) -> memoryview:
        offset = first * self._chunk_size
        view = memoryview(bytearray(min(end * self._chunk_size, self._source.size) - offset))
        try:
            self._source.read_into(offset, view)
        except OSError as error:
            raise StorageError(
                f"cannot read {len(view)} bytes at offset {offset} of {self._source.volume}@"
                f"{self._source.snapshot}: {error.strerror or error}; check the disk"
            ) from error
        return view

    def _pack_chunk(self, unit: _Unit, chunk: int, plain: bytes, known: Entry | None) -> _Content:
        """What to store of a chunk that is no hole; ``known`` is what the parent has."""
        digest = digest_chunk(plain)
        if known is None:
            return self._donated(unit, chunk, digest) or pack_chunk(plain, digest)
        if digest == known.digest:
            return known
        if digest == known.base.digest:
            return known.base
        mask = self._mask(chunk, len(plain), known)
        if mask is None:
            return self._donated(unit, chunk, digest) or pack_chunk(plain, digest)
        packed = pack_patch(plain, mask, self._blocks.size)
        donated = self._donated(unit, chunk, packed.digest, PATCHED)
        return _PackedPatch(known.base, donated or packed, mask, digest)

    def _mask(self, chunk: int, length: int, known: Entry) -> int | None:
        """The blocks that a patch of ``known.base`` must have; None: it is not worth it."""
        changed = self._blocks.mask(chunk)
        mask = changed | (known.patch.mask if known.patch else 0)
        if not changed or 2 * mask.bit_count() > self._blocks.in_chunk:
            return None
        return mask if chunk_length(chunk, self._chunk_size, self._parent_size) == length else None

    def _donated(self, unit: _Unit, chunk: int, digest: bytes, patched: int = 0) -> Entry | None:
        for entry in unit.donated.get(chunk, ()):
            if (
                entry.digest == digest
                and entry.codec & PATCHED == patched
                and not self._damage.hits(entry)
            ):
                return entry
        return None

    def _take(self, packed: _Packed, uploader: Uploader) -> None:
        """Put a unit's chunks into the segment and the page; complete the page with its last."""
        unit, work = packed.unit, packed.unit.work
        base = work.touched.number * PAGE_ENTRIES
        numbers = chain.from_iterable(range(*run) for run in unit.runs)
        for chunk, content in zip(numbers, packed.chunks, strict=True):
            length = chunk_length(chunk, self._chunk_size, self._source.size)
            self.read += length
            entry = self._store_content(chunk, content, uploader)
            donated = content.piece if isinstance(content, _PackedPatch) else content
            if any(donated is given for given in unit.donated.get(chunk, ())):
                assert isinstance(donated, Entry)
                self.resumed += donated.length
            if chunk in work.lost:
                self.repaired += length if entry is not None else 0
                should = work.lost[chunk]
                if should is not None and (entry is None or entry.digest != should):
                    self._unlike.append(chunk)
            if entry != work.entries[chunk - base]:
                work.entries[chunk - base] = entry
                if isinstance(content, _PackedPatch):
                    length = min(length, content.mask.bit_count() * self._blocks.size)
                work.changed += length
        if unit.last:
            self._complete(work, uploader)

    def _store_content(self, chunk: int, content: _Content, uploader: Uploader) -> Entry | None:
        """The entry of a chunk, what it needs being in a segment."""
        if isinstance(content, PackedChunk):
            return self._append(chunk, content, uploader)
        if not isinstance(content, _PackedPatch):
            return content
        piece = content.piece
        if isinstance(piece, PackedChunk):
            piece = self._append(chunk, piece, uploader)
        patch = Patch(
            *piece[:4], piece.codec & ~PATCHED, piece.digest, content.mask, content.base.digest
        )
        return content.base._replace(digest=content.digest, patch=patch)

    def _append(self, number: int, chunk: PackedChunk, uploader: Uploader) -> Entry:
        longer = len(self._segment) + len(self._index) + len(chunk.data) + INDEXED_CHUNK_SIZE
        if longer > SEGMENT_TARGET:
            self._flush_segment(uploader)
        if not self._segment:
            self._segment += segment_header(self._push, self.segments)
        entry = Entry(
            self._push,
            self.segments,
            len(self._segment),
            len(chunk.data),
            chunk.codec,
            chunk.digest,
        )
        self._segment += chunk.data
        self._index += index_entry(number, chunk)
        return entry

    def _flush_segment(self, uploader: Uploader) -> None:
        if self._segment:
            self._segment += segment_index(self._index)
            uploader.put(segment_key(self._push, self.segments), self._segment)
            self._segment, self._index = bytearray(), bytearray()
            self.segments += 1

    def _complete(self, work: _PageWork, uploader: Uploader) -> None:
        """Store the page and refer to it; the parent's is shared when nothing is new in it."""
        self.changed += work.changed
        if not work.changed and not work.lost:
            if work.inherited is not None:
                self._refer(work.inherited)
            return
        entries = [entry for entry in work.entries if entry is not None]
        if not entries:
            return
        number = work.touched.number
        record = encode_page(number, work.entries)
        if len(self._pages) + len(record) > PAGES_TARGET:
            self._flush_pages(uploader)
        self._refer(
            PageRef(
                number,
                self._push,
                self.pages,
                len(self._pages),
                len(record),
                len(entries),
                sum(entry.stored for entry in entries),
                digest_of(record),
            )
        )
        self._pages += record

    def _flush_pages(self, uploader: Uploader) -> None:
        if self._pages:
            uploader.put(pages_key(self._push, self.pages), self._pages)
            self._pages = bytearray()
            self.pages += 1

    def _refer(self, ref: PageRef) -> None:
        self.table.append(ref)
        self.data += ref.chunks * self._chunk_size
        self.stored += ref.stored


def _cut(works: Iterable[_PageWork], most: int, donors: Donors) -> Iterator[_Unit]:
    """Cut the pages into units of at most ``most`` chunks, at least one for each page."""
    for work in works:
        groups: list[list[Run]] = [[]]
        room = most
        for first, end in work.touched.reads:
            start = first
            while start < end:
                if not room:
                    groups.append([])
                    room = most
                stop = min(end, start + room)
                groups[-1].append((start, stop))
                room -= stop - start
                start = stop
        for number, runs in enumerate(groups, 1):
            donated: dict[int, list[Entry]] = {}
            for run in runs:
                donated |= donors.find(*run)
            yield _Unit(work, runs, number == len(groups), donated)
