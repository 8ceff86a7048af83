"""Options that many commands take."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from snapshots.names import parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_DATA = "nbdserve.data"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _keep_data(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value == "":
        raise click.BadParameter("it is empty", context, parameter)
    if value is not None:
        context.meta[_DATA] = Path(value)  # meta is shared with the groups above and below


def _complete_directory(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list["CompletionItem[str]"]:
    """A directory: the shell's own business."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415

    return [CompletionItem(incomplete, type="dir")]


def data_option(function: Decorated) -> Decorated:
    """``--data DIR``: taken before or behind the command; the one behind wins.

    The environment is not click's business here: it would win over an option before the command.
    """
    return click.option(
        "--data",
        metavar="DIR",
        expose_value=False,
        callback=_keep_data,
        shell_complete=_complete_directory,
        help="The data directory; NBDSERVE_DATA in the environment says the same.",
    )(function)


def json_option(function: Decorated) -> Decorated:
    """``--json``, passed as ``as_json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Write the result as JSON, sizes in bytes."
    )(function)


def force_option(function: Decorated) -> Decorated:
    """``--force`` of what makes volumes larger or more."""
    return click.option(
        "--force", is_flag=True, help="Go beyond the max_overcommit of the configuration."
    )(function)


def skip_damaged_option(function: Decorated) -> Decorated:
    """``--skip-damaged``."""
    return click.option(
        "--skip-damaged",
        is_flag=True,
        help="Take what is sound; list what is missing or damaged, which reads as zeros.",
    )(function)


class Duration(click.ParamType[float]):
    """A length of time such as ``90s``, ``30m``, ``12h``, ``7d`` or ``2w``; seconds as a float."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        match = re.fullmatch(r"([0-9]{1,6})([smhdw]?)", str(value), re.ASCII)
        if match is None or not (match[2] or match[1] == "0"):
            self.fail(f"{value!r} is no time such as 90s, 30m, 12h or 7d", param, ctx)
        return float(int(match[1]) * _SECONDS.get(match[2], 1))


def rate_option(function: Decorated) -> Decorated:
    """``--rate``; ``parse_rate`` reads it."""
    return click.option(
        "--rate",
        metavar="RATE",
        help="Bytes a second for what nobody reads yet, such as 50M; 0 for none, or unlimited."
        "  [default: unlimited]",
    )(function)


def parse_rate(text: str | None) -> int | None:
    """Bytes a second; None: no bound. InvalidError."""
    return None if text in (None, "unlimited") else parse_size(text)


def given_data_directory() -> Path | None:
    """The data directory that the command line or the environment names."""
    return data_directory_of(click.get_current_context())


def data_directory_of(context: click.Context) -> Path | None:
    """The data directory of a command line that may not be complete yet."""
    data = context.meta.get(_DATA)
    if isinstance(data, Path):
        return data
    named = os.environ.get("NBDSERVE_DATA")
    return Path(named) if named else None


def data_directory() -> Path:
    """The data directory: given, or that of the system's daemon; a usage error without either."""
    data = given_data_directory() or system_data_directory()
    if data is None:
        raise click.UsageError(
            "no data directory: give --data DIR or set NBDSERVE_DATA", click.get_current_context()
        )
    return data


def system_data_directory() -> Path | None:
    # Most commands are told where the data is, and need none of what this imports.
    from nbdserve.configuration import file  # noqa: PLC0415

    return file.read_data_directory(file.DEFAULT_FILE) if file.DEFAULT_FILE.exists() else None
