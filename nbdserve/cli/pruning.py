"""``nbdserve repo prune``, ``protect`` and ``unprotect``; the rules that ``backup`` takes too."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from backends.errors import InvalidError, NotFoundError
from nbdserve.cli.options import json_option
from nbdserve.cli.output import print_json, print_result, print_table, seconds_of
from nbdserve.cli.progress import Progress
from nbdserve.cli.reports import print_notice, summary_document
from nbdserve.cli.unlocking import open_repository
from nbdserve.control.documents import timestamp
from snapshots.names import check_name, parse_snapshot_name
from snapshots.repository import Repository
from snapshots.repository.prune import carry_out, plan_prune
from snapshots.repository.retention import (
    Action,
    Decision,
    Rules,
    parse_duration,
    parse_limit,
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


Parsed = TypeVar("Parsed")


def _parsed(
    parse: Callable[[str], Parsed],
) -> Callable[[click.Context, click.Parameter, str | None], Parsed | None]:
    """A callback that makes a usage error of what ``parse`` refuses."""

    def convert(
        context: click.Context, parameter: click.Parameter, value: str | None
    ) -> Parsed | None:
        try:
            return None if value is None else parse(value)
        except InvalidError as error:
            raise click.BadParameter(str(error), context, parameter) from None

    return convert


def keep_options(function: Decorated) -> Decorated:
    """``--keep-last N`` and so on; each is passed as ``keep_last``, None when it is not given."""
    texts = {
        "last": "Keep the N newest; N may be 'unlimited'.",
        "hourly": "Keep the newest of each of the N newest hours that have any.",
        "daily": "The same for days, in UTC.",
        "weekly": "The same for weeks, from Monday.",
        "monthly": "The same for months.",
        "yearly": "The same for years.",
    }
    function = click.option(
        "--keep-within",
        metavar="DURATION",
        callback=_parsed(parse_duration),
        help="Keep all that are up to so much older than the newest: 1y6m, 30d, 36h.",
    )(function)
    for rule, text in reversed(texts.items()):
        function = click.option(
            f"--keep-{rule}", metavar="N", callback=_parsed(parse_limit), help=text
        )(function)
    return function


def given_rules(given: Mapping[str, Any]) -> Rules:
    """The rules among the options of a command."""
    return Rules(**{name.removeprefix("keep_"): value for name, value in given.items()})


@click.command()
@click.argument("url")
@click.argument("volume", metavar="VOL")
@keep_options
@click.option("--dry-run", is_flag=True, help="Only say what would be done, and why.")
@json_option
def prune(url: str, volume: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Delete the snapshots of VOL at URL that no rule keeps; say why for each.

    At least one rule is needed. A snapshot is kept when any rule keeps it, or it is protected. One
    that cannot be understood is left alone.
    """
    rules = given_rules(given)
    if rules.empty:
        raise click.UsageError(
            "no rule says what to keep: give at least one --keep-… option",
            click.get_current_context(),
        )
    check_name("volume", volume)
    repository = open_repository(url)
    decisions = plan_prune(repository, volume, rules)
    if not decisions:
        raise NotFoundError(
            f"there is no snapshot of {volume} in {repository.store.name}; 'nbdserve repo list'"
            " shows what there is"
        )
    if not dry_run:
        print_notice(repository)
        decisions = delete_pruned(repository, volume, decisions)
    if as_json:
        print_json(prune_document(volume, decisions, dry_run=dry_run))
    else:
        _print_decisions(decisions)
        click.echo(prune_line(volume, decisions, dry_run=dry_run))


@click.command()
@click.argument("url")
@click.argument("snapshot", metavar="VOL@SNAP")
@json_option
def protect(url: str, snapshot: str, as_json: bool) -> None:
    """Protect a snapshot at URL: neither prune nor delete takes it away."""
    protected = open_repository(url).protect(*parse_snapshot_name(snapshot))
    document = {"protected": summary_document(protected)}
    print_result(document, as_json, f"protected {snapshot} at {url}")


@click.command()
@click.argument("url")
@click.argument("snapshot", metavar="VOL@SNAP")
@json_option
def unprotect(url: str, snapshot: str, as_json: bool) -> None:
    """Take the protection of a snapshot at URL back."""
    summary = open_repository(url).unprotect(*parse_snapshot_name(snapshot))
    document = {"unprotected": summary_document(summary)}
    print_result(document, as_json, f"{snapshot} at {url} is not protected any more")


def delete_pruned(
    repository: Repository, volume: str, decisions: Sequence[Decision]
) -> list[Decision]:
    """Carry the decisions out, and show the progress."""
    with Progress(f"pruning {volume}") as progress:
        return carry_out(repository, decisions, progress.update)


def prune_document(
    volume: str, decisions: Sequence[Decision], *, dry_run: bool = False
) -> dict[str, Any]:
    """What pruning did, or would do, as JSON."""
    return {
        "volume": volume,
        "dry_run": dry_run,
        "kept": _count(decisions, Action.KEEP),
        "deleted": _count(decisions, Action.DELETE),
        "left": _count(decisions, Action.LEAVE),
        "snapshots": [
            {
                "snapshot": decision.summary.snapshot,
                "push": decision.summary.push,
                "created": timestamp(decision.summary.created),
                "action": decision.action.value,
                "reasons": decision.reasons,
            }
            for decision in decisions
        ],
    }


def prune_line(volume: str, decisions: Sequence[Decision], *, dry_run: bool = False) -> str:
    """What pruning did, or would do, for people."""
    deleted, left = _count(decisions, Action.DELETE), _count(decisions, Action.LEAVE)
    alone = f", {left} left alone" if left else ""
    verb = "would delete" if dry_run else "deleted"
    kept = _count(decisions, Action.KEEP)
    return f"{verb} {deleted} of {len(decisions)} snapshots of {volume}, {kept} kept{alone}"


def _print_decisions(decisions: Sequence[Decision]) -> None:
    print_table(
        ["snapshot", "created", "action", "why"],
        (
            [
                decision.summary.label,
                seconds_of(timestamp(decision.summary.created)),
                decision.action.value,
                "; ".join(decision.reasons),
            ]
            for decision in decisions
        ),
    )


def _count(decisions: Sequence[Decision], action: Action) -> int:
    return sum(decision.action is action for decision in decisions)
