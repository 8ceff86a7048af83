"""The top of the command line, and what becomes of errors."""

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from backends.errors import StorageError, one_line
from nbdserve.cli.lazy_group import LazyGroup
from nbdserve.cli.options import data_option

_COMMANDS = {
    "serve": "nbdserve.cli.serve:serve",
    "volume": "nbdserve.cli.volume:volume",
    "snapshot": "nbdserve.cli.snapshot:snapshot",
    "repo": "nbdserve.cli.repo:repo",
    "backup": "nbdserve.cli.backup:backup",
    "policy": "nbdserve.cli.policy:policy",
    "attach": "nbdserve.cli.attach:attach",
    "detach": "nbdserve.cli.attach:detach",
    "attached": "nbdserve.cli.attach:attached",
    "status": "nbdserve.cli.status:status",
    "completion": "nbdserve.cli.completion:completion",
    "check": "nbdserve.cli.check:check",
    "config": "nbdserve.cli.config:config",
    "reload": "nbdserve.cli.reload:reload",
}

COMPLETION = "_NBDSERVE_COMPLETE"
"""The variable with which a shell asks for completions, as click names it."""

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


@click.group(cls=LazyGroup, lazy=_COMMANDS, name="nbdserve")
@click.version_option(package_name="nbdserve", message="%(prog)s %(version)s")
@data_option
def application() -> None:
    """Thin volumes over NBD, with snapshots and incremental backups.

    A size takes K, M, G or T (powers of 1024). A snapshot is VOLUME@SNAPSHOT. A repository is
    file:///directory or s3://bucket/prefix; credentials and endpoint come the AWS way.
    """


def main() -> NoReturn:
    """Run the command line of this process."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a locale without … is no reason to fail
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard_output()
        if not isinstance(error, BrokenPipeError) and status == 0:
            status = fail(f"standard output: {one_line(error)}")
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """The exit status of one command line; every error is one line on standard error."""
    logging.basicConfig(level=logging.WARNING, handlers=[_line_handler()])
    signal.signal(signal.SIGTERM, _terminate)
    if COMPLETION in os.environ:
        import nbdserve.cli.completion  # noqa: F401, PLC0415 - which adds to what click knows
    try:
        result = application.main(list(arguments), prog_name="nbdserve", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        return fail(_usage_line(error), status=2)
    except click.ClickException as error:
        return fail(error.format_message())
    except click.Abort:
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except StorageError as error:
        return fail(one_line(error))
    except OSError as error:
        return fail(one_line(error))
    except Exception as error:
        return fail(_internal_line(error))
    return result if isinstance(result, int) else 0


def fail(line: str, *, status: int = 1) -> int:
    """Say why, and return the exit status."""
    try:
        click.echo(f"nbdserve: {line}", err=True)
    except OSError:
        _discard_output()
    return status


def _usage_line(error: click.UsageError) -> str:
    line = " ".join(error.format_message().split())
    if error.ctx is None:
        return line
    command = error.ctx.command_path
    return f"{line.rstrip('.')}; see '{command} --help'"


def _internal_line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    name = Path(where.filename).name
    return f"internal error: {type(error).__name__}: {one_line(error)} ({name}:{where.lineno})"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Leave through the ``finally`` clauses, so that what is half-made is taken back."""
    sys.exit(TERMINATED)


def _discard_output() -> None:
    """Keep the interpreter's flush at exit from complaining about a stream that is gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


class _LineFormatter(logging.Formatter):
    """One line a record: no traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"nbdserve: {record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            line += f": {one_line(record.exc_info[1])}"
        return line


def _line_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter())
    return handler
