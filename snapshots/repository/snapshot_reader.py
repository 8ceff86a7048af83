"""Reading a snapshot's pages and chunks, each verified, while collectors move them elsewhere.

An object that is gone may have been repacked and collected since the root was read: then it is
looked for by the newest root (roots.py). Only what that has no other place for is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

from backends.errors import CorruptError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.holdings import describe_object
from snapshots.repository.layout import PAGE_ENTRIES
from snapshots.repository.pages import Entry, Page, PageRef
from snapshots.repository.reading import Range, plan_ranges, read_pages
from snapshots.repository.records import Config, Root
from snapshots.repository.regions import chunk_length
from snapshots.repository.roots import Newest
from snapshots.repository.segments import PackedChunk, unpack_chunk


class SnapshotReader:
    """Of the snapshot of ``root``; any number of threads may use it.

    All methods raise CorruptError, naming the object, when something is missing or not right.
    """

    def __init__(self, store: ObjectStore, config: Config, root: Root) -> None:
        self._store = store
        self._chunk_size = config.chunk_size
        self._size = root.summary.size
        self._label = root.summary.label
        self._newest = Newest(store, config, root)

    def load(self, refs: list[PageRef]) -> list[tuple[PageRef, Page]]:
        """Pages that ``group_pages`` put together."""
        try:
            return read_pages(self._store, self._chunk_size, refs)
        except NotFoundError as error:
            try:
                return [(ref, self._newest.read_page(ref.page)) for ref in refs]
            except NotFoundError:
                raise CorruptError(f"{error}; {self._label} needs it") from None

    def chunks(self, ref: PageRef, page: Page) -> Iterator[tuple[int, Entry]]:
        """The chunks of a page that are no holes: (number in the volume, entry), ascending."""
        for chunk, entry in enumerate(page, ref.page * PAGE_ENTRIES):
            if entry is not None:
                if chunk_length(chunk, self._chunk_size, self._size) <= 0:
                    raise CorruptError(
                        f"page {ref.page} of {self._label} has a chunk beyond the volume's end"
                    )
                yield chunk, entry

    def fetch(self, planned: Range) -> Iterator[tuple[int, bytes]]:
        """The chunks of a range: (number in the volume, content)."""
        where = describe_object(self._store, planned.key)
        try:
            data = self._store.get_range(planned.key, planned.offset, planned.length)
        except NotFoundError:
            for again in plan_ranges(self._moved(planned, where)):
                yield from self.fetch(again)
            return
        for start, entry, chunk in planned.parts:
            packed = PackedChunk(entry.codec, data[start : start + entry.length], entry.digest)
            length = chunk_length(chunk, self._chunk_size, self._size)
            yield chunk, unpack_chunk(packed, length, f"{where} at {entry.offset}")

    def _moved(self, planned: Range, where: str) -> list[tuple[int, Entry]]:
        """Where the chunks of a range are now, whose segment is gone."""
        moved = []
        for _, entry, chunk in planned.parts:
            try:
                place = self._newest.find_chunk(chunk, entry)
            except NotFoundError:
                place = None
            if place is None:
                raise CorruptError(f"{where} is missing; {self._label} needs it")
            moved.append((chunk, place))
        return moved
