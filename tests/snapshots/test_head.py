"""Pending runs become extents."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from snapshots.extent_log import Run
from snapshots.head import flatten
from snapshots.owner_map import DATA, ZERO

BLOCKS = 40

runs_of_any_kind = st.lists(
    st.tuples(
        st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.sampled_from((DATA, ZERO))
    ).map(lambda drawn: (drawn[0], min(drawn[0] + drawn[1], BLOCKS), drawn[2])),
    max_size=12,
)


@given(runs_of_any_kind)
def test_extents_are_what_the_runs_leave_behind(runs: list[Run]) -> None:
    expected = [0] * BLOCKS
    for first, last, kind in runs:
        expected[first:last] = [kind] * (last - first)
    extents = flatten(runs)
    found = [0] * BLOCKS
    end = 0
    for first, last, kind in extents:
        assert end <= first < last
        end = last
        found[first:last] = [kind] * (last - first)
    assert found == expected
    assert len(extents) <= 2 * len(runs)
    if len({kind for _, _, kind in runs}) == 1:
        assert len(extents) <= len(runs)


def test_neighbours_of_one_kind_are_one_extent() -> None:
    assert flatten([(3, 5, DATA), (1, 3, DATA), (8, 9, DATA)]) == [(1, 5, DATA), (8, 9, DATA)]
    mixed = [(3, 5, DATA), (1, 3, DATA), (5, 9, ZERO), (6, 7, DATA)]
    assert flatten(mixed) == [(1, 5, DATA), (5, 6, ZERO), (6, 7, DATA), (7, 9, ZERO)]
    assert flatten([]) == []
