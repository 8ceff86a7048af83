"""The steps of a push and of a delete; ``collecting`` says why they are safe together.

A push, each step waiting for the store's acknowledgement of the one before:

1. PUT ``intents/<push>``, naming all that the push pins: its parent, and the donors, which are
   pushes of the same snapshot, or of the same line, that did not end (killed, most likely). A line
   is of one who pushes one snapshot after another, never two at once, as backups of a volume are.
2. End each donor, by its outcome ABORTED with our name in it, put if absent. Only the one push that
   did so may refer to the donor's segments: then our intent was there before the donor ended, so no
   collector ever saw the donor ended and unpinned.
3. Look for the parent's tombstone. There: give up, for another parent or none. A deleter puts the
   tombstone, and a collector looks at tombstones first and at intents then; so one of the two sees
   the other. Then read the parent's root.
4. Store segments and pages, under keys that begin with this push's id.
5. When all of them are acknowledged: PUT ``outcomes/<push>`` with the root in it, if absent. This
   is the commit. After an error or a refusal it is read back: it may be ours. When it is ABORTED, a
   collector or another push of this snapshot gave up on this one, and nothing is committed.
6. PUT the pointer, which only saves time to those who list.

A push that fails puts ABORTED itself, so that it pins nothing any longer; but for one whose store
did not answer, which may be committed, and one that was interrupted: these are gone on with when
the same snapshot is pushed again, and a collector gives up on them in time.

A delete puts the tombstone and removes the pointer. Tombstones stay for ever, as ABORTED outcomes
do: so whatever an old push or collector does when it wakes up, a dead push stays dead.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Protocol

from backends.errors import (
    CorruptError,
    InUseError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from snapshots.repository.layout import (
    INTENTS,
    OUTCOMES,
    POINTERS,
    TOMBSTONES,
    intent_key,
    outcome_key,
    parse_pointer_key,
    parse_push_key,
    pointer_key,
    tombstone_key,
)
from snapshots.repository.packing import ParentUnusableError
from snapshots.repository.pages import PageTable
from snapshots.repository.records import Intent, Outcome, Pointer, Root, Summary, Tombstone
from snapshots.repository.roots import finding_root
from snapshots.repository.steps import (
    OF_ONE_OBJECT,
    Delete,
    Exists,
    Get,
    List,
    Put,
    PutOnce,
    Steps,
    Upload,
)

MOST_DONORS = 1000  # so that an intent has room for them


class Snapshot(Protocol):
    """What a push must know of the snapshot that it stores."""

    @property
    def volume(self) -> str: ...
    @property
    def snapshot(self) -> str: ...
    @property
    def snapshot_id(self) -> str: ...
    @property
    def created(self) -> float: ...
    @property
    def size(self) -> int: ...


class Stored(Protocol):
    """What ``Upload`` results in; see ``SnapshotPacker``."""

    table: PageTable
    data: int
    stored: int
    uploaded: int
    retained: float  # until when all of it is under Object Lock; 0 without


def pushing(
    push: str,
    snapshot: Snapshot,
    parent: Summary | None,
    unfinished: list[Intent],
    line: str = "",
) -> Steps[tuple[Outcome, list[str]]]:
    """Store ``snapshot`` under the new id ``push``; returns the outcome, and warnings.

    ``unfinished`` are the intents of ``finding_unfinished``, which have no outcome. Raises
    ParentUnusableError when the parent was deleted meanwhile or is damaged.
    """
    donors = [donor for intent in unfinished for donor in (intent.push, *intent.donors)]
    intent = Intent(
        push,
        (parent.push,) if parent else (),
        snapshot.volume,
        snapshot.snapshot,
        snapshot.snapshot_id,
        time.time(),
        tuple(dict.fromkeys(donors))[:MOST_DONORS],
        line,
    )
    try:
        if not (yield PutOnce(intent_key(push), intent)):
            raise UnavailableError(f"the store refused the new key {intent_key(push)}: check it")
        taken = yield from _take_over(push, snapshot, unfinished, intent.donors)
        root = (yield from _pin(parent)) if parent else None
        stored = yield Upload(root, taken)
        outcome = yield from _commit(push, snapshot, parent, stored)
        assert outcome.root is not None
    except GeneratorExit:
        raise
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, UnavailableError):
            with suppress(StorageError):
                yield PutOnce(outcome_key(push), Outcome(push, None, type(error).__name__))
        raise
    return outcome, (yield from pointing(outcome.root.summary, Pointer(outcome)))


def pointing(summary: Summary, pointer: Pointer) -> Steps[list[str]]:
    """Put the snapshot's pointer; a failure is only worth a warning, returned."""
    try:
        yield Put(pointer_key(summary.volume, summary.snapshot, summary.push), pointer)
    except StorageError as error:
        return [f"{summary.label} is committed, but listing will be slower: {error}"]
    return []


