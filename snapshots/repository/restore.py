"""Restore: write a snapshot's chunks, each verified, into a sink.

Pages are fetched ahead, a few at a time; the chunks of a group of pages are sorted by where they
are and fetched in ranges by several threads, which verify, and write what is not zero. Memory:
THREADS ranges of 4 MiB, a plain chunk for each, and the entries of PAGES_AHEAD groups of pages,
about 60 MiB, plus 64 bytes for each page of the snapshot.

What the sink has from an earlier restore of the same snapshot that was interrupted is not fetched.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from backends.errors import NoSpaceError, StorageError
from backends.objects import ObjectStore
from snapshots.names import BLOCK_SIZE
from snapshots.repository.interfaces import Progress, Sink
from snapshots.repository.losses import Hole, Losses
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import Range, group_pages, plan_ranges
from snapshots.repository.records import Config, Root
from snapshots.repository.regions import chunk_length
from snapshots.repository.snapshot_reader import SnapshotReader

THREADS = 8
PAGES_AHEAD = 4
PAGES_PER_GROUP = 16

_ZERO_BLOCK = bytes(BLOCK_SIZE)


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did. Sizes in bytes."""

    volume: str
    snapshot: str
    size: int
    written: int  # what was not zero
    fetched: int  # read from the store's segments
    requests: int  # range requests for them
    seconds: float
    resumed: int = 0  # of chunks that an interrupted restore had brought
    holes: list[Hole] = field(default_factory=list)  # what could not be had, when that was allowed


def restore_root(
    store: ObjectStore,
    config: Config,
    root: Root,
    sink: Sink,
    progress: Progress | None,
    *,
    skip_damaged: bool = False,
) -> RestoreReport:
    """Write all that is not zero in the snapshot into ``sink``, in no particular order.

    With ``skip_damaged`` all that can be verified; the report has the rest. Otherwise it raises
    CorruptError or NotFoundError, naming the object, when something cannot be verified; the sink
    then holds a part of the snapshot, all of it verified.
    """
    started = time.monotonic()
    summary = root.summary
    losses = Losses() if skip_damaged else None
    reader = SnapshotReader(store, config, root, losses)

    def fetch(planned: Range) -> tuple[Range, int]:
        held = 0
        for chunk, plain in reader.fetch(planned):
            offset = chunk * config.chunk_size
            held += _write(sink, offset, plain)
            _complete(sink, offset, len(plain))
        return planned, held

    resumed = 0

    def is_missing(chunk: int) -> bool:
        nonlocal resumed
        length = chunk_length(chunk, config.chunk_size, summary.size)
        here = sink.holds(chunk * config.chunk_size, length)
        resumed += length if here else 0
        return not here

    total = sum(ref.chunks for ref in root.table) * config.chunk_size
    done = written = fetched = requests = 0
    with (
        Crew(PAGES_AHEAD, "pages") as readers,
        Crew(THREADS, "restore") as crew,
        leaving_promptly(store),
    ):

        def ranges() -> Iterator[Range]:
            groups = group_pages(root.table, PAGES_PER_GROUP)
            for pages in readers.ordered(reader.load, groups, PAGES_AHEAD):
                yield from plan_ranges(
                    (chunk, entry)
                    for ref, page in pages
                    for chunk, entry in reader.chunks(ref, page)
                    if is_missing(chunk)
                )

        for planned, bytes_written in crew.ordered(fetch, ranges(), 2 * THREADS):
            written += bytes_written
            patches = (part.entry.stored - part.entry.length for part in planned.parts)
            fetched += planned.length + sum(patches)
            requests += 1
            done += len(planned.parts) * config.chunk_size
            if progress:
                progress(done + resumed, max(total, done + resumed))
    return RestoreReport(
        summary.volume,
        summary.snapshot,
        summary.size,
        written,
        fetched,
        requests,
        time.monotonic() - started,
        resumed,
        losses.holes(config.chunk_size, summary.size) if losses else [],
    )


def _write(sink: Sink, offset: int, plain: bytes) -> int:
    """Write the runs of blocks that are not zero; returns their bytes."""
    written = 0
    start: int | None = None
    for position in range(0, len(plain) + BLOCK_SIZE, BLOCK_SIZE):
        block = plain[position : position + BLOCK_SIZE]
        holds = bool(block) and block != _ZERO_BLOCK[: len(block)]
        if holds and start is None:
            start = position
        elif not holds and start is not None:
            piece = plain[start:position]
            _write_piece(sink, offset + start, piece)
            written += len(piece)
            start = None
    return written


def _write_piece(sink: Sink, offset: int, piece: bytes) -> None:
    try:
        sink.write(offset, piece)
    except OSError as error:
        what = f"cannot write {len(piece)} bytes at offset {offset} of the new volume"
        raise _explained(what, error) from error


def _complete(sink: Sink, offset: int, length: int) -> None:
    try:
        sink.complete(offset, length)
    except OSError as error:
        raise _explained("cannot keep what was written to the new volume", error) from error


def _explained(what: str, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"{what}: no space left; free some and restore again")
    return StorageError(f"{what}: {error.strerror or error}; check the disk")
