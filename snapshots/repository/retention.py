"""Retention: which snapshots of a volume are kept, and why. Without a store and without a clock.

The snapshots are gone through from the newest to the oldest, by the time when they were taken, in
UTC, so that every host decides the same:

- ``last``: the N newest are kept.
- ``hourly``, ``daily``, ``weekly`` (ISO 8601: from Monday), ``monthly``, ``yearly``: of each such
  period that has any the newest is kept, for the N newest of these periods. While a rule has found
  fewer than N, it also keeps the oldest snapshot of all: from it the older periods grow.
- ``within``: all that are at most so much older than the newest are kept. The newest counts, not
  the clock: a volume that was not backed up for long loses nothing by waiting.

A snapshot is kept when any rule keeps it; rules know nothing of each other. (All of this is as in
restic.) The newest is always kept. More than that:

- A snapshot that is protected is kept, and counts like any other.
- A snapshot that is not understood is left alone, and counts for no rule: not to keep one, and so
  not to lose another. So is one whose time is in the future, which is the mark of a wrong clock:
  it would be the newest for years.
"""

from __future__ import annotations

import calendar
import enum
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta

from backends.errors import InvalidError
from snapshots.repository.records import Summary

#: How many a rule keeps; a whole number from 1, or UNLIMITED.
Limit = float
UNLIMITED: Limit = math.inf

_DURATION = re.compile(
    r"(?=\d)(?:(\d{1,5})y)?(?:(\d{1,5})m)?(?:(\d{1,5})w)?(?:(\d{1,5})d)?(?:(\d{1,5})h)?", re.ASCII
)


@dataclass(frozen=True)
class Duration:
    """A span of the calendar: so many months, and hours."""

    months: int
    hours: int

    def before(self, moment: datetime) -> datetime | None:
        """The moment so much earlier; None when the calendar does not reach back so far."""
        month = moment.year * 12 + moment.month - 1 - self.months
        year, month = month // 12, month % 12 + 1
        if year < 1:
            return None
        day = min(moment.day, calendar.monthrange(year, month)[1])
        try:
            return moment.replace(year=year, month=month, day=day) - timedelta(hours=self.hours)
        except OverflowError:
            return None


def parse_duration(text: str) -> Duration:
    """``1y6m2w3d12h`` or any part of it, in that order: years, months, weeks, days, hours."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidError(
            f"{text!r} is no duration: write years, months, weeks, days and hours as in 1y6m, 30d,"
            " 2w or 36h"
        )
    years, months, weeks, days, hours = (int(number or 0) for number in match.groups())
    duration = Duration(12 * years + months, 24 * (7 * weeks + days) + hours)
    if duration == Duration(0, 0):
        raise InvalidError(f"{text!r} is no time at all: leave the rule out, or give it more")
    return duration


def parse_limit(text: str) -> Limit:
    """A number from 1, or ``unlimited``."""
    if text.strip() == "unlimited":
        return UNLIMITED
    if not re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII) or int(text) == 0:
        raise InvalidError(
            f"{text!r} is no number of snapshots: write 1 or more, or 'unlimited'; a rule that is"
            " to keep none is left out"
        )
    return int(text)


@dataclass(frozen=True)
class Rules:
    """What to keep; None: there is no such rule. See the module's text."""

    last: Limit | None = None
    hourly: Limit | None = None
    daily: Limit | None = None
    weekly: Limit | None = None
    monthly: Limit | None = None
    yearly: Limit | None = None
    within: Duration | None = None

    @property
    def empty(self) -> bool:
        """Whether there is no rule at all, which must never be taken for "keep none"."""
        return all(getattr(self, rule.name) is None for rule in fields(self))


class Action(enum.StrEnum):
    """What becomes of a snapshot."""

    KEEP = "keep"
    DELETE = "delete"
    LEAVE = "leave"  # it is not understood


@dataclass(frozen=True)
class Decision:
    """What becomes of one snapshot; ``reasons`` are for people, one line each, never empty."""

    summary: Summary
    action: Action
    reasons: list[str]


_PERIODS: dict[str, Callable[[datetime], str]] = {
    "hourly": lambda moment: moment.strftime("%Y-%m-%d %H:00"),
    "daily": lambda moment: moment.strftime("%Y-%m-%d"),
    "weekly": lambda moment: moment.strftime("%G-W%V"),
    "monthly": lambda moment: moment.strftime("%Y-%m"),
    "yearly": lambda moment: moment.strftime("%Y"),
}


def decide(
    snapshots: Iterable[Summary],
    rules: Rules,
    now: float,
    protected: Collection[str] = (),
    unclear: Mapping[str, str] | None = None,
) -> list[Decision]:
    """Decide about the snapshots of one volume; the answer is newest first.

    ``now`` is in seconds since the epoch, and only tells times that cannot be; ``protected`` has
    pushes, ``unclear`` pushes that are not understood, with the reason. InvalidError without a
    rule.
    """
    if rules.empty:
        raise InvalidError("there is no rule that says what to keep")
    unclear = unclear or {}
    ordered = sorted(snapshots, key=lambda one: (one.created, one.pushed, one.push), reverse=True)
    reasons: dict[str, list[str]] = {}
    left: dict[str, str] = {}
    counted: list[tuple[Summary, datetime]] = []
    for summary in ordered:
        if summary.push in unclear:
            left[summary.push] = unclear[summary.push]
        elif not 0 <= summary.created <= now:
            when = "in the future" if summary.created > now else "before 1970"
            left[summary.push] = f"it was taken {when}: some clock was or is wrong"
        else:
            counted.append((summary, datetime.fromtimestamp(summary.created, UTC)))
            reasons[summary.push] = ["protected"] if summary.push in protected else []
    _count(counted, rules, reasons)
    decisions = []
    for summary in ordered:
        if summary.push in left:
            decisions.append(Decision(summary, Action.LEAVE, [left[summary.push]]))
        elif reasons[summary.push]:
            decisions.append(Decision(summary, Action.KEEP, reasons[summary.push]))
        else:
            decisions.append(Decision(summary, Action.DELETE, ["no rule keeps it"]))
    return decisions


def _count(
    counted: list[tuple[Summary, datetime]], rules: Rules, reasons: dict[str, list[str]]
) -> None:
    """Add to ``reasons`` why rules keep a snapshot; ``counted`` is newest first."""
    if rules.last is not None:
        for number, (summary, _) in enumerate(counted, 1):
            if number <= rules.last:
                reasons[summary.push].append(f"last {number} of {_limit(rules.last)}")
    for rule, period_of in _PERIODS.items():
        limit: Limit | None = getattr(rules, rule)
        if limit is None:
            continue
        found, previous = 0, ""
        for summary, moment in counted:
            period = period_of(moment)
            oldest = summary is counted[-1][0]
            if found < limit and (period != previous or oldest):
                found += 1
                why = f"{rule} {period}, {found} of {_limit(limit)}"
                reasons[summary.push].append(why + (", the oldest" if period == previous else ""))
            previous = period
    if rules.within is not None and counted:
        since = rules.within.before(counted[0][1])
        for summary, moment in counted:
            if since is None or moment >= since:
                reasons[summary.push].append(f"within {_duration(rules.within)} of the newest")


def _limit(limit: Limit) -> str:
    return "unlimited" if limit == UNLIMITED else f"{limit:.0f}"


def _duration(duration: Duration) -> str:
    years, months = divmod(duration.months, 12)
    days, hours = divmod(duration.hours, 24)
    parts = zip((years, months, days, hours), "ymdh", strict=True)
    return "".join(f"{number}{unit}" for number, unit in parts if number)
