"""When a policy is to be run: a few words, which cron and systemd can be told exactly.

======================  ===================================================================
``every 15m``           at minutes 0, 15, 30 and 45; 1, 2, 3, 4, 5, 6, 10, 12, 15, 20 or 30
``every 6h``            at 0:00, 6:00, 12:00 and 18:00; 1, 2, 3, 4, 6, 8 or 12
``hourly :15``          a quarter past; ``hourly`` at the full hour
``daily 02:15``         ``daily`` at midnight
``weekly sun 02:15``    mon, tue, wed, thu, fri, sat, sun; ``weekly`` on Monday at midnight
``monthly 1 02:15``     days 1 to 28; ``monthly`` on the first at midnight
======================  ===================================================================

The time is the host's, as for cron and systemd. Nothing here runs anything: see docs/schedules.md.
"""

import re
from dataclasses import dataclass
from typing import Final

from backends.errors import InvalidError

MEANING: Final = "every 15m, every 6h, hourly :15, daily 02:15, weekly sun 02:15 or monthly 1 02:15"

_MINUTES: Final = (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30)
_HOURS: Final = (1, 2, 3, 4, 6, 8, 12)
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HOUR: Final = 3600
_DAY: Final = 24 * _HOUR

_SCHEDULE: Final = re.compile(
    r"every (?P<number>\d{1,2})(?P<unit>[mh])"
    r"|hourly(?: :(?P<past>\d\d))?"
    r"|daily(?: (?P<daily>\d\d:\d\d))?"
    r"|weekly(?: (?P<weekday>[a-z]{3}) (?P<weekly>\d\d:\d\d))?"
    r"|monthly(?: (?P<day>\d{1,2}) (?P<monthly>\d\d:\d\d))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Schedule:
    """``text`` is as it was written, ``cron`` the five fields of crontab(5), ``calendar`` that of
    systemd.time(7); ``seconds`` is the longest time between two runs.
    """

    text: str
    cron: str
    calendar: str
    seconds: int


def parse_schedule(text: str) -> Schedule:
    """InvalidError when it is none."""
    match = _SCHEDULE.fullmatch(" ".join(text.lower().split()))
    if match is None:
        raise _invalid(text)
    word = match[0].split()[0]
    if word == "every":
        return _every(text, int(match["number"]), match["unit"])
    if word == "hourly":
        minute = int(match["past"] or 0)
        if minute > 59:
            raise _invalid(text)
        return Schedule(text, f"{minute} * * * *", f"*-*-* *:{minute:02}:00", _HOUR)
    hour, minute = _time(text, match["daily"] or match["weekly"] or match["monthly"] or "00:00")
    at = f"{hour:02}:{minute:02}:00"
    if word == "daily":
        return Schedule(text, f"{minute} {hour} * * *", f"*-*-* {at}", _DAY)
    if word == "weekly":
        weekday = match["weekday"] or "mon"
        if weekday not in _DAYS:
            raise _invalid(text)
        calendar = f"{weekday.capitalize()} *-*-* {at}"
        number = (_DAYS.index(weekday) + 1) % 7
        return Schedule(text, f"{minute} {hour} * * {number}", calendar, 7 * _DAY)
    day = int(match["day"] or 1)
    if not 1 <= day <= 28:
        raise _invalid(text)
    return Schedule(text, f"{minute} {hour} {day} * *", f"*-*-{day:02} {at}", 31 * _DAY)


def _every(text: str, number: int, unit: str) -> Schedule:
    if number not in (_MINUTES if unit == "m" else _HOURS):
        raise _invalid(text)
    if unit == "m":
        step = "*" if number == 1 else f"*/{number}"
        return Schedule(text, f"{step} * * * *", f"*-*-* *:00/{number:02}:00", 60 * number)
    step = "*" if number == 1 else f"*/{number}"
    return Schedule(text, f"0 {step} * * *", f"*-*-* 00/{number:02}:00:00", _HOUR * number)


def _time(text: str, time: str) -> tuple[int, int]:
    hour, minute = map(int, time.split(":"))
    if hour > 23 or minute > 59:
        raise _invalid(text)
    return hour, minute


def _invalid(text: str) -> InvalidError:
    return InvalidError(f"{text[:60]!r} is no schedule: write {MEANING}")
