"""The steps of a collection: find what is dead, plan, store the plan, delete.

Any number of hosts push, delete, repack and collect at once. No step trusts a clock, and none needs
a lock; what makes it safe is that *dead data stays dead*, and one order:

    What kills is listed before the intents, what saves after them.

A push is settled when its outcome or its tombstone is there; both kinds of objects are final, and
while an outcome may be removed, the tombstone or the ABORTED outcome stays for ever. What kills:
tombstones, outcomes (they end what a push had pinned, and leave what it stored to itself), and the
roots that repacking put in place of older ones. What saves: intents, which pin, and after them
outcomes and roots again, which refer.

An object is kept when

- its push was not seen settled by the first listing of outcomes; or
- a live snapshot's root refers to it: committed in the second listing and without a tombstone in
  the one at the beginning; the newest root that was there before the intents, and any newer; or
- the intent of a push that was not seen settled pins its push, or pins a snapshot any root of which
  refers to it.

Everything else is dead for ever. For let a push Q refer to such an object later. It took the
reference from a snapshot S or a donor that it pinned; and its intent was there before it looked for
the tombstone of S, read the newest root of S, or ended the donor.

- Q's intent was there when we listed intents, and Q not settled before: we kept all that it pins.
- Q was settled before: it is live, and we kept all that it refers to; or it is dead, and what died
  with it is nothing that Q can revive.
- Q's intent came after. Then so did its look at the tombstone: S had none when we looked, before.
  S was committed by then, so either we saw its outcome and took it for live, with every root that Q
  could have read, or S was a push under way when we listed intents (and what it can refer to was
  kept, by this very argument) or began later still, like Q. A donor that Q ended was not settled
  when we listed outcomes first, so what it had stored, and what it pinned, was kept.

So a plan may be carried out at any time, by anyone, in any order, twice: a collector that was
killed is finished by the next; one that wakes up after a year deletes what is gone already. Keys
are never used again, so nothing new can have come in their place. A push or a store's delayed
request may write an object again after its deletion; it is under the prefix of a push that is
settled for good, and the next collection finds it.

Only a push that is given up asks the clock, and all it can cost is that push: it is ended by its
outcome ABORTED, put if absent, so it cannot commit afterwards.

Where something cannot be read nothing is deleted. What is gone while we look was collected by
somebody else, or superseded: look again. So do we when a listing of what saves may have been
garbled on its way, for over plain HTTP nothing protects it: when a key in it is none of ours (if it
is there the next time, too, it is a stranger's), an outcome is not in the second listing any more,
or a live snapshot has no root. An id that became another one is missing when it is read.

Memory: some 400 bytes for each different page of the live snapshots, 200 for each object listed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from backends.errors import CorruptError, NotFoundError, StorageError
from snapshots.repository.interfaces import Progress
from snapshots.repository.layout import (
    INTENTS,
    OUTCOMES,
    PAGES,
    PLAN_KEYS,
    PLANS,
    POINTERS,
    ROOTS,
    SEGMENTS,
    TOMBSTONES,
    intent_key,
    new_push_id,
    noted_object,
    outcome_key,
    pages_key,
    parse_data_key,
    parse_pointer_key,
    parse_push_key,
    parse_root_key,
    plan_key,
    segment_key,
    tombstone_key,
)
from snapshots.repository.pages import PageRef
from snapshots.repository.reading import group_pages
from snapshots.repository.records import (
    Intent,
    Outcome,
    Plan,
    Repacked,
    Root,
    Tombstone,
)
from snapshots.repository.repacking import SPARSE, Candidates, RepackReport, repacking
from snapshots.repository.steps import (
    Delete,
    Each,
    Get,
    List,
    Put,
    PutOnce,
    SegmentsOf,
    Steps,
    raise_error,
)

DEFAULT_GIVE_UP_AFTER = 7 * 24 * 3600.0  # seconds
LOOKS = 4  # at what is missing, until it is taken for damage rather than for another's work
_PAGES_PER_REQUEST = 64

Sizes = dict[str, int]


@dataclass(frozen=True)
class CollectReport:
    """What a collection did, or would do in a dry run. ``freed`` in bytes.

    ``live`` counts the snapshots, ``under_way`` the pushes that have not ended and whose snapshots
    and segments are kept, ``given_up`` those that this run ended, ``finished_plans`` what earlier
    runs had left to do. ``repacked`` counts segments whose needed chunks were copied, ``written``
    bytes for them; ``to_be_freed`` bytes are given back by the next collection.
    """

    live: int
    under_way: int
    given_up: int
    finished_plans: int
    objects: int
    freed: int
    repacked: int
    to_be_freed: int
    written: int
    dry_run: bool
    seconds: float


@dataclass
class View:
    """What the listings showed, in the order in which they were made."""

    data: dict[str, Sizes]  # segments and pages objects, by push
    pointers: dict[str, Sizes]  # by push
    deleted: dict[str, int]  # tombstones
    ended: dict[str, int]  # outcomes before the intents
    newer_roots: Sizes  # before the intents
    intents: dict[str, int]
    outcomes: dict[str, int]  # after the intents
    roots: Sizes  # after the intents
    strange: set[str]  # what was listed among what saves, and is none of our keys

    @property
    def under_way(self) -> list[str]:
        return [push for push in self.intents if not self.is_settled(push)]

    def is_live(self, push: str) -> bool:
        """Whether it is a snapshot that is not deleted, or a repack of which a root is needed."""
        return push in self.outcomes and push not in self.deleted

    def is_settled(self, push: str) -> bool:
        return push in self.ended or push in self.deleted


@dataclass
class Marks:
    """What must be kept. ``missing`` and ``unreadable`` say why that is not sure.

    ``segments`` tells for each segment how many bytes of it are needed, at least, and ``suspects``
    which pages need those that no live snapshot has written.
    """

    keys: set[str] = field(default_factory=set)
    pinned: set[str] = field(default_factory=set)  # pushes
    live: dict[str, str] = field(default_factory=dict)  # snapshots, with their volumes
    repacks: set[str] = field(default_factory=set)  # pushes of collectors, committed
    roots: set[str] = field(default_factory=set)  # keys of those needed
    newest: set[tuple[str, int, int]] = field(default_factory=set)  # pages of newest roots
    pages: dict[tuple[str, int, int], PageRef] = field(default_factory=dict)
    volumes: dict[str, str] = field(default_factory=dict)  # by push of a page
    segments: dict[tuple[str, int], int] = field(default_factory=dict)  # see below
    suspects: dict[tuple[str, int], list[list[PageRef]]] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)  # volumes of which an old root is pinned
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def note(self, error: StorageError) -> None:
        missing = isinstance(error, NotFoundError)
        (self.missing if missing else self.unreadable).append(str(error))


def collecting(
    give_up_after: float,
    *,
    dry_run: bool = False,
    repack: bool = True,
    notes: Sizes | None = None,
    progress: Progress | None = None,
) -> Steps[CollectReport]:
    """Delete what nothing needs; give up on pushes that began ``give_up_after`` seconds ago.

    ``notes`` are the notes of damage that there were before: they go with what they are about.

    Then, with ``repack``, copy what is left of sparse segments: the next collection frees these.

    Raises CorruptError, and has deleted nothing that it found itself, where something that says
    what is needed cannot be read.
    """
    started = time.monotonic()
    finished = 0 if dry_run else (yield from _finish_plans())
    given_up = 0 if dry_run else (yield from _give_up(give_up_after))
    strangers: set[str] = set()
    for _ in range(LOOKS):
        view = yield from look()
        marks = yield from mark(view)
        marks.missing += sorted(f"what is {key}?" for key in view.strange - strangers)
        strangers |= view.strange
        if not marks.missing:
            break
    problems = marks.unreadable + marks.missing
    if problems:
        raise CorruptError(
            f"nothing was collected, because what is needed cannot be told: {problems[0]}; "
            "'nbdserve repo verify' names the snapshots that it harms: delete these"
        )
    dead = list_dead(view, marks) | list_dead_notes(view, marks, notes or {})
    repacked: list[RepackReport] = []
    if not dry_run:
        for push in list_finished(view, marks):
            yield PutOnce(tombstone_key(push), Tombstone(push, "repack", "repack", time.time()))
        yield from _carry_out(dead, progress)
        for candidates in list_candidates(view, marks) if repack else ():
            report = yield from repacking(new_push_id(), candidates)
            if report is not None:
                repacked.append(report)
    return CollectReport(
        live=len(marks.live),
        under_way=len(view.under_way),
        given_up=given_up,
        finished_plans=finished,
        objects=len(dead),
        freed=sum(dead.values()),
        repacked=sum(report.segments for report in repacked),
        to_be_freed=sum(report.freed for report in repacked),
        written=sum(report.written for report in repacked),
        dry_run=dry_run,
        seconds=time.monotonic() - started,
    )


def _finish_plans() -> Steps[int]:
    """Do what earlier collectors had planned and perhaps not done."""
    finished = 0
    for key, _ in (yield List(PLANS)):
        if parse_push_key(PLANS, key) is None:
            continue
        try:
            plan = yield Get(key, Plan)
        except NotFoundError:
            continue  # its own collector has just finished it
        except CorruptError:
            plan = Plan("", ())  # it is found again what it named
        yield Each((Delete(dead) for dead in plan.keys), raise_error)
        yield Delete(key)
        finished += 1
    return finished


def _give_up(after: float) -> Steps[int]:
    """End the pushes that began too long ago; the only use of a clock."""
    latest = time.time() - after
    deleted = _by_push(TOMBSTONES, (yield List(TOMBSTONES)))
    outcomes = _by_push(OUTCOMES, (yield List(OUTCOMES)))
    intents = _by_push(INTENTS, (yield List(INTENTS)))
    given_up = 0
    for push in intents.keys() - outcomes.keys() - deleted.keys():
        try:
            begun = (yield Get(intent_key(push), Intent)).started
        except NotFoundError:
            continue
        except CorruptError as error:
            if after:
                raise CorruptError(
                    f"nothing was collected, because what a push needs cannot be told: {error}; "
                    "when no push is under way, give up on it with --give-up-after 0"
                ) from error
            begun = latest
        if begun <= latest:
            given_up += yield PutOnce(outcome_key(push), Outcome(push, None, "it took too long"))
    return given_up


def look() -> Steps[View]:
    """List everything, in the order that the module's text asks for."""
    data: dict[str, Sizes] = {}
    for prefix in (SEGMENTS, PAGES):
        for key, size in (yield List(prefix)):
            parsed = parse_data_key(key)
            if parsed is not None:
                data.setdefault(parsed[0], {})[key] = size
    pointers: dict[str, Sizes] = {}
    for key, size in (yield List(POINTERS)):
        names = parse_pointer_key(key)
        if names is not None:
            pointers.setdefault(names[2], {})[key] = size
    # What kills.
    deleted = _by_push(TOMBSTONES, (yield List(TOMBSTONES)))
    newer_roots = dict((yield List(ROOTS)))
    ended = _by_push(OUTCOMES, (yield List(OUTCOMES)))
    # What saves.
    listed = (yield List(INTENTS)), (yield List(OUTCOMES))
    intents, outcomes = _by_push(INTENTS, listed[0]), _by_push(OUTCOMES, listed[1])
    roots = dict((yield List(ROOTS)))
    strange = {key for key, _ in (*listed[0], *listed[1], *roots.items())}
    strange -= {intent_key(push) for push in intents} | {outcome_key(push) for push in outcomes}
    strange = {key for key in strange if parse_root_key(key) is None}
    return View(data, pointers, deleted, ended, newer_roots, intents, outcomes, roots, strange)


