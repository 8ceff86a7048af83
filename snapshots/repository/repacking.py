"""The steps of a repack: segments of which little is needed are freed, by copying that little.

A segment can only be sparse when the snapshot of its own push is deleted, so only those are looked
at. Where it is worth it (see ``WORTH``), the chunks still needed are copied, the pages that refer
to them are written anew, and every snapshot of the volume that has such a page gets a new root:

1. PUT the intent of a push of the collector's own, which pins all these snapshots.
2. Leave out those that have a tombstone by now; read the newest roots of the others.
3. PUT segments and pages, under this push's id; then ``roots/<snapshot>/<generation>/<push>``.
4. PUT the outcome, if absent: REPACKED. From now on these roots are the newest. An older root, and
   what only that refers to, is dead, but for pushes under way that pin the snapshot.

Of two collectors that repack a snapshot at once both commit; the greater key is the newest, for
ever. When the last root of a repack is dead, its push gets a tombstone and is collected as any.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from backends.errors import StorageError, UnavailableError
from snapshots.repository.layout import intent_key, outcome_key, root_key, tombstone_key
from snapshots.repository.pages import Entry, PageRef, PageTable
from snapshots.repository.records import Intent, Outcome, Repacked
from snapshots.repository.roots import finding_root
from snapshots.repository.steps import (
    Each,
    Exists,
    Get,
    Move,
    PagesOf,
    Put,
    PutOnce,
    Steps,
    raise_error,
)

SPARSE = 0.5  # part of a segment's bytes that is needed, at most
WORTH = 1.5  # bytes to be freed for each byte to be written, at least
MOST_SNAPSHOTS = 2000  # of one volume, that an intent has room for
MOST_PAGES = 4  # decoded at once by a thread: some 200 KiB each
MOST_BYTES = 256 << 20  # to be copied at once

Segment = tuple[str, int]
Place = tuple[str, int, int]  # of a page: push, number, offset


@dataclass
class Candidates:
    """What a collection saw of the volume ``volume`` that repacking may save.

    ``segments`` have their whole length in bytes, ``pages`` are those that refer to them,
    ``snapshots`` are all that are live, with the length of their outcomes.
    """

    volume: str
    segments: dict[Segment, int] = field(default_factory=dict)
    groups: list[list[PageRef]] = field(default_factory=list)
    snapshots: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RepackReport:
    """``freed`` bytes will be given back by the next collection; ``written`` bytes were put."""

    segments: int
    freed: int
    written: int


def repacking(push: str, candidates: Candidates) -> Steps[RepackReport | None]:
    """Repack under the new id ``push``; None when it is not worth it, or came to nothing."""
    if not candidates.segments or len(candidates.snapshots) > MOST_SNAPSHOTS:
        return None
    chosen = yield from _choose(candidates)
    if chosen is None:
        return None
    entries, refs, report = chosen
    intent = Intent(push, tuple(candidates.snapshots), candidates.volume, "repack", "", time.time())
    try:
        if not (yield PutOnce(intent_key(push), intent)):
            raise UnavailableError(f"the store refused the new key {intent_key(push)}: check it")
        roots = yield from _pin(candidates.snapshots, {_place(ref) for ref in refs})
        done = bool(roots)
        if done:
            moved: dict[Place, PageRef] = yield Move(push, entries, refs)
            yield Each(_new_roots(push, roots, moved), raise_error)
            done = yield from _commit(push)
    except GeneratorExit:
        raise
    except BaseException as error:
        if not isinstance(error, UnavailableError):
            yield from _abort(push)
        raise
    if not done:
        yield from _abort(push)
        return None
    return report


def _choose(
    candidates: Candidates,
) -> Steps[tuple[list[Entry], list[PageRef], RepackReport] | None]:
    """Which chunks to copy and pages to write anew."""
    needed: dict[Entry, None] = {}
    using: dict[Place, tuple[PageRef, set[Segment]]] = {}
    failed = False

    def take(_: PagesOf, result: Any) -> None:
        nonlocal failed
        if isinstance(result, StorageError):
            failed = True
            return
        for ref, page in result:
            for piece in (piece for entry in page if entry for piece in entry.pieces()):
                if piece[:2] in candidates.segments:
                    needed[piece] = None
                    using.setdefault(_place(ref), (ref, set()))[1].add(piece[:2])

    few = (group[start : start + MOST_PAGES] for group in candidates.groups
           for start in range(0, len(group), MOST_PAGES))  # fmt: skip
    yield Each((PagesOf(group) for group in few), take)
    if failed:
        return None  # somebody else is at it, or there is damage
    live: dict[Segment, int] = {}
    for entry in needed:
        live[entry[:2]] = live.get(entry[:2], 0) + entry.length
    chosen: set[Segment] = set()
    copied = 0
    for segment in sorted(live, key=lambda found: live[found] / candidates.segments[found]):
        if live[segment] > SPARSE * candidates.segments[segment]:
            break
        if copied + live[segment] <= MOST_BYTES:
            chosen.add(segment)
            copied += live[segment]
    refs = [ref for ref, segments in using.values() if segments & chosen]
    written = copied + sum(ref.length for ref in refs) + sum(candidates.snapshots.values())
    freed = sum(candidates.segments[segment] for segment in chosen)
    if not chosen or freed < WORTH * written:
        return None
    entries = sorted((piece for piece in needed if piece[:2] in chosen), key=itemgetter(0, 1, 2))
    return entries, refs, RepackReport(len(chosen), freed, written)


def _pin(snapshots: dict[str, int], places: set[Place]) -> Steps[dict[str, Repacked]]:
    """The newest roots of the snapshots that are still live and have one of these pages."""
    deleted: set[str] = set()

    def take(step: Exists, result: Any) -> None:
        raise_error(step, result)
        if result:
            deleted.add(step.key.rpartition("/")[2])

    yield Each((Exists(tombstone_key(push)) for push in snapshots), take)
    roots: dict[str, Repacked] = {}
    for push in snapshots:
        if push not in deleted:
            root = yield from finding_root(push)
            if any(_place(ref) in places for ref in root.root.table):
                roots[push] = root
    return roots


def _new_roots(push: str, roots: dict[str, Repacked], moved: dict[Place, PageRef]) -> Iterator[Put]:
    for snapshot, old in roots.items():
        table = PageTable()
        for ref in old.root.table:
            table.append(moved.get(_place(ref), ref))
        generation = old.generation + 1
        root = Repacked(push, generation, replace(old.root, table=table))
        yield Put(root_key(snapshot, generation, push), root)


def _commit(push: str) -> Steps[bool]:
    key = outcome_key(push)
    try:
        if (yield PutOnce(key, Outcome(push, None, repacked=True))):
            return True
    except StorageError as error:
        failure: StorageError | None = error
    else:
        failure = None
    try:
        outcome = yield Get(key, Outcome)
    except StorageError:
        raise UnavailableError(f"whether a repack was committed is not known: {failure}") from None
    return bool(outcome.repacked)


def _abort(push: str) -> Steps[None]:
    with suppress(StorageError):
        yield PutOnce(outcome_key(push), Outcome(push, None, "the repack came to nothing"))


def _place(ref: PageRef) -> Place:
    return ref.push, ref.number, ref.offset
