"""Stream: read a snapshot's data in the order of the volume, every chunk verified.

For what can only be written from front to back. Pages are fetched ahead, a few groups at a time;
their chunks are cut into windows of at most 4 MiB, and several threads fetch a window each, in as
few ranges as there are. Memory: WINDOWS windows, plain and as stored, and the entries of
PAGES_AHEAD groups of pages, about 160 MiB at most, plus 64 bytes for each page of the snapshot.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from snapshots.repository.losses import Losses
from snapshots.repository.pages import Entry
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import group_pages, plan_ranges
from snapshots.repository.records import Root
from snapshots.repository.repository import Repository
from snapshots.repository.roots import find_root
from snapshots.repository.snapshot_reader import SnapshotReader

THREADS = 8
WINDOW = 4 << 20  # plain bytes that one thread fetches at a time
WINDOWS = 2 * THREADS
PAGES_AHEAD = 4
PAGES_PER_GROUP = 16

_Window = list[tuple[int, Entry]]


def read_root(repository: Repository, volume: str, snapshot: str) -> Root:
    """The manifest of a snapshot; NotFoundError or CorruptError."""
    summary = repository.find(volume, snapshot)
    return find_root(repository.store, repository.config, summary.push)


def read_in_order(
    repository: Repository, root: Root, losses: Losses | None = None
) -> Generator[tuple[int, bytes], None, None]:
    """Yield (offset, content) of every chunk that is no hole, ascending; the rest is zeros.

    Raises CorruptError, naming the object, when a chunk cannot be verified: nothing from there on
    is yielded. With ``losses`` it is noted there and left out. Close the iterator when it is left
    before its end.
    """
    store, chunk_size = repository.store, repository.config.chunk_size
    reader = SnapshotReader(store, repository.config, root, losses)

    def fetch(window: _Window) -> list[tuple[int, bytes]]:
        found = [pair for planned in plan_ranges(window) for pair in reader.fetch(planned)]
        return sorted((chunk * chunk_size, plain) for chunk, plain in found)

    def windows(readers: Crew) -> Iterator[_Window]:
        most = max(1, WINDOW // chunk_size)
        window: _Window = []
        groups = group_pages(root.table, PAGES_PER_GROUP)
        for pages in readers.ordered(reader.load, groups, PAGES_AHEAD):
            for ref, page in pages:
                for pair in reader.chunks(ref, page):
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
