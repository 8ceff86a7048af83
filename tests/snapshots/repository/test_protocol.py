"""The protocol, model-checked: every order of a few actors, random orders of many, with faults.

NBDSERVE_SCHEDULES multiplies the number of random schedules; NBDSERVE_SCHEDULES_SEED begins them
elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import pytest

from snapshots.repository import collecting, pushing, repacking
from snapshots.repository.records import Outcome
from snapshots.repository.steps import Get, List, PutOnce
from tests.snapshots.repository import simulation
from tests.snapshots.repository.simulation import (
    Actor,
    Broken,
    Collector,
    Deleter,
    Pusher,
    Reader,
    Shuffle,
    World,
    run_all,
    run_alone,
    run_random,
    versions,
)

TIMES = int(os.environ.get("NBDSERVE_SCHEDULES", "1"))
SEED = int(os.environ.get("NBDSERVE_SCHEDULES_SEED", "0"))
NEVER, ALL = 1e12, 0.0  # when a collector gives up

VERSIONS = versions([(0, 1, 2), (0,), (1,), (0, 2), (1, 2)])
ONE, TWO, THREE, FOUR, FIVE = VERSIONS

Make = Callable[..., list[Actor]]


def world_of(*pushed: simulation.Version) -> World:
    world = World(VERSIONS)
    for version in pushed:
        run_alone(Pusher(world, version))
    return world


def killed_push(world: World, version: simulation.Version, steps: int, line: str = "") -> World:
    pusher = Pusher(world, version, line=line)
    for _ in range(steps):
        pusher.go()
    pusher.kill()
    return world


def two() -> World:
    return world_of(ONE, TWO)


def pointed(world: World) -> Reader:
    summary = next(iter(world.live.values())).root
    assert summary is not None
    return Reader(world, summary.summary)


#: name: (the world at first, the actors, interruptions)
SCENARIOS: dict[str, tuple[Callable[[], World], Make, int]] = {
    "a push against a snapshot that is deleted": (
        two, lambda w: [Pusher(w, THREE), Deleter(w, TWO), Collector(w)], 2,
    ),
    "the collector gives up": (
        two, lambda w: [Pusher(w, THREE), Deleter(w, TWO), Collector(w, ALL)], 2,
    ),
    "two collectors": (
        two, lambda w: [Collector(w), Deleter(w, TWO), Collector(w)], 2,
    ),
    "an old plan wakes up": (
        two, lambda w: [Collector(w), Deleter(w, ONE), Collector(w), Pusher(w, THREE)], 1,
    ),
    "a push on a push": (
        two, lambda w: [Pusher(w, THREE), Pusher(w, FOUR), Deleter(w, TWO), Collector(w)], 1,
    ),
    "the same snapshot twice": (
        two, lambda w: [Pusher(w, THREE), Pusher(w, THREE), Collector(w)], 1,
    ),
    "deleted, pushed again": (
        two, lambda w: [Deleter(w, TWO), Collector(w), Pusher(w, TWO), Pusher(w, THREE)], 1,
    ),
    "a reader": (
        two, lambda w: [pointed(w), Deleter(w, ONE), Collector(w)], 2,
    ),
    "a killed push is gone on with": (
        lambda: killed_push(two(), FOUR, 9),
        lambda w: [Pusher(w, FOUR), Collector(w), Deleter(w, TWO)], 2,
    ),
    "two go on with a killed push": (
        lambda: killed_push(two(), FOUR, 9),
        lambda w: [Pusher(w, FOUR), Pusher(w, FOUR), Collector(w, ALL)], 1,
    ),
    "gone on with, and killed again": (
        lambda: killed_push(killed_push(two(), FOUR, 10), FOUR, 14),
        lambda w: [Pusher(w, FOUR), Collector(w, ALL), Collector(w)], 1,
    ),
    "a backup goes on with the one that was killed": (
        lambda: killed_push(two(), THREE, 9, "line"),
        lambda w: [Pusher(w, FOUR, line="line"), Collector(w, ALL), Deleter(w, TWO)], 1,
    ),
    "a backup goes on with one that lives": (
        two, lambda w: [Pusher(w, THREE, line="line"), Pusher(w, FOUR, line="line"),
                        Collector(w)], 1,
    ),
}  # fmt: skip


def repackable() -> World:
    """Of the two segments of ONE, which is deleted, little is needed; nothing is collected yet."""
    world = world_of(ONE, TWO)
    run_alone(Deleter(world, ONE))
    return world


SCENARIOS |= {
    "a repack and a push": (
        repackable, lambda w: [Pusher(w, THREE), Collector(w, repack=True), Collector(w)], 2,
    ),
    "a repack and a reader": (
        repackable, lambda w: [pointed(w), Collector(w, repack=True), Collector(w)], 2,
    ),
    "a repack and a delete": (
        repackable, lambda w: [Collector(w, repack=True), Deleter(w, TWO), Collector(w)], 1,
    ),
    "two repacks": (
        repackable, lambda w: [Collector(w, repack=True), Collector(w, repack=True),
                               Collector(w, ALL)], 1,
    ),
}  # fmt: skip


def repacks(world: World, shuffle: Shuffle) -> list[Actor]:
    return [
        Pusher(world, THREE, shuffle),
        Pusher(world, FIVE, shuffle),
        Deleter(world, ONE, shuffle),
        Deleter(world, THREE, shuffle),
        Collector(world, NEVER, shuffle, repack=True),
        Collector(world, NEVER, shuffle, repack=True),
        Collector(world, ALL, shuffle, repack=True),
        pointed(world),
    ]


@pytest.fixture(autouse=True)
def eager_repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """In these small volumes repacking would never be worth it."""
    monkeypatch.setattr(repacking, "SPARSE", 0.5)
    monkeypatch.setattr(collecting, "SPARSE", 0.5)
    monkeypatch.setattr(repacking, "WORTH", 0.5)


def many(world: World, shuffle: Shuffle) -> list[Actor]:
    return [
        Pusher(world, THREE, shuffle),
        Pusher(world, FOUR, shuffle),
        Deleter(world, TWO, shuffle),
        Deleter(world, THREE, shuffle),
        Collector(world, NEVER, shuffle),
        Collector(world, ALL, shuffle),
        pointed(world),
    ]


def same(world: World, shuffle: Shuffle) -> list[Actor]:
    return [
        Pusher(world, FOUR, shuffle),
        Pusher(world, FOUR, shuffle),
        Pusher(world, FOUR, shuffle),
        Deleter(world, TWO, shuffle),
        Collector(world, ALL, shuffle),
        Collector(world, NEVER, shuffle),
    ]


def churn(world: World, shuffle: Shuffle) -> list[Actor]:
    return [
        Pusher(world, FIVE, shuffle),
        Deleter(world, ONE, shuffle),
        Deleter(world, TWO, shuffle),
        Collector(world, NEVER, shuffle),
        Collector(world, NEVER, shuffle),
    ]


RANDOM: dict[str, tuple[Make, int]] = {
    "many": (many, 6_000),
    "the same snapshot": (same, 4_000),
    "churn": (churn, 5_000),
    "repacks": (repacks, 6_000),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order(name: str) -> None:
    start, make, interruptions = SCENARIOS[name]
    count = run_all(start(), make, interruptions)
    print(f"{name}: {count} schedules")
    assert count > 100


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order_with_the_first_killed_at_every_step(name: str) -> None:
    start, make, _ = SCENARIOS[name]
    world = start()
    interruptions = 1 if len(make(world.copy())) < 4 else 0
    count = sum(
        run_all(world, make, interruptions, kill_first_after=steps) for steps in range(1, 34, 8)
    )
    print(f"{name}, killed: {count} schedules")
    assert count > 20


@pytest.mark.timeout(300 * TIMES)
@pytest.mark.parametrize("name", RANDOM)
def test_random_orders(name: str) -> None:
    make, count = RANDOM[name]
    start = two()
    for seed in range(SEED, SEED + count * TIMES):
        try:
            run_random(start, make, seed)
        except Broken as error:
            raise AssertionError(f"seed {seed}: {error}") from error


# That a broken rule is found.

Patch = pytest.MonkeyPatch


def without_the_parent_check(patch: Patch) -> None:
    """The pusher does not look for the parent's tombstone."""

    def pin(parent: Any) -> Generator[Any, Any, Any]:
        return (yield Get(f"outcomes/{parent.push}", Outcome)).root

    patch.setattr(pushing, "_pin", pin)


