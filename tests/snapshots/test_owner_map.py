"""The owner map against a plain bytearray."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import groupby
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from snapshots import owner_map
from snapshots.owner_map import REGION, OwnerMap

BLOCKS = 3 * REGION + 77
places = st.one_of(
    st.integers(0, BLOCKS),
    st.sampled_from([0, 1, REGION - 1, REGION, REGION + 1, 2 * REGION, 3 * REGION, BLOCKS]),
)
values = st.sampled_from([0, 1, 2, 10, 91, 92, 93, 94, 255])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), places, places, values, values),
        st.tuples(st.just("replace"), places, places, values, values),
        st.tuples(st.just("one"), st.integers(0, BLOCKS - 1), places, values, values),
    ),
    max_size=12,
)


def runs_of(model: bytes, first: int, last: int) -> list[tuple[int, int, int]]:
    found = []
    position = first
    for value, group in groupby(model[first:last]):
        length = sum(1 for _ in group)
        if value:
            found.append((position, position + length, value))
        position += length
    return found


def joined(runs: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for first, last, _ in runs:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


@pytest.mark.parametrize("values", [1, 2, 15, 16, 17, 40, 256])
def test_many_values_are_counted_as_few_are(values: int) -> None:
    tested = OwnerMap(BLOCKS)
    source = random.Random(values)
    for block in source.sample(range(BLOCKS), 5000):
        tested.set(block, block + 1, source.randrange(values))
    counted = Counter(tested.raw[:])
    del counted[0]
    assert tested.count_values(0, BLOCKS) == counted
    tested.close()


@settings(max_examples=60, deadline=None)
@given(operations, places, places, st.integers(0, 2 * REGION))
def test_every_operation_does_what_a_bytearray_does(
    steps: list[tuple[str, int, int, int, int]], low: int, high: int, more: int
) -> None:
    tested, model = OwnerMap(BLOCKS), bytearray(BLOCKS)
    for kind, one, other, value, new in steps:
        first, last = min(one, other), max(one, other)
        if kind == "set":
            tested.set(first, last, value)
            model[first:last] = bytes([value]) * (last - first)
        elif kind == "one":
            tested.set(one, one + 1, value)
            model[one] = value
        elif value:
            tested.replace(first, last, value, new)
            model[first:last] = model[first:last].replace(bytes([value]), bytes([new]))
    low, high = min(low, high), max(low, high)
    for grown in (tested, tested.grown(BLOCKS + more)):
        model.extend(bytes(grown.blocks - len(model)))
        assert grown.raw[:] == model
        for first, last in ((0, grown.blocks), (low, high)):
            expected = runs_of(bytes(model), first, last)
            assert list(grown.runs(first, last)) == expected
            assert list(grown.owned_runs(first, last)) == joined(expected)
        assert grown.count_owned() == len(model) - model.count(0)
        for first, last in ((0, grown.blocks), (low, high)):
            counted = Counter(model[first:last])
            del counted[0]
            assert grown.count_values(first, last) == counted
    tested.close()


def resident() -> int:
    """Bytes of this process's memory that are really there."""
    found = re.search(r"^Rss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def test_sixteen_tebibytes_cost_only_what_is_written() -> None:
    blocks = (16 << 40) >> 12
    before = resident()
    large = OwnerMap(blocks)
    for first in range(0, blocks, blocks // 64):
        large.set(first, first + 3, 7)
    large.set(blocks - 1, blocks, 9)
    assert large.count_owned() == 64 * 3 + 1
    assert len(list(large.owned_runs(0, blocks))) == 65
    assert list(large.runs(blocks - 5, blocks)) == [(blocks - 1, blocks, 9)]
    large.set(5, blocks - 5, 0)
    large.replace(0, blocks, 9, 3)
    assert list(large.runs(0, blocks)) == [(0, 3, 7), (blocks - 1, blocks, 3)]
    # 4 GiB of addresses; the touched regions, read and cleared whole, are 65 of 32 KiB.
    assert resident() - before < 8 << 20
    large.close()


def test_runs_may_be_asked_for_while_the_map_changes_behind_them() -> None:
    tested = OwnerMap(4 * owner_map.REGION)
    tested.set(10, 4 * owner_map.REGION, 1)
    seen = []
    for first, last in tested.owned_runs(0, tested.blocks):
        seen.append((first, last))
        tested.set(first, last, 0)
    assert seen == [(10, 4 * owner_map.REGION)]
    # No regular expression's match holds the mapping any more: it can be closed.
    tested.close()


runs = st.lists(st.tuples(places, places, values), max_size=6)


@settings(max_examples=60, deadline=None)
@given(runs, runs, places, places, st.integers(0, BLOCKS), st.sampled_from([None, 1, 92]))
def test_differences_are_those_of_two_bytearrays(
    ours: list[tuple[int, int, int]],
    theirs: list[tuple[int, int, int]],
    low: int,
    high: int,
    shorter: int,
    renamed: int | None,
) -> None:
    tested, other = OwnerMap(BLOCKS), OwnerMap(BLOCKS - shorter)
    names = bytearray(range(256))
    if renamed is not None:
        names[renamed] = 2
    for target, steps in ((tested, ours), (other, theirs)):
        for one, two, value in steps:
            target.set(min(one, two, target.blocks), min(max(one, two), target.blocks), value)
    here, there = tested.raw[:], other.raw[:].translate(names).ljust(BLOCKS, b"\0")
    marks = bytes(one != two for one, two in zip(here, there, strict=True))
    for first, last in ((0, BLOCKS), (min(low, high), max(low, high))):
        found = list(tested.differences(other, bytes(names) if renamed else None, first, last))
        assert found == joined(runs_of(marks, first, last))
    tested.close()
    other.close()


def test_a_scan_reaches_over_a_bounded_number_of_touched_regions() -> None:
    blocks = (8 << 40) >> 12
    tested = OwnerMap(blocks)
    assert tested.reach(0, blocks) == blocks
    steps = 3 * owner_map.REACH + 5
    for step in range(steps):
        tested.set(5000 * step * 40, 5000 * step * 40 + 1, 1)
    position, calls = 0, 0
    while position < blocks:
        position, before = tested.reach(position, blocks), position
        assert position > before
        assert len(list(tested.touched_regions(before, position))) <= owner_map.REACH
        calls += 1
    assert calls == 4
    assert tested.reach(7, 100) == 100
    tested.close()