def mark(view: View) -> Steps[Marks]:
    """Read what live snapshots and pushes under way refer to."""
    marks = Marks()

    def take_intent(_: Get, result: Any) -> None:
        if isinstance(result, StorageError):
            marks.note(result)
        else:
            marks.pinned.update(result.pins)

    yield Each((Get(intent_key(push), Intent) for push in view.under_way), take_intent)
    yield from _mark_roots(view, marks)
    marks.keys.update(pages_key(push, number) for push, number, _ in marks.pages)

    def take_segments(step: SegmentsOf, result: Any) -> None:
        if isinstance(result, StorageError):
            # What only an older root refers to was collected before the snapshot was pinned, or
            # else it would be there; so whoever pinned it has read a newer root.
            newest = any(_place(ref) in marks.newest for ref in step.refs)
            if newest or not isinstance(result, NotFoundError):
                marks.note(result)
            return
        for segment, length in result.items():
            marks.segments[segment] = max(length, marks.segments.get(segment, 0))
            if segment[0] not in marks.live:
                marks.suspects.setdefault(segment, []).append(step.refs)

    ordered = (marks.pages[place] for place in sorted(marks.pages))
    groups = group_pages(ordered, _PAGES_PER_REQUEST)
    yield Each((SegmentsOf(group) for group in groups), take_segments)
    marks.keys.update(segment_key(push, number) for push, number in marks.segments)
    return marks


