"""Retention: what is kept and why, by example and for all rules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import InvalidError
from snapshots.repository import Summary
from snapshots.repository.retention import (
    UNLIMITED,
    Action,
    Decision,
    Duration,
    Rules,
    decide,
    parse_duration,
    parse_limit,
)

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
COUNTED = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def summary(created: float, number: int = 0) -> Summary:
    return Summary(
        volume="web", snapshot=f"s{number}", snapshot_id=f"id-{number}", push=f"{number:032x}",
        created=created, pushed=created, size=4096, data=0, stored=0, uploaded=0, parent=None,
        parent_push=None,
    )  # fmt: skip


def taken(*moments: str) -> list[Summary]:
    return [
        summary(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp(), number)
        for number, moment in enumerate(moments)
    ]


def kept(decisions: list[Decision]) -> set[str]:
    return {one.summary.snapshot for one in decisions if one.action is Action.KEEP}


def explained(decisions: list[Decision]) -> dict[str, str]:
    return {one.summary.snapshot: "; ".join(one.reasons) for one in decisions}


def test_every_decision_says_why() -> None:
    snapshots = taken(
        "2025-12-31T23:00", "2026-11-18T02:00", "2026-11-19T01:00", "2026-11-19T02:00",
        "2026-11-20T02:00",
    )  # fmt: skip
    decisions = decide(snapshots, Rules(last=1, daily=2, yearly=3), NOW, protected={f"{1:032x}"})
    assert [one.summary.snapshot for one in decisions] == ["s4", "s3", "s2", "s1", "s0"]
    assert explained(decisions) == {
        "s4": "last 1 of 1; daily 2026-11-20, 1 of 2; yearly 2026, 1 of 3",
        "s3": "daily 2026-11-19, 2 of 2",
        "s2": "no rule keeps it",
        "s1": "protected",
        "s0": "yearly 2025, 2 of 3",
    }
    assert [one.action.value for one in decisions] == ["keep", "keep", "delete", "keep", "keep"]


def test_the_newest_of_a_period_in_utc_is_kept_and_the_oldest_until_a_rule_is_full() -> None:
    snapshots = taken(
        "2026-10-31T23:59", "2026-11-01T00:00", "2026-11-02T00:00", "2026-11-09T00:00",
        "2026-11-15T23:59:59", "2026-11-16T00:00",
    )  # fmt: skip
    by_week = decide(snapshots, Rules(weekly=UNLIMITED), NOW)  # 2026-11-02, 09 and 16 are Mondays
    assert explained(by_week) == {
        "s5": "weekly 2026-W47, 1 of unlimited",
        "s4": "weekly 2026-W46, 2 of unlimited",
        "s3": "no rule keeps it",
        "s2": "weekly 2026-W45, 3 of unlimited",
        "s1": "weekly 2026-W44, 4 of unlimited",
        "s0": "weekly 2026-W44, 5 of unlimited, the oldest",
    }
    assert kept(decide(snapshots, Rules(monthly=2), NOW)) == {"s5", "s0"}
    assert kept(decide(snapshots[1:], Rules(monthly=2), NOW)) == {"s5", "s1"}
    assert kept(decide(snapshots[1:], Rules(monthly=1), NOW)) == {"s5"}
    assert kept(decide(snapshots, Rules(hourly=2), NOW)) == {"s5", "s4"}


def test_within_is_measured_from_the_newest_snapshot_not_from_the_clock() -> None:
    snapshots = taken("2024-02-28T00:00", "2024-02-29T00:00", "2024-03-31T00:00")
    for text, names in {
        "1m": {"s2", "s1"},  # a month before March 31 is February 29
        "31d": {"s2", "s1"},
        "30d": {"s2"},
        "1m1d": {"s2", "s1", "s0"},
        "1m23h": {"s2", "s1"},
        "99999y": {"s2", "s1", "s0"},
        "99999w": {"s2", "s1", "s0"},
    }.items():
        assert kept(decide(snapshots, Rules(within=parse_duration(text)), NOW)) == names, text
    reason = decide(snapshots, Rules(within=parse_duration("1y6m8d2h")), NOW)[0].reasons
    assert reason == ["within 1y6m8d2h of the newest"]


def test_times_that_cannot_be_count_for_nothing() -> None:
    """A snapshot of 2099 is not the newest, and takes no other's place."""
    ages = [NOW + 1, 4e9, 9.9e11, -1.0, -9.9e11]
    strange = [summary(created, 10 + number) for number, created in enumerate(ages)]
    sound = taken("2026-11-18T00:00", "2026-11-19T00:00", "2026-11-20T00:00")
    for rules in (Rules(last=1), Rules(daily=1), Rules(within=parse_duration("1h"))):
        decisions = decide(strange + sound, rules, NOW)
        assert kept(decisions) == {"s2"}
        left = {one.summary.push for one in decisions if one.action is Action.LEAVE}
        assert left == {one.push for one in strange}
    assert kept(decide(strange, Rules(last=1), NOW)) == set()
    assert "future" in explained(decide(strange, Rules(last=1), NOW))["s10"]


