"""Options that name the key of a repository; nbdserve/repository_keys.py says what each means.

They are taken by every command of a :class:`RepositoryGroup`.
"""

from collections.abc import Mapping
from typing import Any

import click

from nbdserve.cli.completing import complete_file
from nbdserve.cli.lazy_group import LazyGroup

_SOURCE = "nbdserve.key"

_OPTIONS = {
    "passphrase_file": ("FILE", "Encrypted: the passphrase is the one line of FILE."),
    "passphrase_command": ("COMMAND", "Encrypted: the passphrase is what COMMAND prints."),
    "repo_key_file": ("FILE", "Encrypted: the key file."),
}


def _keep(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value == "":
        raise click.BadParameter("it is empty", context, parameter)
    if value is not None and parameter.name is not None:
        context.meta.setdefault(_SOURCE, {})[parameter.name] = value


def add_key_options(command: click.Command) -> None:
    """Let a command take the options that say where the repository's key is."""
    for name, (metavar, text) in _OPTIONS.items():
        option = "--" + name.replace("_", "-")
        command.params.append(
            click.Option(
                [option, name],
                metavar=metavar,
                help=text,
                expose_value=False,
                callback=_keep,
                shell_complete=complete_file if metavar == "FILE" else None,
            )
        )


class RepositoryGroup(LazyGroup):
    """A group whose commands open a repository: each takes the key's options."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        if not isinstance(cmd, click.Group):
            add_key_options(cmd)
        super().add_command(cmd, name)


def given_key_options() -> dict[str, Any]:
    """Those that the command line names, as ``KeySource`` takes them."""
    given: dict[str, Any] = click.get_current_context().meta.get(_SOURCE, {})
    return given


def use_key_options(given: Mapping[str, str]) -> None:
    """As if the command line named these."""
    click.get_current_context().meta[_SOURCE] = dict(given)


def refuse_key_options() -> None:
    """UsageError when an option names a key that the daemon, who opens the repository, has not."""
    for name in given_key_options():
        option = "--" + name.replace("_", "-")
        variable = "NBDSERVE_" + name.upper()
        raise click.UsageError(
            f"{option}: the daemon fetches what is restored lazily, so the key has to be named in"
            f" its environment: {variable}",
            click.get_current_context(),
        )