def _mark_roots(view: View, marks: Marks) -> Steps[None]:
    """Read the roots of what is live or pinned: the newest, and of what is pinned all."""
    gone = view.ended.keys() - view.outcomes.keys() - view.deleted.keys()
    marks.missing += sorted(f"{outcome_key(push)} is gone" for push in gone)
    parsed = {key: parse_root_key(key) for key in view.roots | view.newer_roots}
    listed = {key: names for key, names in parsed.items() if names is not None}

    rooted: set[str] = set()

    def take_root(root: Root, is_newest: bool) -> None:
        if is_newest:
            rooted.add(root.summary.push)
            marks.newest.update(map(_place, root.table))
        marks.volumes.setdefault(root.summary.push, root.summary.volume)
        for ref in root.table:
            marks.pages.setdefault(_place(ref), ref)
            marks.volumes.setdefault(ref.push, root.summary.volume)

    def take_outcome(_: Get, result: Any) -> None:
        if isinstance(result, StorageError):
            marks.note(result)
        elif result.repacked:
            marks.repacks.add(result.push)
        elif result.root is not None:
            volume = result.root.summary.volume
            if view.is_live(result.push):
                marks.live[result.push] = volume
            if result.push in marks.pinned and (
                result.push in newest or not view.is_live(result.push)
            ):
                marks.busy.add(volume)
            if result.push not in newest or result.push in marks.pinned:
                take_root(result.root, result.push not in newest)

    def take_newer(step: Get, result: Any) -> None:
        if isinstance(result, StorageError):
            marks.note(result)
        else:
            marks.roots.add(step.key)
            snapshot, generation, repack = listed[step.key]
            take_root(result.root, (generation, repack) >= newest.get(snapshot, (0, "")))

    # First which of the newer roots are committed; then who needs an older one.
    newest: dict[str, tuple[int, str]] = {}
    repacks = {names[2] for names in listed.values() if view.is_live(names[2])}
    yield Each((Get(outcome_key(push), Outcome) for push in sorted(repacks)), take_outcome)
    for key in view.newer_roots.keys() & listed.keys():
        snapshot, generation, repack = listed[key]
        if repack in marks.repacks and repack in view.ended:
            newest[snapshot] = max(newest.get(snapshot, (0, "")), (generation, repack))
    needed = [push for push in view.outcomes if view.is_live(push) or push in marks.pinned]
    others = (Get(outcome_key(push), Outcome) for push in needed if push not in repacks)
    yield Each(others, take_outcome)
    newer = []
    for key in view.roots.keys() & listed.keys():
        snapshot, generation, repack = listed[key]
        is_new = view.is_live(snapshot) and (generation, repack) >= newest.get(snapshot, (0, ""))
        if repack in marks.repacks and (is_new or snapshot in marks.pinned):
            newer.append(Get(key, Repacked))
    yield Each(newer, take_newer)
    if not marks.unreadable:
        rootless = marks.live.keys() - rooted
        marks.missing += sorted(f"no root of the snapshot {push} was found" for push in rootless)


