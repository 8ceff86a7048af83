"""Reading a snapshot's pages and chunks, each verified, while collectors move them elsewhere.

An object that is gone may have been repacked and collected since the root was read: then it is
looked for by the newest root (roots.py). Only what that has no other place for is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from backends.errors import CorruptError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.holdings import describe_object
from snapshots.repository.insisting import insist
from snapshots.repository.layout import PAGE_ENTRIES
from snapshots.repository.losses import Losses
from snapshots.repository.pages import Entry, Page, PageRef
from snapshots.repository.reading import (
    Fetched,
    Part,
    Range,
    fetch_entry,
    fetch_patches,
    missing_segment,
    plan_ranges,
    read_pages,
    unpack_entry,
)
from snapshots.repository.records import Config, Root
from snapshots.repository.regions import chunk_length
from snapshots.repository.roots import Newest


class SnapshotReader:
    """Of the snapshot of ``root``; any number of threads may use it.

    All methods raise CorruptError, naming the object, when something is missing or not right; with
    ``losses`` they note that there, and go on with what is sound.
    """

    def __init__(
        self, store: ObjectStore, config: Config, root: Root, losses: Losses | None = None
    ) -> None:
        self._store = store
        self._chunk_size = config.chunk_size
        self._size = root.summary.size
        self._label = root.summary.label
        self._newest = Newest(store, config, root)
        self._losses = losses
        self._gone: set[str] = set()  # segments that the newest root needs, too

    def load(self, refs: list[PageRef]) -> list[tuple[PageRef, Page]]:
        """Pages that ``group_pages`` put together."""
        try:
            return read_pages(self._store, self._chunk_size, refs)
        except NotFoundError as error:
            try:
                return [(ref, self._newest.read_page(ref.page)) for ref in refs]
            except (NotFoundError, CorruptError) as again:
                if self._losses is None:
                    if isinstance(again, CorruptError):
                        raise
                    raise CorruptError(f"{error}; {self._label} needs it") from None
        except CorruptError:
            if self._losses is None:
                raise
        return [pair for ref in refs for pair in self._load_alone(ref)]

    def _load_alone(self, ref: PageRef) -> list[tuple[PageRef, Page]]:
        assert self._losses is not None
        try:
            return read_pages(self._store, self._chunk_size, [ref])
        except CorruptError as error:
            problem = str(error)
        except NotFoundError as error:
            problem = str(error)
            with suppress(NotFoundError, CorruptError):
                return [(ref, self._newest.read_page(ref.page))]
        first = ref.page * PAGE_ENTRIES
        self._losses.add(first, first + PAGE_ENTRIES, problem)
        return []

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
            yield from self._fetch_moved(planned, where)
            return
        except CorruptError:
            data = b""  # too short, or damaged on its way: each chunk by itself
        fetched = Fetched(data, fetch_patches(self._store, planned.parts))
        for part in planned.parts:
            try:
                plain = self._read_chunk(part, fetched, where)
            except NotFoundError:
                key = missing_segment(self._store, part.entry)
                alone = planned._replace(key=key, parts=[part])
                yield from self._fetch_moved(alone, describe_object(self._store, key))
            except CorruptError as error:
                if self._losses is None:
                    raise
                self._losses.add(part.chunk, part.chunk + 1, str(error))
            else:
                yield part.chunk, plain

    def _fetch_moved(self, planned: Range, where: str) -> Iterator[tuple[int, bytes]]:
        for again in plan_ranges(self._moved(planned, where)):
            yield from self.fetch(again)

    def _read_chunk(self, part: Part, fetched: Fetched, where: str) -> bytes:
        """A chunk of a range; asked for again, by itself, when that is damaged. NotFoundError."""
        _, entry, chunk = part
        sizes = self._chunk_size, chunk_length(chunk, self._chunk_size, self._size)
        with suppress(CorruptError):
            return unpack_entry(entry, *fetched.pieces(part), sizes, where)
        return insist(lambda: unpack_entry(entry, *fetch_entry(self._store, entry), sizes, where))

    def _moved(self, planned: Range, where: str) -> list[tuple[int, Entry]]:
        """Where the chunks of a range are now, whose segment is gone."""
        moved = []
        for _, entry, chunk in planned.parts:
            problem = f"{where} is missing; {self._label} needs it"
            place = None
            try:
                look = planned.key not in self._gone
                place = self._newest.find_chunk(chunk, entry, look=look)
            except NotFoundError:
                place = None
            except CorruptError as error:
                if self._losses is None:
                    raise
                problem = str(error)
            if place is not None:
                moved.append((chunk, place))
            elif self._losses is None:
                raise CorruptError(problem)
            else:
                self._gone.add(planned.key)
                self._losses.add(chunk, chunk + 1, problem)
        return moved