def test_what_is_not_understood_is_left_and_takes_no_place() -> None:
    snapshots = taken("2026-11-18T00:00", "2026-11-19T00:00", "2026-11-20T00:00")
    unclear = {snapshots[2].push: "its outcome is damaged"}
    decisions = decide(snapshots, Rules(last=1), NOW, unclear=unclear)
    assert explained(decisions) == {
        "s2": "its outcome is damaged",
        "s1": "last 1 of 1",
        "s0": "no rule keeps it",
    }
    # Protection is no reason to count what cannot be restored.
    protected = {snapshots[2].push}
    again = decide(snapshots, Rules(last=1), NOW, protected=protected, unclear=unclear)
    assert again[0].action is Action.LEAVE


def test_no_rule_is_refused() -> None:
    with pytest.raises(InvalidError, match="no rule"):
        decide(taken("2026-11-18T00:00"), Rules(), NOW, protected={f"{0:032x}"})


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "ten", "unlimited!", "1 2", "٣", "1" * 10, "0x1"]
)
def test_limits_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidError, match="number of snapshots"):
        parse_limit(text)


@pytest.mark.parametrize(
    "text", ["", "0d", "0y0h", "30", "d", "1h1d", "1d1d", "-1d", "1.5d", "٣d", "1s", "1" * 6 + "d"]
)
def test_durations_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidError, match=r"duration|no time"):
        parse_duration(text)


def test_what_is_written() -> None:
    assert parse_limit("unlimited") == UNLIMITED
    assert parse_limit(" 7 ") == 7
    assert parse_duration("1y6m2w3d12h") == Duration(18, 17 * 24 + 12)


HOUR = 3600
# Close together, so that periods have several, and ties happen.
moments = st.lists(
    st.one_of(
        st.integers(0, 400).map(lambda hours: NOW - hours * HOUR),
        st.integers(0, 4000).map(lambda days: NOW - days * 24 * HOUR),
        st.integers(-3, 3).map(lambda hours: NOW + hours * HOUR),
    ),
    max_size=40,
)
limits = st.one_of(st.none(), st.integers(1, 12), st.just(UNLIMITED))
durations = st.builds(Duration, st.integers(0, 30), st.integers(1, 2000))


@st.composite
def all_rules(draw: st.DrawFn) -> Rules:
    counts = {rule: draw(limits) for rule in COUNTED}
    return Rules(**counts, within=draw(st.none() | durations))


def more(rules: Rules, rule: str, by: float) -> Rules:
    """The same rules, one of which asks for more, or is new."""
    values = dict(vars(rules))
    if rule == "within":
        old = values["within"] or Duration(0, 0)
        values["within"] = Duration(old.months + int(by), old.hours + int(by))
    else:
        values[rule] = (values[rule] or 0) + by
    return Rules(**values)


