"""``nbdserve policy``: what the policies of the configuration file come to.

A volume of a policy is **overdue** when its last success, or its creation, is longer ago than one
and a half of the times between two runs: a run was missed, and the next is not just being awaited.
"""

import shlex
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from backends.errors import NotFoundError, StorageError
from nbdserve.cli.configured import (
    config_option,
    configured_data,
    find_policy,
    program,
    read_config,
)
from nbdserve.cli.options import data_option, given_data_directory, json_option
from nbdserve.cli.output import print_json, print_listing, print_table, seconds_of
from nbdserve.cli.session import Session
from nbdserve.configuration.policies import Policy
from nbdserve.configuration.settings import Settings
from nbdserve.control.client import path
from nbdserve.control.documents import timestamp

_LATE = 1.5

Document = dict[str, Any]

_COLUMNS = {
    "policy": lambda p: p["policy"],
    "schedule": lambda p: p["schedule"] or "-",
    "volumes": lambda p: str(len(p["volumes"])),
    "repository": lambda p: p["repository"],
    "oldest success": lambda p: _oldest(p["volumes"]),
    "problems": lambda p: str(sum(volume["problem"] is not None for volume in p["volumes"]) or "-"),
}


@click.group()
def policy() -> None:
    """Policies of backups, which the configuration file has and cron or systemd runs."""


@policy.command("list")
@config_option
@data_option
@json_option
def list_(config: Path | None, as_json: bool) -> None:
    """List the policies: which volumes each is for, and how their last backups ended."""
    settings = read_config(config)
    print_listing("policies", _survey(settings, settings.policies), as_json, _COLUMNS)


@policy.command()
@click.argument("names", metavar="[NAME…]", nargs=-1)
@config_option
@data_option
@json_option
def check(names: tuple[str, ...], config: Path | None, as_json: bool) -> None:
    """Exit with 1 when a backup is overdue or has failed, of these policies or of any."""
    settings = read_config(config)
    policies = [find_policy(settings, config, name) for name in names] or settings.policies
    if not policies:
        raise NotFoundError(f"no policy in {config}")
    found = _survey(settings, policies)
    rows = [
        [entry["policy"], volume["volume"], volume["problem"]]
        for entry in found
        for volume in entry["volumes"]
        if volume["problem"] is not None
    ]
    if as_json:
        print_json({"policies": found})
    elif rows:
        print_table(["policy", "volume", "problem"], rows)
    else:
        names = tuple(entry["policy"] for entry in found)
        click.echo(f"well: {', '.join(names)}")
    if rows:
        name, volume, problem = rows[0]
        more = f", and {len(rows) - 1} more" if len(rows) > 1 else ""
        raise StorageError(f"policy {name}: volume {volume}: {problem}{more}")


@policy.command()
@click.option(
    "--user", metavar="USER", help="With this user in each line, as /etc/cron.d wants it."
)
@config_option
@data_option
def crontab(user: str | None, config: Path | None) -> None:
    """Print a crontab with a line for each policy that has a schedule."""
    settings = read_config(config)
    assert config is not None
    click.echo("# Made by 'nbdserve policy crontab'.")
    click.echo(f"NBDSERVE_CONFIG={config.absolute()}")
    data = given_data_directory()
    if data is not None:
        click.echo(f"NBDSERVE_DATA={data.absolute()}")
    for entry in settings.policies:
        if entry.schedule is not None:
            command = shlex.quote(program()).replace("%", "\\%")
            fields = [entry.schedule.cron, *([] if user is None else [user])]
            click.echo(f"{' '.join(fields)} {command} backup --policy {entry.name}")


@policy.command()
@click.argument("name")
@config_option
def timer(name: str, config: Path | None) -> None:
    """Print the schedule of a policy for systemd: nbdserve-backup@NAME.timer.d/schedule.conf."""
    found = find_policy(read_config(config), config, name)
    if found.schedule is None:
        raise NotFoundError(f"policy {name} has no schedule")
    click.echo(f"[Timer]\nOnCalendar=\nOnCalendar={found.schedule.calendar}")


def _survey(settings: Settings, policies: Sequence[Policy]) -> list[Document]:
    """Each policy with its volumes, and what is wrong with their backups."""
    with Session(configured_data(settings)) as session:
        listed = session.client.get(path("volumes"))
        history = session.client.get(path("status"))["history"]
    created = {found["name"]: found["created"] for found in listed["volumes"]}
    for found in listed["unreadable"]:
        if found["name"] is not None:
            created.setdefault(found["name"], None)
    records = {(found["volume"], found["repository"]): found for found in history}

    def volumes_of(entry: Policy) -> list[Document]:
        volumes = [
            _volume(entry, volume, records.get((volume, entry.repository)), created[volume])
            for volume in entry.select(created)
        ]
        missing = [_lost(volume, "it does not exist") for volume in entry.missing([*created])]
        return volumes + missing or [_lost(", ".join(entry.volumes), "no volume matches")]

    return [
        {
            "policy": entry.name,
            "repository": entry.repository,
            "schedule": None if entry.schedule is None else entry.schedule.text,
            "volumes": volumes_of(entry),
        }
        for entry in policies
    ]


def _volume(entry: Policy, volume: str, record: Document | None, created: str | None) -> Document:
    known = record or {"last_success": None, "last_failure": None, "failure": None}
    success, failure = known["last_success"], known["last_failure"]
    problem = None
    if failure is not None and (success is None or failure > success):
        problem = f"the last backup failed: {known['failure']}"
    elif entry.schedule is not None:
        since = success if success is not None else _seconds(created)
        if time.time() - since > _LATE * entry.schedule.seconds:
            last = "there is none" if success is None else f"the last is of {_shown(success)}"
            problem = f"a backup is overdue: {last}, and the schedule says {entry.schedule.text}"
    return {
        "volume": volume,
        "last_success": None if success is None else timestamp(success),
        "last_failure": None if failure is None else timestamp(failure),
        "problem": problem,
    }


def _lost(volume: str, problem: str) -> Document:
    return {"volume": volume, "last_success": None, "last_failure": None, "problem": problem}


def _seconds(created: str | None) -> float:
    """A time of the control socket's as seconds since the epoch; long ago when it is not known."""
    return 0.0 if created is None else datetime.fromisoformat(created).timestamp()


def _shown(seconds: float) -> str:
    return seconds_of(timestamp(seconds))


def _oldest(volumes: Sequence[Document]) -> str:
    times = [volume["last_success"] for volume in volumes]
    return "-" if None in times else seconds_of(min(times))
