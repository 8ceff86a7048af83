"""``--limit-upload`` and ``--limit-download``, of commands that move a repository's data.

They are kept in the context, and applied where the command opens its repository.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from backends.bandwidth import LimitedObjectStore, check_rate
from backends.errors import InvalidError
from backends.objects import ObjectStore
from snapshots.names import parse_size

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_LIMITS = "nbdserve.limits"


def _keep(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None or parameter.name is None:
        return
    try:
        rate = check_rate(parse_size(value))
    except InvalidError as error:
        raise click.BadParameter(str(error), context, parameter) from None
    context.meta.setdefault(_LIMITS, {})[parameter.name] = rate


def limit_options(function: Decorated) -> Decorated:
    """Let a command take both limits."""
    for name, what in (("download", "read from"), ("upload", "written to")):
        function = click.option(
            f"--limit-{name}",
            name,
            metavar="RATE",
            expose_value=False,
            callback=_keep,
            help=f"Most bytes a second {what} the repository, such as 50M.  [default: unlimited]",
        )(function)
    return function


def limited(store: ObjectStore) -> ObjectStore:
    """``store``, held to the limits that the command was given."""
    limits: dict[str, int] = click.get_current_context().meta.get(_LIMITS, {})
    if not limits:
        return store
    return LimitedObjectStore(store, limits.get("upload"), limits.get("download"))


def use_limits(limits: Mapping[str, int]) -> None:
    """As if the command line gave these: bytes a second of ``upload`` and ``download``."""
    click.get_current_context().meta[_LIMITS] = dict(limits)


def refuse_limits() -> None:
    """UsageError when a limit was given to a command that moves no data itself."""
    for name in click.get_current_context().meta.get(_LIMITS, {}):
        raise click.UsageError(
            f"--limit-{name}: the daemon fetches what is restored lazily: --rate is its limit",
            click.get_current_context(),
        )
