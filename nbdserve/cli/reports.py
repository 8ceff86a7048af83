"""What commands say of a repository and of what was done with it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import click

from backends.errors import CorruptError
from nbdserve.cli.output import format_size, print_table
from nbdserve.control.documents import timestamp
from snapshots.repository import Damage, Hole, PushReport, Repository, Summary


def summary_document(summary: Summary) -> dict[str, Any]:
    """A snapshot in a repository, as JSON."""
    return dataclasses.asdict(summary) | {
        "created": timestamp(summary.created),
        "pushed": timestamp(summary.pushed),
    }


def push_line(report: PushReport) -> str:
    """What a push did, for people."""
    label = f"{report.volume}@{report.snapshot}"
    if report.already_there:
        return f"{label} was there already"
    against = f"since {report.parent}" if report.parent else "in full"
    repaired = ""
    if report.repaired:
        repaired = f", {format_size(report.repaired)} of them because of damage there"
    resumed = ""
    if report.resumed:
        resumed = f", {format_size(report.resumed)} had been uploaded before"
    return (
        f"pushed {label} {against}: {format_size(report.changed)} changed{repaired},"
        f" {format_size(report.uploaded)} uploaded{resumed} in {report.seconds:.1f} s"
    )


def damage_line(damage: Damage) -> str:
    """A damaged object, for people."""
    more = ""
    if len(damage.offsets) > 1:
        more = f"; in {len(damage.offsets)} places, from offset {damage.offsets[0]} on"
    needed = ", ".join(damage.snapshots)
    by = f"needed by {needed}" if needed else "no snapshot needs what is damaged"
    return f"{damage.key}: {damage.problem}{more}; {by}"


def print_holes(holes: Sequence[Hole]) -> None:
    """What could not be had of a snapshot, for people."""
    if holes:
        rows = ([str(hole.offset), str(hole.length), hole.problem] for hole in holes)
        print_table(["offset", "length", "lost, and zeros now, because"], rows)


def check_whole(holes: Sequence[Hole], snapshot: str, made: str) -> None:
    """CorruptError when something is lost."""
    if holes:
        count = len(holes)
        raise CorruptError(
            f"{made} lacks {format_size(sum(hole.length for hole in holes))} of {snapshot} in"
            f" {count} place{'s' if count > 1 else ''}, which read as zeros; the first is at offset"
            f" {holes[0].offset}: {holes[0].problem}"
        )


def print_notice(repository: Repository) -> None:
    """Say what the user must know about writing to the repository."""
    if repository.notice is not None:
        click.echo(f"nbdserve: warning: {repository.notice}", err=True)


def print_warnings(report: PushReport) -> None:
    for warning in report.warnings:
        click.echo(f"nbdserve: warning: {warning}", err=True)