def list_candidates(view: View, marks: Marks) -> list[Candidates]:
    """What repacking may save, by volume: segments of deleted snapshots of which little is needed.

    A volume of which a push under way pins an old root is left alone: that root keeps them.
    """
    volumes: dict[str, Candidates] = {}
    for push, volume in marks.live.items():
        if volume in marks.busy:
            continue
        found = volumes.setdefault(volume, Candidates(volume))
        found.snapshots[push] = view.outcomes[push]
    for segment, groups in marks.suspects.items():
        size = view.data.get(segment[0], {}).get(segment_key(*segment), 0)
        volume = marks.volumes[groups[0][0].push]
        if volume in volumes and marks.segments[segment] <= SPARSE * size:
            volumes[volume].segments[segment] = size
            volumes[volume].groups += groups
    for found in volumes.values():
        found.groups = list({group[0]: group for group in found.groups}.values())
    return [found for found in volumes.values() if found.segments]


def list_finished(view: View, marks: Marks) -> list[str]:
    """Repacks of which no root is needed any more: they get a tombstone."""
    used = {key.rpartition("/")[2] for key in marks.roots}
    return sorted(push for push in marks.repacks - used if push in view.ended)


def list_dead(view: View, marks: Marks) -> Sizes:
    """The objects that nothing needs, with their sizes."""
    dead: Sizes = {}
    for push, objects in view.data.items():
        if view.is_settled(push) and push not in marks.pinned:
            dead.update((key, size) for key, size in objects.items() if key not in marks.keys)
    for push, size in view.intents.items():
        if view.is_settled(push):
            dead[intent_key(push)] = size
    for push in view.deleted.keys() - marks.pinned:
        if push in view.outcomes:
            dead[outcome_key(push)] = view.outcomes[push]
        dead.update(view.pointers.get(push, {}))
    for key, size in view.roots.items():
        names = parse_root_key(key)
        if names is not None and view.is_settled(names[2]) and key not in marks.roots:
            dead[key] = size
    return dead


