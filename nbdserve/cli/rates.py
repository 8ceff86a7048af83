"""Rates and latencies of exports: the difference of two answers of ``GET /v1/measurements``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Rates:
    """Of one export between two answers.

    Requests and bytes a second; latencies in seconds, None without requests, infinite beyond the
    last bound; ``throttled`` is the part of the time that its connections have waited because of
    limits, summed up over them.
    """

    export: str
    iops: float = 0.0
    read_iops: float = 0.0
    write_iops: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    p50: float | None = None
    p99: float | None = None
    errors: float = 0.0
    throttled: float = 0.0
    in_flight: int = 0
    connections: int = 0


def name_of(export: Document) -> str:
    """What clients call it."""
    return (
        export["volume"] if export["snapshot"] is None else "{volume}@{snapshot}".format(**export)
    )


def rates_between(before: Document | None, after: Document) -> dict[str, Rates]:
    """By the export's name; all rates are 0 with nothing before, or an earlier daemon's."""
    seconds = 0.0 if before is None else after["uptime"] - before["uptime"]
    if before is None or seconds <= 0:
        before, seconds = after, 1.0
    earlier = {name_of(export): export for export in before["exports"]}
    found = {}
    for export in after["exports"]:
        name = name_of(export)
        found[name] = _rates(name, earlier.get(name), export, seconds, after["bounds"])
    return found


def _rates(
    name: str, before: Document | None, after: Document, seconds: float, bounds: Sequence[float]
) -> Rates:
    commands: Mapping[str, Document] = after["commands"]

    def grown(command: str, key: str) -> float:
        old = 0 if before is None else before["commands"][command][key]
        # What was deleted and made again under the same name has begun anew.
        return float(max(0, commands[command][key] - old))

    buckets = [0.0] * (len(bounds) + 1)
    for command, numbers in commands.items():
        old = None if before is None else before["commands"][command]["buckets"]
        for place, count in enumerate(numbers["buckets"]):
            buckets[place] += max(0, count - (0 if old is None else old[place]))
    throttled = 0.0 if before is None else before["throttled_seconds"]
    return Rates(
        name,
        sum(grown(command, "count") for command in commands) / seconds,
        grown("read", "count") / seconds,
        grown("write", "count") / seconds,
        grown("read", "bytes") / seconds,
        grown("write", "bytes") / seconds,
        quantile(0.5, buckets, bounds),
        quantile(0.99, buckets, bounds),
        sum(grown(command, "errors") for command in commands) / seconds,
        max(0.0, after["throttled_seconds"] - throttled) / seconds,
        after["in_flight"],
        after["connections"],
    )


def quantile(part: float, buckets: Sequence[float], bounds: Sequence[float]) -> float | None:
    """The latency that ``part`` of the requests do not exceed, as far as the buckets tell.

    Within a bucket they count as evenly spread; None without requests.
    """
    total = sum(buckets)
    if not total:
        return None
    left = part * total
    lower = 0.0
    for count, upper in zip(buckets, (*bounds, float("inf")), strict=True):
        if count and left <= count:
            return upper if upper == float("inf") else lower + (upper - lower) * left / count
        left -= count
        lower = upper
    return float("inf")
