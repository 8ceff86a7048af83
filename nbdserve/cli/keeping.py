"""``--storage-class``, of commands that store segments, and ``--at``, of those that only read.

backends/s3_settings.py has the rest of how objects are kept, which is said in the environment.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from backends.errors import InvalidError
from backends.s3_settings import check_storage_class

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_CLASS = "nbdserve.storage_class"
_AT = "nbdserve.at"


def _keep(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    try:
        context.meta[_CLASS] = check_storage_class(value)
    except InvalidError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def storage_class_option(function: Decorated) -> Decorated:
    """Let a command take it."""
    return click.option(
        "--storage-class",
        metavar="CLASS",
        expose_value=False,
        callback=_keep,
        help="S3: store data (the segments) in this class, such as STANDARD_IA;"
        " NBDSERVE_S3_STORAGE_CLASS in the environment says the same.",
    )(function)


def given_storage_class() -> str | None:
    """The class that the command line names."""
    given: str | None = click.get_current_context().meta.get(_CLASS)
    return given


def use_storage_class(name: str) -> None:
    """As if the command line named it."""
    click.get_current_context().meta[_CLASS] = name


def _keep_time(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    try:
        at = datetime.fromisoformat(value)
        context.meta[_AT] = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{value[:40]!r} is no time such as 2026-11-21T18:30:00Z", context, parameter
        ) from None


def at_option(function: Decorated) -> Decorated:
    """Let a command take it."""
    return click.option(
        "--at",
        metavar="TIME",
        expose_value=False,
        callback=_keep_time,
        help="S3: read the bucket as it was then, such as 2026-11-21T18:30:00Z (UTC unless it says"
        " otherwise), if it keeps versions.",
    )(function)


def given_time() -> float | None:
    """The time that the command line names, in seconds since the epoch."""
    given: float | None = click.get_current_context().meta.get(_AT)
    return given


def refuse_time() -> None:
    """UsageError when a time was given to a command that lets the daemon read."""
    if given_time() is not None:
        raise click.UsageError(
            "--at: what is restored lazily is read by the daemon, as it is now",
            click.get_current_context(),
        )
