"""Stream: read a snapshot's data in the order of the volume, every chunk verified.

For what can only be written from front to back. Pages are fetched ahead, a few groups at a time;
their chunks are cut into windows of at most 4 MiB, and several threads fetch a window each, in as
few ranges as there are. Memory: WINDOWS windows, plain and as stored, and the entries of
PAGES_AHEAD groups of pages, about 160 MiB at most, plus 64 bytes for each page of the snapshot.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from backends.errors import CorruptError, NotFoundError
from snapshots.repository.holdings import describe_object, read_outcome
from snapshots.repository.layout import PAGE_ENTRIES
from snapshots.repository.pages import Entry, Page, PageRef
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import group_pages, plan_ranges, read_pages
from snapshots.repository.records import Root
from snapshots.repository.regions import chunk_length
from snapshots.repository.repository import Repository
from snapshots.repository.segments import PackedChunk, unpack_chunk

THREADS = 8
WINDOW = 4 << 20  # plain bytes that one thread fetches at a time
WINDOWS = 2 * THREADS
PAGES_AHEAD = 4
PAGES_PER_GROUP = 16

_Window = list[tuple[int, Entry]]


def read_root(repository: Repository, volume: str, snapshot: str) -> Root:
    """The manifest of a snapshot; NotFoundError or CorruptError."""
    summary = repository.find(volume, snapshot)
    outcome, _ = read_outcome(repository.store, repository.config, summary.push)
    if outcome.root is None:
        raise NotFoundError(f"{summary.label} in {repository.store.name} was never committed")
    return outcome.root


def read_in_order(repository: Repository, root: Root) -> Generator[tuple[int, bytes], None, None]:
    """Yield (offset, content) of every chunk that is no hole, ascending; the rest is zeros.

    Raises CorruptError, naming the object, when a chunk cannot be verified: nothing from there on
    is yielded. Close the iterator when it is left before its end.
    """
    store, chunk_size = repository.store, repository.config.chunk_size
    label, size = root.summary.label, root.summary.size

    def load(refs: list[PageRef]) -> list[tuple[PageRef, Page]]:
        try:
            return read_pages(store, chunk_size, refs)
        except NotFoundError as error:
            raise CorruptError(f"{error}; {label} needs it") from None

    def fetch(window: _Window) -> list[tuple[int, bytes]]:
        found = []
        for planned in plan_ranges(window):
            where = describe_object(store, planned.key)
            try:
                data = store.get_range(planned.key, planned.offset, planned.length)
            except NotFoundError:
                raise CorruptError(f"{where} is missing; {label} needs it") from None
            for start, entry, chunk in planned.parts:
                packed = PackedChunk(entry.codec, data[start : start + entry.length], entry.digest)
                length = chunk_length(chunk, chunk_size, size)
                plain = unpack_chunk(packed, length, f"{where} at {entry.offset}")
                found.append((chunk * chunk_size, plain))
        return sorted(found)

    def windows(readers: Crew) -> Iterator[_Window]:
        most = max(1, WINDOW // chunk_size)
        window: _Window = []
        groups = group_pages(root.table, PAGES_PER_GROUP)
        for pages in readers.ordered(load, groups, PAGES_AHEAD):
            for ref, page in pages:
                for pair in _chunks(ref, page, root, chunk_size):
                    window.append(pair)
                    if len(window) == most:
                        yield window
                        window = []
        if window:
            yield window

    with (
        Crew(PAGES_AHEAD, "pages") as readers,
        Crew(THREADS, "stream") as crew,
        leaving_promptly(store),
    ):
        for chunks in crew.ordered(fetch, windows(readers), WINDOWS):
            yield from chunks


def _chunks(ref: PageRef, page: Page, root: Root, chunk_size: int) -> Iterator[tuple[int, Entry]]:
    first = ref.page * PAGE_ENTRIES
    for chunk, entry in enumerate(page, first):
        if entry is not None:
            if chunk_length(chunk, chunk_size, root.summary.size) <= 0:
                raise CorruptError(
                    f"page {ref.page} of {root.summary.label} has a chunk beyond the volume's end"
                )
            yield chunk, entry
