"""Object Lock: what keeps a snapshot restorable for as long as its repository promises.

The promise of a repository with the period N: for N seconds after a push was acknowledged (reported
as done) nobody can make its snapshot unrestorable, whoever has the credentials included: not by
deleting, overwriting, tombstones, aborted outcomes, nor a garbage collection. What was whole in the
bucket as it was then can be read as it was then, see backends/s3_versions.py.

A snapshot refers to its own objects and to segments and pages of older pushes, so these must be
retained as long as it:

- Every object is put with a retention of N and a half (``ObjectLock.retention``).
- A root says until when, at least, all that it refers to is retained (``Root.retained``). That is
  the least of what its push knows of: when it began to put its own objects, what the parent's
  root says, and nothing of segments of a push that it went on with.
- When that is less than N and MARGIN from now, the push, before its commit, extends all that the
  snapshot refers to, its own objects included, to N and a half from now.

So of a volume that is pushed daily every object is extended once in half of N, by one push, with
one request each; the others extend nothing. The outcome is put last, so it is retained the longest.
``config`` and the keys, which every snapshot needs, are extended by every push.

MARGIN covers the time from here to the acknowledgement, and clocks of hosts that differ: S3 takes
no request from one that is wrong by more than 15 minutes. Who was asleep in between extends again
before it says that it is done.

What a push trusts: its parent, as every push does. Objects of the parent that somebody has deleted
or overwritten before are not seen here, unless they are extended; ``verify`` sees them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from backends.locking import locking
from backends.objects import ObjectStore
from snapshots.repository.layout import CONFIG_KEY, KEYS, outcome_key, pages_key, segment_key
from snapshots.repository.pages import PageTable
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import group_pages, read_segments_of
from snapshots.repository.records import Config, Root
from snapshots.repository.steps import Upload

THREADS = 8
MARGIN = 3600.0  # seconds
_PAGES_PER_GROUP = 16


def hold(store: ObjectStore, config: Config) -> None:
    """Let ``store`` retain all that is put, if the repository wants it. InvalidError."""
    if config.object_lock is not None:
        locking(store).hold(config.object_lock.retention)


def retain_uploaded(
    store: ObjectStore, config: Config, step: Upload, table: PageTable, begun: float
) -> float:
    """Retain all that a push refers to which did ``step`` and began ``begun``: ``Root.retained``.

    Raises NotFoundError or CorruptError when something of that is not there.
    """
    if config.object_lock is None:
        return 0.0
    floor = begun + config.object_lock.retention.seconds
    if step.parent is not None:
        floor = min(floor, step.parent.retained)
    if step.donors:
        floor = 0.0
    return _retain(store, config, table, floor, MARGIN, ())


def retain_committed(store: ObjectStore, config: Config, root: Root) -> None:
    """Before a push is acknowledged: extend again what would not be retained for long enough."""
    lock = config.object_lock
    if lock is not None and root.retained < time.time() + lock.seconds:
        also = (outcome_key(root.summary.push),)
        _retain(store, config, root.table, root.retained, 0.0, also)


def _retain(
    store: ObjectStore,
    config: Config,
    table: PageTable,
    floor: float,
    margin: float,
    also: tuple[str, ...],
) -> float:
    lock, locker = config.object_lock, locking(store)
    assert lock is not None

    def extend(key: str) -> None:
        locker.extend(key, until)

    with (
        Crew(THREADS, "retain") as crew,
        Crew(THREADS, "pages") as readers,
        leaving_promptly(store),
    ):
        while floor < time.time() + lock.seconds + margin:
            floor = until = time.time() + lock.retention.seconds
            keys = (*also, *_page_objects(table))
            for _ in crew.ordered(extend, keys, 4 * THREADS):
                pass
            for _ in crew.ordered(extend, _segments(store, table, readers), 4 * THREADS):
                pass
        until = time.time() + lock.retention.seconds  # never less than ``floor``
        opening = [CONFIG_KEY, *(key for key, _ in store.list(KEYS))]
        for _ in crew.ordered(extend, opening, THREADS):
            pass
    return floor


def _page_objects(table: PageTable) -> list[str]:
    return [pages_key(*place) for place in sorted({(ref.push, ref.number) for ref in table})]


def _segments(store: ObjectStore, table: PageTable, readers: Crew) -> Iterator[str]:
    """The keys of all segments that the pages refer to; memory: some 200 bytes for each."""
    seen: set[tuple[str, int]] = set()
    groups = group_pages(table, _PAGES_PER_GROUP)
    for found in readers.ordered(lambda refs: read_segments_of(store, refs), groups, 2 * THREADS):
        for segment in found.keys() - seen:
            seen.add(segment)
            yield segment_key(*segment)
