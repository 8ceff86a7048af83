"""``--storage-class``, of commands that store segments.

backends/s3_settings.py has the rest of how objects are kept, which is said in the environment.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from backends.errors import InvalidError
from backends.s3_settings import check_storage_class

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_CLASS = "nbdserve.storage_class"


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
