"""Reading any chunk of a snapshot: its pages on demand, chunks in ranges, each chunk verified.

What is gone may have been repacked and collected since the root was read (roots.py): then the
newest root is looked for, and what it says is read from there on.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from backends.errors import CorruptError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.holdings import describe_object
from snapshots.repository.insisting import insist
from snapshots.repository.layout import PAGE_ENTRIES, segment_key
from snapshots.repository.pages import Entry, Page, PageRef
from snapshots.repository.reading import (
    Fetched,
    Part,
    Range,
    fetch_entry,
    fetch_patches,
    group_pages,
    missing_segment,
    read_page,
    read_pages,
    unpack_entry,
)
from snapshots.repository.records import Config, Root
from snapshots.repository.regions import chunk_length
from snapshots.repository.roots import find_root

_PAGES_KEPT = 64  # of 0.2 MiB each
_LOOK_AGAIN = 1.0  # seconds between two looks for a newer root


class ChunkReader:
    """All methods block and may be called from any thread; errors name the object."""

    def __init__(self, store: ObjectStore, config: Config, root: Root) -> None:
        self.store = store
        self.chunk_size = config.chunk_size
        self._config = config
        self._root = root
        self._looked = time.monotonic()
        self._size = root.summary.size
        self._pages: OrderedDict[int, Page] = OrderedDict()
        self._lock = threading.Lock()

    def page(self, number: int) -> Page:
        """The page of that number. StorageError."""
        with self._lock:
            page = self._pages.get(number)
            if page is not None:
                self._pages.move_to_end(number)
                return page
        try:
            page = self._read_page(number)
        except NotFoundError:
            self._look_again()
            page = self._read_page(number)
        self._check(number, page)
        with self._lock:
            self._pages[number] = page
            if len(self._pages) > _PAGES_KEPT:
                self._pages.popitem(last=False)
        return page

    def _read_page(self, number: int) -> Page:
        ref = self._root.table.find(number)
        if ref is None:
            return [None] * PAGE_ENTRIES
        return read_page(self.store, self.chunk_size, ref)

    def _look_again(self) -> None:
        """Take the newest root, unless we have just looked."""
        with self._lock:
            now = time.monotonic()
            if now < self._looked + _LOOK_AGAIN:
                return
            self._looked = now
        root = find_root(self.store, self._config, self._root.summary.push)
        with self._lock:
            self._root = root
            self._pages.clear()

    def pages(self, wanted: Callable[[int], bool], most: int) -> Iterator[list[PageRef]]:
        """References to all pages that are ``wanted``, in groups for ``load``."""
        return group_pages((ref for ref in self._root.table if wanted(ref.page)), most)

    def load(self, refs: list[PageRef]) -> list[tuple[int, Page]]:
        """The pages of one group, with their numbers. StorageError."""
        pages = read_pages(self.store, self.chunk_size, refs)
        for ref, page in pages:
            self._check(ref.page, page)
        return [(ref.page, page) for ref, page in pages]

    def fetch(self, planned: Range) -> Fetched:
        """The bytes of a range, and patches. StorageError."""
        try:
            data = self.store.get_range(planned.key, planned.offset, planned.length)
        except NotFoundError:
            self._look_again()  # for whoever plans the next range
            raise self._missing(planned.key) from None
        return Fetched(data, fetch_patches(self.store, planned.parts))

    def unpack(self, planned: Range, fetched: Fetched, part: Part) -> bytes:
        """A plain chunk of a range, verified. CorruptError."""
        return self._unpack(part.chunk, part.entry, *fetched.pieces(part))

    def _unpack(self, chunk: int, entry: Entry, stored: bytes, patch: bytes | None) -> bytes:
        where = describe_object(self.store, segment_key(entry.push, entry.segment))
        sizes = self.chunk_size, chunk_length(chunk, self.chunk_size, self._size)
        return unpack_entry(entry, stored, patch, sizes, where)

    def fetch_alone(self, part: Part) -> bytes:
        """One chunk of a range, by a request of its own, as often as it makes sense."""
        try:
            return self._fetch_alone(part.chunk, part.entry)
        except NotFoundError:
            self._look_again()
        number, place = divmod(part.chunk, PAGE_ENTRIES)
        entry = self.page(number)[place]
        if entry is None or entry == part.entry:
            raise self._missing(missing_segment(self.store, part.entry))
        return self._fetch_alone(part.chunk, entry)

    def _fetch_alone(self, chunk: int, entry: Entry) -> bytes:
        return insist(lambda: self._unpack(chunk, entry, *fetch_entry(self.store, entry)))

    def _missing(self, key: str) -> CorruptError:
        where = describe_object(self.store, key)
        return CorruptError(f"{where} is missing; {self._root.summary.label} needs it")

    def _check(self, number: int, page: Page) -> None:
        first = number * PAGE_ENTRIES
        inside = -(-self._size // self.chunk_size) - first
        if any(page[max(inside, 0) :]):
            raise CorruptError(
                f"page {number} of {self._root.summary.label} has a chunk beyond the volume's end"
            )


def entries(number: int, page: Page) -> Iterator[tuple[int, Entry | None]]:
    """(chunk, its entry) of a page, holes included."""
    return enumerate(page, number * PAGE_ENTRIES)