def parent_checked_before_the_intent(patch: Patch) -> None:
    original, pin = pushing.pushing, pushing._pin

    def push(
        push: str, snapshot: Any, parent: Any, unfinished: Any, line: str
    ) -> Generator[Any, Any, Any]:
        root = (yield from pin(parent)) if parent else None

        def known(_: Any) -> Generator[Any, Any, Any]:
            return root
            yield

        with pytest.MonkeyPatch.context() as inner:
            steps = original(push, snapshot, parent, unfinished, line)
            result, error = None, None
            while True:
                inner.setattr(pushing, "_pin", known)
                try:
                    step = steps.send(result) if error is None else steps.throw(error)
                except StopIteration as done:
                    return done.value
                finally:
                    inner.undo()
                result = error = None
                try:
                    result = yield step
                except GeneratorExit:
                    raise
                except BaseException as raised:
                    error = raised

    patch.setattr(simulation, "pushing", push)


def pins_ignored(patch: Patch) -> None:
    patch.setattr(collecting.View, "under_way", property(lambda view: []))


def trusting_a_listing(patch: Patch) -> None:
    patch.setattr(Pusher, "trust_listing", True)


def committed_before_all_is_stored(patch: Patch) -> None:
    patch.setattr(Pusher, "commit_early", True)