def list_dead_notes(view: View, marks: Marks, notes: Sizes) -> Sizes:
    """The notes about objects that nothing needs, whether these are there or not."""
    dead: Sizes = {}
    for key, size in notes.items():
        noted = noted_object(key)
        place = None if noted is None else parse_data_key(noted)
        if place is None or noted in marks.keys:
            continue
        if view.is_settled(place[0]) and place[0] not in marks.pinned:
            dead[key] = size
    return dead


def _carry_out(dead: Sizes, progress: Progress | None) -> Steps[None]:
    """Store a plan and delete what it names, some at a time."""
    total, done = sum(dead.values()), 0

    def take(step: Delete, result: Any) -> None:
        nonlocal done
        raise_error(step, result)
        done += dead[step.key]
        if progress:
            progress(done, total)

    for keys in _pieces(list(dead), PLAN_KEYS):
        plan = Plan(new_push_id(), keys)
        yield Put(plan_key(plan.plan), plan)
        yield Each((Delete(key) for key in keys), take)
        yield Delete(plan_key(plan.plan))


def _place(ref: PageRef) -> tuple[str, int, int]:
    return ref.push, ref.number, ref.offset


def _pieces(keys: list[str], most: int) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(keys), most):
        yield tuple(keys[start : start + most])


def _by_push(prefix: str, listing: list[tuple[str, int]]) -> dict[str, int]:
    """The sizes of the objects ``prefix`` + push, by push."""
    parsed = ((parse_push_key(prefix, key), size) for key, size in listing)
    return {push: size for push, size in parsed if push is not None}