def finding_unfinished(snapshot: Snapshot, line: str = "") -> Steps[list[Intent]]:
    """The intents of pushes of the very same snapshot, or of ``line``, that have not ended."""
    ended = {parse_push_key(OUTCOMES, key) for key, _ in (yield List(OUTCOMES))}
    ended |= {parse_push_key(TOMBSTONES, key) for key, _ in (yield List(TOMBSTONES))}
    begun = {parse_push_key(INTENTS, key) for key, _ in (yield List(INTENTS))}
    found: list[Intent] = []
    for push in sorted(push for push in begun - ended if push is not None):
        with suppress(*OF_ONE_OBJECT):
            intent = yield Get(intent_key(push), Intent)
            same = intent.snapshot_id == snapshot.snapshot_id or (line and intent.line == line)
            if same and intent.volume == snapshot.volume:
                found.append(intent)
    return found


def deleting(summary: Summary) -> Steps[None]:
    """Delete one snapshot. Its space is freed by a collection."""
    tombstone = Tombstone(summary.push, summary.volume, summary.snapshot, time.time())
    # Refused when another command deletes it too: it is deleted all the same.
    yield PutOnce(tombstone_key(summary.push), tombstone)
    yield Delete(pointer_key(summary.volume, summary.snapshot, summary.push))


def _take_over(
    push: str, snapshot: Snapshot, unfinished: list[Intent], pinned: tuple[str, ...]
) -> Steps[list[str]]:
    """End the unfinished pushes; returns those whose segments may be referred to.

    ``pinned`` are the donors that our intent names.
    """
    taken: list[str] = []
    for intent in unfinished:
        key = outcome_key(intent.push)
        won = yield PutOnce(key, Outcome(intent.push, None, "it was gone on with", push))
        if not won:
            outcome = yield Get(key, Outcome)
            if outcome.root is not None and intent.snapshot_id == snapshot.snapshot_id:
                raise InUseError(
                    f"{snapshot.volume}@{snapshot.snapshot} was pushed by somebody else meanwhile: "
                    "push again to see that it is there"
                )
            won = outcome.taken_by == push  # our own, of which no answer had come
        if not won or intent.push not in pinned:
            continue
        taken.append(intent.push)
        # It had taken over others; each of them must have been ended by one that is ours now.
        for donor in intent.donors:
            with suppress(NotFoundError, CorruptError):
                outcome = yield Get(outcome_key(donor), Outcome)
                if donor in pinned and outcome.taken_by in taken and donor not in taken:
                    taken.append(donor)
    return taken


def _pin(parent: Summary) -> Steps[Root]:
    """Make sure that the parent, which our intent names, is live; returns its root."""
    if (yield Exists(tombstone_key(parent.push))):
        raise ParentUnusableError("it was deleted meanwhile")
    try:
        return (yield from finding_root(parent.push)).root
    except (NotFoundError, CorruptError) as error:
        raise ParentUnusableError(str(error)) from error


def _commit(
    push: str, snapshot: Snapshot, parent: Summary | None, stored: Stored
) -> Steps[Outcome]:
    label = f"{snapshot.volume}@{snapshot.snapshot}"
    pointers = yield List(f"{POINTERS}{snapshot.volume}/{snapshot.snapshot}/")
    for parsed in filter(None, (parse_pointer_key(key) for key, _ in pointers)):
        there = yield Exists(outcome_key(parsed[2]))
        if there and not (yield Exists(tombstone_key(parsed[2]))):
            raise InUseError(
                f"{label} was pushed by somebody else meanwhile: push again to see whether it is "
                "the same snapshot"
            )
    root = Root(
        Summary(
            volume=snapshot.volume,
            snapshot=snapshot.snapshot,
            snapshot_id=snapshot.snapshot_id,
            push=push,
            created=snapshot.created,
            pushed=time.time(),
            size=snapshot.size,
            data=stored.data,
            stored=stored.stored,
            uploaded=stored.uploaded,
            parent=parent.snapshot if parent else None,
            parent_push=parent.push if parent else None,
        ),
        stored.table,
        stored.retained,
    )
    outcome = Outcome(push, root)
    key = outcome_key(push)
    failure: StorageError | None = None
    try:
        if (yield PutOnce(key, outcome)):
            return outcome
    except StorageError as error:
        failure = error
    # Nobody but us puts COMMITTED there.
    found: Any = None
    try:
        found = yield Get(key, Outcome)
    except StorageError as error:
        failure = failure or error
    if found is not None and found.root is not None:
        return outcome
    if found is not None:
        raise InUseError(
            f"the push of {label} was given up by a collection, or gone on with by another push of "
            "the same snapshot or volume: push again"
        )
    raise UnavailableError(
        f"whether {label} was committed is not known; push it again to find out: {failure}"
    ) from failure