def looking_in_order(*names: str) -> Callable[[Patch], None]:
    """The collector makes its listings in another order, or one in place of two."""

    def broken(patch: Patch) -> None:
        original = collecting.look

        def look() -> Generator[Any, Any, Any]:
            listed: dict[str, list[Any]] = {}
            for name in names:
                listed.setdefault(name, []).append((yield List(f"{name}/")))
            steps = original()
            result = None
            while True:
                try:
                    step = steps.send(result)
                except StopIteration as done:
                    return done.value
                known = listed.get(step.prefix[:-1])
                if known:
                    result = known.pop(0) if len(known) > 1 else known[0]
                else:
                    result = yield step

        patch.setattr(collecting, "look", look)

    broken.__name__ = f"listings_in_the_order_{'_'.join(names)}"
    return broken


def giving_up_without_the_outcome(patch: Patch) -> None:
    """A push is taken for ended because it began long ago."""

    def give_up(after: float) -> Generator[Any, Any, int]:
        patch.setattr(collecting.View, "under_way", property(lambda view: []))
        patch.setattr(collecting.View, "is_settled", lambda view, push: not after)
        return 0
        yield

    patch.setattr(collecting, "_give_up", give_up)


def unconditional_outcomes(patch: Patch) -> None:
    original = World._put

    def put(world: World, key: str, record: Any, once: bool) -> Any:
        with suppress(KeyError):
            if once and key.startswith("outcomes/"):
                del world.objects["outcomes"][key]
        return original(world, key, record, once)

    patch.setattr(World, "_put", put)


def removing(prefix: str) -> Callable[[Patch], None]:
    """What must stay for ever is removed."""

    def broken(patch: Patch) -> None:
        original = collecting.list_dead

        def list_dead(view: Any, marks: Any) -> Any:
            dead = original(view, marks)
            if prefix == "tombstones/":
                gone = view.deleted.keys() - marks.pinned - view.outcomes.keys()
            else:
                gone = set(view.ended)
                gone -= marks.live | view.intents.keys()
            return dead | {f"{prefix}{push}": 1 for push in gone}

        patch.setattr(collecting, "list_dead", list_dead)

    broken.__name__ = f"{prefix[:-1]}_removed"
    return broken


def donors_taken_without_ending_them(patch: Patch) -> None:
    def take(push: str, _: Any, unfinished: Any, __: Any) -> Generator[Any, Any, list[str]]:
        return [donor for intent in unfinished for donor in (intent.push, *intent.donors)]
        yield

    patch.setattr(pushing, "_take_over", take)


def donors_taken_that_others_ended(patch: Patch) -> None:
    def take(push: str, _: Any, unfinished: Any, __: Any) -> Generator[Any, Any, list[str]]:
        for intent in unfinished:
            yield PutOnce(f"outcomes/{intent.push}", Outcome(intent.push, None, "", push))
        return [donor for intent in unfinished for donor in (intent.push, *intent.donors)]

    patch.setattr(pushing, "_take_over", take)


def the_commit_is_not_read_back(patch: Patch) -> None:
    """A refused commit is taken for one's own, of which the answer was lost."""
    original = pushing._commit

    def commit(push: str, snapshot: Any, parent: Any, stored: Any) -> Generator[Any, Any, Any]:
        steps = original(push, snapshot, parent, stored)
        step = next(steps)
        while not isinstance(step, PutOnce):
            step = steps.send((yield step))
        yield step
        return step.record

    patch.setattr(pushing, "_commit", commit)


RULES = [
    without_the_parent_check,
    parent_checked_before_the_intent,
    pins_ignored,
    trusting_a_listing,
    committed_before_all_is_stored,
    looking_in_order("intents", "tombstones"),
    looking_in_order("outcomes"),
    looking_in_order("intents", "outcomes"),
    looking_in_order("intents", "roots"),
    looking_in_order("roots"),
    giving_up_without_the_outcome,
    unconditional_outcomes,
    donors_taken_without_ending_them,
    donors_taken_that_others_ended,
    the_commit_is_not_read_back,
    removing("tombstones/"),
    removing("outcomes/"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_found(rule: Callable[[Patch], None], monkeypatch: Patch) -> None:
    # The worlds are made while the rules hold.
    worlds = [(start(), make, most) for start, make, most in SCENARIOS.values()]
    begin = two()
    rule(monkeypatch)
    with pytest.raises((Broken, KeyError)):
        for tries in (range(1000), range(1000, 10_000)):
            for seed in tries:
                for make, _ in RANDOM.values():
                    run_random(begin, make, seed)
            for start, make, most in worlds:
                run_all(start, make, most if tries.start else 1)
