"""What a repository holds, as its keys tell.

A snapshot is live when its outcome is there, committed, and its tombstone is not. A pointer saves
reading the outcome, which may be large; where a pointer is missing (a push was killed right after
its commit) or damaged, the outcome is read.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from itertools import chain

from backends.errors import CorruptError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.insisting import insist
from snapshots.repository.layout import (
    OUTCOME_LIMIT,
    OUTCOMES,
    POINTERS,
    RECORD_LIMIT,
    ROOTS,
    TOMBSTONES,
    outcome_key,
    parse_pointer_key,
    parse_push_key,
    parse_root_key,
    tombstone_key,
)
from snapshots.repository.pipeline import Crew
from snapshots.repository.records import Config, Outcome, Summary

THREADS = 8

logger = logging.getLogger(__name__)


def describe_object(store: ObjectStore, key: str) -> str:
    """How errors name an object."""
    return f"object {key} in {store.name}"


def read_outcome(store: ObjectStore, config: Config, push: str) -> tuple[Outcome, int]:
    """Return the outcome and its length in bytes; NotFoundError or CorruptError otherwise."""
    key = outcome_key(push)
    where = describe_object(store, key)

    def attempt() -> tuple[Outcome, int]:
        record = store.get(key, OUTCOME_LIMIT)
        return Outcome.decode(record, push, config.chunk_size, where), len(record)

    return insist(attempt)


def read_pointer(store: ObjectStore, key: str) -> Summary:
    """What a pointer says; NotFoundError or CorruptError otherwise."""
    where = describe_object(store, key)
    return insist(lambda: Summary.decode_pointer(store.get(key, RECORD_LIMIT), where))


def list_pushes(store: ObjectStore, prefix: str) -> set[str]:
    """The push ids for which there is an outcome, an intent or a tombstone."""
    pushes = (parse_push_key(prefix, key) for key, _ in store.list(prefix))
    return {push for push in pushes if push is not None}


def _list_repacks(store: ObjectStore) -> set[str]:
    """Pushes of collectors, which are no snapshots; their outcomes need not be read."""
    parsed = (parse_root_key(key) for key, _ in store.list(ROOTS))
    return {names[2] for names in parsed if names is not None}


def list_pointers(store: ObjectStore, under: str = "") -> dict[str, str]:
    """The keys of the pointers below ``under`` (``volume/`` or ``volume/snapshot/``), by push."""
    pointers = {}
    for key, _ in store.list(POINTERS + under):
        parsed = parse_pointer_key(key)
        if parsed is not None:
            pointers[parsed[2]] = key
    return pointers


def list_snapshots(store: ObjectStore, config: Config, volume: str | None = None) -> list[Summary]:
    """The live snapshots, of one volume or of all, by volume and then oldest first.

    One whose records cannot be read is left out with a warning; verify tells more.
    """
    return in_order(walk_snapshots(store, config, volume))


def walk_snapshots(
    store: ObjectStore,
    config: Config,
    volume: str | None = None,
    snapshot: str | None = None,
    *,
    only: bool = False,
) -> Generator[Summary, None, None]:
    """Yield the live snapshots: those called ``snapshot`` first, then by name, last name first.

    Names mostly have the time in them, so who looks for the newest has it soon, and may stop.
    With ``only`` no others than those called ``snapshot`` are yielded.
    """
    # Outcomes before tombstones: a snapshot deleted meanwhile is then never shown as live.
    outcomes = list_pushes(store, OUTCOMES)
    pointers = list_pointers(store)
    tombstones = list_pushes(store, TOMBSTONES)
    live = outcomes - tombstones - _list_repacks(store)
    # Only their outcomes tell what they are. A pointer comes after the outcome: where that was not
    # listed, it was put meanwhile, or the listing was garbled on its way.
    unlisted = pointers.keys() - outcomes - tombstones
    unknown = sorted((live - pointers.keys()) | unlisted)
    called: list[str] = []
    others: list[str] = []
    for push in sorted(live & pointers.keys(), key=pointers.__getitem__, reverse=True):
        parsed = parse_pointer_key(pointers[push])
        if parsed is not None and volume in (None, parsed[0]):
            (called if parsed[1] == snapshot else others).append(push)

    def load(push: str) -> Summary | None:
        return _load_summary(store, config, push, pointers.get(push) if push in live else None)

    with Crew(THREADS, "list") as crew:
        first = [item for item in crew.ordered(load, [*unknown, *called], 4 * THREADS) if item]
        first.sort(key=lambda item: item.snapshot != snapshot)
        rest = crew.ordered(load, () if only else others, 4 * THREADS)
        for summary in chain(first, rest):
            if summary is None or volume not in (None, summary.volume):
                continue
            if not only or summary.snapshot == snapshot:
                yield summary


def in_order(summaries: Iterable[Summary]) -> list[Summary]:
    return sorted(summaries, key=lambda item: (item.volume, item.created, item.pushed, item.push))


def _load_summary(
    store: ObjectStore, config: Config, push: str, pointer: str | None
) -> Summary | None:
    if pointer is not None:
        try:
            summary = read_pointer(store, pointer)
            if parse_pointer_key(pointer) == (summary.volume, summary.snapshot, summary.push):
                return summary
        except (CorruptError, NotFoundError):
            pass  # the outcome tells
    try:
        outcome, length = read_outcome(store, config, push)
    except NotFoundError:  # collected meanwhile
        return None
    except CorruptError as error:
        logger.warning("a snapshot is left out of the list: %s", error)
        return None
    found = committed_summary(outcome, length)
    if found is not None and store.size(tombstone_key(push)) is not None:
        return None  # deleted meanwhile, or the listing of tombstones was garbled
    return found


def committed_summary(outcome: Outcome, length: int) -> Summary | None:
    """The summary of a committed outcome of ``length`` bytes, None for an aborted one."""
    if outcome.root is None:
        return None
    summary = outcome.root.summary
    return Summary(**{**vars(summary), "uploaded": summary.uploaded + length})