@settings(max_examples=250, deadline=None)
@given(moments, all_rules(), st.sampled_from([*COUNTED, "within"]), st.integers(1, 20), st.data())
def test_what_holds_for_all_rules(
    times: list[float], rules: Rules, rule: str, by: int, data: st.DataObject
) -> None:
    snapshots = [summary(created, number) for number, created in enumerate(times)]
    pushes = [one.push for one in snapshots]
    protected = set(data.draw(st.lists(st.sampled_from(pushes), max_size=5))) if pushes else set()
    unclear = {push: "no" for push in pushes if data.draw(st.integers(0, 9)) == 0}
    if rules.empty:
        with pytest.raises(InvalidError):
            decide(snapshots, rules, NOW, protected, unclear)
        return
    decisions = decide(snapshots, rules, NOW, protected, unclear)
    # Each one once, each with a reason, whatever order they come in.
    assert sorted(one.summary.push for one in decisions) == pushes
    assert all(one.reasons and all(one.reasons) for one in decisions)
    shuffled = data.draw(st.permutations(snapshots))
    assert decide(shuffled, rules, NOW, protected, unclear) == decisions

    by_push = {one.summary.push: one.action for one in decisions}
    understood = [one for one in snapshots if one.push not in unclear and one.created <= NOW]
    left = {push for push, action in by_push.items() if action is Action.LEAVE}
    assert left == set(pushes) - {one.push for one in understood}
    assert all(by_push[push] is Action.KEEP for push in protected - left)
    if understood:
        newest = max(understood, key=lambda one: (one.created, one.push))
        assert by_push[newest.push] is Action.KEEP

    # Asking for more, protecting more or understanding less never deletes more.
    deleted = {push for push, action in by_push.items() if action is Action.DELETE}
    with_more = decide(snapshots, more(rules, rule, by), NOW, protected, unclear)
    assert {one.summary.push for one in with_more if one.action is Action.DELETE} <= deleted
    less = unclear | {push: "no" for push in pushes if data.draw(st.booleans())}
    with_less = decide(snapshots, rules, NOW, protected, less)
    assert {one.summary.push for one in with_less if one.action is Action.DELETE} <= deleted
    with_protected = decide(snapshots, rules, NOW, set(pushes), unclear)
    assert all(one.action is not Action.DELETE for one in with_protected)

    # Pruning again at once deletes nothing more.
    rest = [one for one in snapshots if one.push not in deleted]
    again = decide(rest, rules, NOW, protected, unclear)
    assert all(one.action is not Action.DELETE for one in again)


def test_keeping_the_last_keeps_exactly_so_many() -> None:
    snapshots = [summary(NOW - number * HOUR, number) for number in range(20)]
    for count in range(1, 25):
        names = kept(decide(snapshots, Rules(last=count), NOW))
        assert names == {f"s{number}" for number in range(min(count, 20))}


def test_a_nightly_prune_settles_on_days_weeks_and_months() -> None:
    """Three years of a nightly backup and prune, as a crontab would do."""
    rules = Rules(daily=7, weekly=4, monthly=12, yearly=UNLIMITED)
    start = datetime(2023, 1, 10, 2, 15, tzinfo=UTC)
    there: list[Summary] = []
    for day in range(3 * 365):
        now = start + timedelta(days=day)
        there.append(summary(now.timestamp(), day))
        decisions = decide(there, rules, now.timestamp())
        there = [one.summary for one in decisions if one.action is Action.KEEP]
    days = sorted(datetime.fromtimestamp(one.created, UTC).date() for one in there)
    last = (start + timedelta(days=3 * 365 - 1)).date()
    assert [(last - day).days for day in days[-7:]] == [6, 5, 4, 3, 2, 1, 0]
    assert len({(day.year, day.month) for day in days if (last - day).days < 365}) == 12
    assert days[0] == start.date()  # no year is old enough yet to take its place
    assert {day.year for day in days} == {2023, 2024, 2025, 2026}
    assert len(days) < 30
