"""``--config`` of commands that work by what the daemon's configuration file says."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from backends.errors import NotFoundError
from nbdserve.cli.options import given_data_directory
from nbdserve.configuration.environment import named_file
from nbdserve.configuration.file import DEFAULT_FILE, read_file
from nbdserve.configuration.policies import Policy
from nbdserve.configuration.settings import Settings

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def config_option(function: Decorated) -> Decorated:
    """``--config FILE``, passed as ``config``."""
    return click.option(
        "--config",
        metavar="FILE",
        envvar="NBDSERVE_CONFIG",
        callback=lambda context, parameter, value: value or named_file(),
        type=click.Path(path_type=Path),
        help="The configuration file; NBDSERVE_CONFIG in the environment says the same."
        f"  [default: {DEFAULT_FILE}, if it exists]",
    )(function)


def read_config(config: Path | None) -> Settings:
    """What the file says; a usage error when there is none."""
    if config is None:
        raise click.UsageError(
            "no configuration file: give --config FILE or set NBDSERVE_CONFIG",
            click.get_current_context(),
        )
    return read_file(config)


def configured_data(settings: Settings) -> Path:
    """The data directory: the command line wins, then the environment, then the file."""
    data = given_data_directory() or settings.data
    if data is None:
        raise click.UsageError(
            "no data directory: give --data DIR, set NBDSERVE_DATA or write 'data' in the"
            " configuration file",
            click.get_current_context(),
        )
    return data


def find_policy(settings: Settings, config: Path | None, name: str) -> Policy:
    """NotFoundError names those that there are."""
    for policy in settings.policies:
        if policy.name == name:
            return policy
    names = ", ".join(policy.name for policy in settings.policies) or "there is none"
    raise NotFoundError(f"no policy {name!r} in {config}: {names}")


def program() -> str:
    """The path by which this command was called, for who has another PATH."""
    called = Path(sys.argv[0])
    return str(called.absolute()) if called.name == "nbdserve" else "nbdserve"
