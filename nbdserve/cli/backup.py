"""``nbdserve backup``: one line in a crontab; ``backup_run`` has the order of things.

Exit status, beside what all commands have: 1 when anything failed, though other volumes may be
backed up; 75 (EX_TEMPFAIL of sysexits.h) when nothing was done because another backup of a volume,
or another run of the policy, is under way.
"""

import os
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from backends.errors import StorageError, one_line
from nbdserve.cli.backup_plan import Plan, given_hooks, plan_of_options, plan_of_policy
from nbdserve.cli.backup_run import AnotherRunsError, BackupRun
from nbdserve.cli.completing import complete_volume
from nbdserve.cli.configured import config_option, configured_data, find_policy, read_config
from nbdserve.cli.keeping import storage_class_option
from nbdserve.cli.key_options import add_key_options
from nbdserve.cli.limits import limit_options
from nbdserve.cli.options import Duration, data_directory, data_option, json_option
from nbdserve.cli.output import print_json
from nbdserve.cli.pruning import given_rules, keep_options
from nbdserve.cli.session import Session
from nbdserve.control.documents import timestamp
from nbdserve.hooks.freezing import DEFAULT_SECONDS, MOST_SECONDS

_BESIDE_A_POLICY = {"policy", "config", "wait", "data", "as_json", "help"}


@click.command()
@click.argument("volumes", metavar="[VOL…]", nargs=-1, shell_complete=complete_volume)
@click.option("--repo", "url", metavar="URL", help="Where to.")
@click.option(
    "--policy",
    metavar="NAME",
    help="Back up what this policy of the configuration file says, in the place of VOL… and of the"
    " options that say the same.",
)
@config_option
@click.option(
    "--wait",
    metavar="TIME",
    type=Duration(),
    default="0",
    help="Wait so long for another backup of the volumes to end, such as 30m.  [default: not]",
)
@keep_options
@click.option(
    "--freeze-command",
    metavar="COMMAND",
    help="Run this before the snapshot, without a shell, to quiesce guests; needs --thaw-command.",
)
@click.option(
    "--thaw-command", metavar="COMMAND", help="Run this behind the snapshot, whatever happens."
)
@click.option(
    "--freeze-timeout",
    metavar="SECONDS",
    type=click.IntRange(1, MOST_SECONDS),
    help=f"From the beginning of the freeze to the thaw, at most.  [default: {DEFAULT_SECONDS}]",
)
@storage_class_option
@limit_options
@data_option
@json_option
def backup(
    volumes: tuple[str, ...],
    url: str | None,
    policy: str | None,
    config: Path | None,
    wait: float,
    as_json: bool,
    **given: Any,
) -> int:
    """Take a snapshot of the volumes, all at one instant, and push what changed since the last.

    Of the snapshots that earlier backups made, only the newest stays in the data directory. In the
    repository all of them stay, unless --keep-… options say which.

    The exit status is 75 when nothing was done because another backup of the volumes runs.
    """
    if policy is not None:
        _refuse_what_a_policy_says()
        settings = read_config(config)
        plan = plan_of_policy(find_policy(settings, config, policy))
        data = configured_data(settings)
    else:
        _require(volumes, url)
        assert url is not None
        hooks = given_hooks({name: given.pop(name) for name in _HOOKS})
        plan = plan_of_options(volumes, url, given_rules(given), hooks)
        data = data_directory()
    return _run(data, plan, wait, as_json=as_json)


add_key_options(backup)

_HOOKS = ("freeze_command", "thaw_command", "freeze_timeout")


def _run(data: Path, plan: Plan, wait: float, *, as_json: bool) -> int:
    started = time.time()
    with Session(data) as session:
        run = BackupRun(session, plan)
        error: StorageError | OSError | None = None
        try:
            run.run(wait)
        except (StorageError, OSError) as caught:
            error = caught
        failures = [*run.failures, *([] if error is None else [one_line(error)])]
        skipped = isinstance(error, AnotherRunsError)
        if as_json:
            print_json(
                {
                    "policy": plan.policy_name,
                    "repository": None if "@" in plan.url else plan.url,  # could be a password
                    "status": "skipped" if skipped else "failed" if failures else "done",
                    "error": "; ".join(failures) or None,
                    "started": timestamp(started),
                    "finished": timestamp(time.time()),
                    "snapshot": run.snapshot,
                    "hooks": run.hooks,
                    "backups": run.reports,
                }
            )
        else:
            for line in run.lines:
                click.echo(line)
    if skipped:
        click.echo(f"nbdserve: {failures[0]}", err=True)
        return os.EX_TEMPFAIL
    if failures:
        raise StorageError("; ".join(failures))
    return 0


def _require(volumes: tuple[str, ...], url: str | None) -> None:
    context = click.get_current_context()
    if not volumes:
        raise click.UsageError("name the volumes, or a policy with --policy", context)
    if url is None:
        raise click.UsageError("--repo is missing: where to", context)
    if context.get_parameter_source("config") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--config is for --policy", context)


def _refuse_what_a_policy_says() -> None:
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if given and name not in _BESIDE_A_POLICY:
            called = "VOL" if isinstance(parameter, click.Argument) else parameter.opts[0]
            raise click.UsageError(f"{called}: that is for the policy to say", context)
