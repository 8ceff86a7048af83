"""What may be promised of a disk, and what is said before it is full."""

from __future__ import annotations

import logging

import pytest

from backends.errors import NoSpaceError
from backends.layers import Space
from backends.memory_layers import MemoryLayerStore
from snapshots.catalogue import Catalogue
from snapshots.space import SpacePolicy
from snapshots.space_watch import SpaceWatch, Threshold
from tests.snapshots.stores import run

MIB = 1 << 20
GIB = 1 << 30


def test_more_than_the_policy_allows_is_refused_unless_forced() -> None:
    async def scenario() -> None:
        store = MemoryLayerStore(GIB)
        catalogue = await Catalogue.open(store)
        catalogue.space.policy = SpacePolicy(max_overcommit=2)
        await catalogue.create_volume("v", GIB)
        room = await catalogue.space.measure()
        assert room.provisioned == GIB
        assert room.used == store.used - sum(map(len, store._records.values()))
        assert room.capacity == room.used + GIB - store.used
        assert room.overcommit == pytest.approx(1, abs=0.01)
        lines = []
        with pytest.raises(NoSpaceError) as refused:
            await catalogue.create_volume("w", GIB + MIB)
        lines.append(str(refused.value))
        with pytest.raises(NoSpaceError) as refused:
            await catalogue.resize_volume("v", 2 * GIB + MIB)
        lines.append(str(refused.value))
        await catalogue.create_snapshots([("v", "s")])
        with pytest.raises(NoSpaceError) as refused:
            await catalogue.clone_volume("w", "v", "s", GIB + MIB)
        lines.append(str(refused.value))
        with pytest.raises(NoSpaceError) as refused:
            await catalogue.begin_import("w", GIB + MIB)
        lines.append(str(refused.value))
        for line in lines:
            assert "provisioned, 2.00 times the" in line
            assert "max_overcommit is 2" in line
        # What is being restored counts; what was given up does not.
        imported = await catalogue.begin_import("w", GIB - MIB)
        with pytest.raises(NoSpaceError):
            await catalogue.create_volume("x", 2 * MIB)
        await catalogue.discard_import(imported)
        await catalogue.create_volume("x", 2 * MIB)
        await catalogue.create_volume("w", 2 * GIB, force=True)
        await catalogue.resize_volume("w", 3 * GIB, force=True)
        await catalogue.resize_volume("w", 3 * GIB)  # which adds nothing
        await catalogue.clone_volume("y", "v", "s", force=True)
        # It is looked at anew each time: a policy that is lifted stops nobody.
        catalogue.space.policy = SpacePolicy()
        await catalogue.create_volume("z", 1 << 40)
        await catalogue.close()

    run(scenario())


def test_nothing_new_below_the_least_that_is_to_be_free() -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(MemoryLayerStore(GIB))
        await catalogue.create_volume("v", MIB)
        catalogue.space.policy = SpacePolicy(min_free=Threshold(share=0.9999))
        for what in (
            catalogue.create_volume("w", MIB),
            catalogue.create_snapshots([("v", "s")]),
            catalogue.begin_import("w", MIB),
        ):
            with pytest.raises(NoSpaceError, match=r"1023\.9M are needed for a"):
                await what
        await catalogue.close()

    run(scenario())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watch_of(clock: Clock) -> SpaceWatch:
    watch = SpaceWatch(clock)
    watch.thresholds = Threshold(share=0.1), Threshold(size=50)
    return watch


def test_a_warning_is_logged_once_when_it_begins_and_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = watch_of(Clock())

    def look(free: int, inodes: int = 100) -> tuple[list[str], list[tuple[str, str]]]:
        caplog.clear()
        space = Space(free, 1000, inodes, 100)
        watch.look(space)
        return caplog.messages, [(found.kind, found.level) for found in watch.warnings(space)]

    with caplog.at_level(logging.WARNING):
        assert look(100) == ([], [])
        lines, warnings = look(99)
        assert lines == ["the disk is nearly full: 99 of 1000 (9.9 %) are free"]
        assert warnings == [("space", "warning")]
        assert look(98) == ([], warnings)
        assert look(105) == ([], warnings)  # a little more is not enough
        lines, warnings = look(49)
        assert len(lines) == 1
        assert warnings == [("space", "critical")]
        assert look(54) == ([], warnings)
        assert look(56) == ([], [("space", "warning")])
        lines, warnings = look(110)
        assert lines == ["enough space again: 110 of 1000 (11.0 %) are free"]
        assert warnings == []
        lines, warnings = look(500, 4)
        assert lines == ["the disk is nearly full: 4 of 100 inodes (4.0 %) are free"]
        assert warnings == [("inodes", "warning")]
        # A file system that has no bound on them.
        assert SpaceWatch().warnings(Space(1, 1)) == []


def test_when_it_is_full_is_told_only_where_the_last_minutes_tell() -> None:
    clock = Clock()
    watch = watch_of(clock)

    def go(seconds: int, *frees: int) -> float | None:
        for free in frees:
            watch.look(Space(free, 10_000))
            clock.now += seconds
        return watch.seconds_left(frees[-1])

    assert go(60, 9000, 8900, 8800) is None  # too short a time
    assert go(60, 8700, 8600, 8500, 8400) == pytest.approx(8400 / (600 / 420))
    # It has stopped; then it grows again, but no half an hour says so yet.
    assert go(60, *[8400] * 40) is None
    assert go(60, 8500, 8600) is None
    clock.now += 3600
    assert go(60, *range(800, 400, -10)) == pytest.approx(410 / (10 / 60), rel=0.1)
    (warning,) = watch.warnings(Space(410, 10_000))
    assert warning.message.endswith("; at the rate of the last minutes none in about 42 min")
