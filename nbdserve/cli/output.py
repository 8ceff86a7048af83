"""Results on standard output: JSON, or text for people."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

from snapshots.names import format_size as format_size  # noqa: PLC0414 - for all that print

Document = Mapping[str, Any]


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def print_result(document: Document, as_json: bool, line: str) -> None:
    """The outcome of a command that changed something."""
    if as_json:
        print_json(document)
    else:
        click.echo(line)


def print_listing(
    name: str,
    documents: Sequence[Document],
    as_json: bool,
    columns: Mapping[str, Callable[[Document], str]],
) -> None:
    """A table with a line a document, or ``{name: [document, …]}``."""
    if as_json:
        print_json({name: documents})
    else:
        print_table(list(columns), ([cell(row) for cell in columns.values()] for row in documents))


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell."""
    lines = [[title.upper() for title in titles], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def print_difference(document: Document, as_json: bool) -> None:
    """A list of changed blocks: the ``extents`` of ``document``."""
    if as_json:
        print_json(document)
        return
    print_table(
        ["offset", "length", "content"],
        (
            [str(e["offset"]), str(e["length"]), "zero" if e["zero"] else "data"]
            for e in document["extents"]
        ),
    )


def print_fields(document: Document, as_json: bool, fields: Mapping[str, str]) -> None:
    """One thing, a field a line."""
    if as_json:
        print_json(document)
        return
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        click.echo(f"{name.ljust(width)}  {value}")


def describe_unreadable(volume: Document) -> str:
    """A volume that cannot be served, and why."""
    return f"volume {volume['name'] or volume['id']} cannot be read: {volume['problem']}"


def describe_hydration(hydration: Document | None) -> str:
    """How far a volume that was restored lazily is."""
    if hydration is None:
        return "whole"
    fetched, total = format_size(hydration["fetched"]), format_size(hydration["total"])
    rate = hydration["rate"]
    speed = "" if rate is None else f", at most {format_size(rate)} a second by itself"
    problem = "" if hydration["problem"] is None else f"; {hydration['problem']}"
    return (
        f"{fetched} of {total} ({percentage(hydration)}) of {hydration['source']}{speed}{problem}"
    )


def describe_limits(limits: Document) -> str:
    """What holds for a volume, and by whose word."""
    parts = []
    for rate, unit, show in (("iops", "requests", str), ("bandwidth", "bytes", format_size)):
        if limits[rate] is not None:
            burst = limits[f"{rate}_burst"]
            at_once = "" if burst is None else f" (bursts of {show(burst)})"
            parts.append(f"{show(limits[rate])} {unit} a second{at_once}")
    by = ", by the configuration" if limits["source"] == "configuration" and parts else ""
    return (" and ".join(parts) or "no limits") + by


def percentage(hydration: Document) -> str:
    """The part of it that is here."""
    return f"{100 * hydration['fetched'] // max(1, hydration['total'])} %"


def seconds_of(timestamp: str) -> str:
    """An ISO 8601 time without its milliseconds."""
    return timestamp.partition(".")[0] + "Z" if "." in timestamp else timestamp
