"""What changed between two snapshots in a repository, chunk by chunk.

A page that both share is not read, so this costs what changed. Chunks with the same SHA-256 are the
same, so unlike in a data directory what was written again with the same content has not changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from backends.errors import CorruptError, NotFoundError
from snapshots.difference import Extent
from snapshots.repository.layout import PAGE_ENTRIES
from snapshots.repository.pages import Entry, Page, PageRef
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import read_page
from snapshots.repository.records import Root
from snapshots.repository.regions import chunk_length
from snapshots.repository.repository import Repository

THREADS = 8


class _Pair(NamedTuple):
    """A page that is not the same in both; None: it is nothing but holes."""

    page: int
    old: PageRef | None
    new: PageRef | None


def compare_roots(repository: Repository, older: Root, newer: Root) -> list[Extent]:
    """The extents that differ in ``newer``, in order; none beyond its size.

    Where it is longer and nothing is said, it reads as zeros. Raises CorruptError, naming the
    object, when a page cannot be read.
    """
    chunk_size, size = repository.config.chunk_size, newer.summary.size

    def load(ref: PageRef | None, root: Root) -> Page:
        if ref is None:
            return [None] * PAGE_ENTRIES
        try:
            return read_page(repository.store, chunk_size, ref)
        except NotFoundError as error:
            raise CorruptError(f"{error}; {root.summary.label} needs it") from None

    def compare(pair: _Pair) -> list[tuple[int, bool]]:
        """The chunks that differ, and whether they are holes."""
        first = pair.page * PAGE_ENTRIES
        entries = zip(load(pair.old, older), load(pair.new, newer), strict=True)
        return [
            (chunk, entry is None)
            for chunk, (was, entry) in enumerate(entries, first)
            if _digest(was) != _digest(entry) and chunk_length(chunk, chunk_size, size) > 0
        ]

    extents: list[Extent] = []
    with Crew(THREADS, "compare") as crew, leaving_promptly(repository.store):
        for chunks in crew.ordered(compare, _unlike(older, newer), 2 * THREADS):
            for chunk, zero in chunks:
                offset, length = chunk * chunk_size, chunk_length(chunk, chunk_size, size)
                last = extents[-1] if extents else None
                if last and last.offset + last.length == offset and last.zero == zero:
                    extents[-1] = Extent(last.offset, last.length + length, zero)
                else:
                    extents.append(Extent(offset, length, zero))
    return extents


def _digest(entry: Entry | None) -> bytes | None:
    return None if entry is None else entry.digest


def _unlike(older: Root, newer: Root) -> Iterator[_Pair]:
    """The pages that are not the same in both, in order."""
    olds, news = iter(older.table), iter(newer.table)
    old, new = next(olds, None), next(news, None)
    while old is not None or new is not None:
        if old is not None and (new is None or old.page < new.page):
            yield _Pair(old.page, old, None)
            old = next(olds, None)
        elif new is not None and (old is None or new.page < old.page):
            yield _Pair(new.page, None, new)
            new = next(news, None)
        elif old is not None:
            if old != new:
                yield _Pair(old.page, old, new)
            old, new = next(olds, None), next(news, None)
