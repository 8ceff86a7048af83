"""``nbdserve repo export`` and ``repo import``: disk images, without a volume or a daemon."""

import contextlib
import dataclasses
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from backends.errors import InvalidError, NoSpaceError, NotFoundError, StorageError, one_line
from nbdserve.cli.completing import complete_file
from nbdserve.cli.keeping import at_option, storage_class_option
from nbdserve.cli.limits import limit_options
from nbdserve.cli.options import json_option, skip_damaged_option
from nbdserve.cli.output import format_size, print_result
from nbdserve.cli.progress import Progress
from nbdserve.cli.reports import check_whole, print_holes, print_notice, print_warnings, push_line
from nbdserve.cli.unlocking import open_repository
from snapshots.images.export import ExportReport, export_to_file, export_to_stream
from snapshots.images.formats import Format
from snapshots.images.source import ImageSource, looks_like_qcow2
from snapshots.images.spool import spool
from snapshots.names import parse_snapshot_name

_STDIO = "-"
_FORMATS = click.Choice([image_format.value for image_format in Format])


@click.command("export")
@click.argument("url")
@click.argument("snapshot", metavar="VOL@SNAP")
@click.argument("file", metavar="FILE|-", shell_complete=complete_file)
@click.option("--format", "given", type=_FORMATS, help="qcow2 if FILE ends in .qcow2, else raw.")
@click.option("--force", is_flag=True, help="Replace FILE once the new one is whole.")
@at_option
@limit_options
@skip_damaged_option
@json_option
def export(
    url: str,
    snapshot: str,
    file: str,
    given: str | None,
    force: bool,
    skip_damaged: bool,
    as_json: bool,
) -> None:
    """Write a snapshot at URL as a disk image; everything read is verified.

    FILE appears when it is whole, with holes where there are zeros. "-" is standard output, raw:
    there, a failure shows in the exit status alone.
    """
    volume, name = parse_snapshot_name(snapshot)
    image_format = _format(file, given)
    if file == _STDIO:
        if as_json or image_format is not Format.RAW:
            raise click.UsageError(
                "standard output takes the raw image, and no JSON beside it",
                click.get_current_context(),
            )
        if sys.stdout is None:
            raise InvalidError("standard output is closed")
        if sys.stdout.isatty():
            raise InvalidError("standard output is a terminal: send the image to a file or a pipe")
    repository = open_repository(url)
    with Progress(f"exporting {snapshot}") as progress:
        if file == _STDIO:
            report = export_to_stream(
                repository, volume, name, sys.stdout.fileno(), progress.update,
                skip_damaged=skip_damaged,
            )  # fmt: skip
        else:
            report = export_to_file(
                repository, volume, name, Path(file), image_format,
                replace=force, skip_damaged=skip_damaged, progress=progress.update,
            )  # fmt: skip
    if file == _STDIO:
        click.echo(_export_line(report, "standard output"), err=True)
        for hole in report.holes:
            lost = f"{hole.length} bytes at offset {hole.offset}"
            click.echo(f"nbdserve: lost, and zeros now: {lost}: {hole.problem}", err=True)
    else:
        document = dataclasses.asdict(report) | {"file": file}
        print_result(document, as_json, _export_line(report, file))
        if not as_json:
            print_holes(report.holes)
    check_whole(report.holes, snapshot, "standard output" if file == _STDIO else file)


@click.command("import")
@click.argument("file", metavar="FILE|-", shell_complete=complete_file)
@click.argument("url")
@click.argument("snapshot", metavar="VOL@SNAP")
@click.option("--format", "given", type=_FORMATS, help="qcow2 if FILE ends in .qcow2, else raw.")
@storage_class_option
@limit_options
@json_option
def import_(file: str, url: str, snapshot: str, given: str | None, as_json: bool) -> None:
    """Store a disk image at URL as a snapshot; "-" is standard input.

    All of it is read; what is as in the newest snapshot of the volume there is not stored again.
    """
    volume, name = parse_snapshot_name(snapshot)
    image_format = _format(file, given)
    repository = open_repository(url)
    print_notice(repository)
    with _open(file) as (descriptor, shown):
        if given is None and image_format is Format.RAW and looks_like_qcow2(descriptor):
            raise InvalidError(
                f"{shown} looks like qcow2: say --format qcow2, or --format raw to take it as it is"
            )
        source = ImageSource(repository, volume, name, descriptor, shown, image_format)
        with Progress(f"importing {snapshot}") as progress:
            report = repository.push(source, progress.update)
    print_warnings(report)
    if source.size != source.image_size:
        click.echo(
            f"nbdserve: warning: {shown} has {source.image_size} bytes; zeros were added up to"
            f" {source.size}, a multiple of 4 KiB",
            err=True,
        )
    document = dataclasses.asdict(report) | {"size": source.size}
    print_result(document, as_json, push_line(report))


def _format(file: str, given: str | None) -> Format:
    if given is not None:
        return Format(given)
    return Format.QCOW2 if file.endswith(".qcow2") else Format.RAW


@contextlib.contextmanager
def _open(file: str) -> Iterator[tuple[int, str]]:
    """Yield a descriptor that can be read at any place, and what messages call it."""
    with contextlib.ExitStack() as stack:
        if file == _STDIO:
            if sys.stdin is None:
                raise InvalidError("standard input is closed")
            descriptor, shown = sys.stdin.fileno(), "standard input"
        else:
            descriptor, shown = _open_file(file), file
            stack.callback(os.close, descriptor)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise InvalidError(f"{shown} is a directory: name the file of a disk image")
        seekable = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
        if seekable and os.lseek(descriptor, 0, os.SEEK_CUR) == 0:
            yield descriptor, shown
            return
        copy = stack.enter_context(tempfile.TemporaryFile())
        try:
            spool(descriptor, copy.fileno())
        except OSError as error:
            raise NoSpaceError(
                f"cannot keep {shown} in {tempfile.gettempdir()}: {error.strerror}; TMPDIR in the"
                " environment names another directory"
            ) from error
        yield copy.fileno(), shown


def _open_file(file: str) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}") from None
    except OSError as error:
        raise StorageError(f"cannot open {file}: {one_line(error)}") from None


def _export_line(report: ExportReport, where: str) -> str:
    return (
        f"exported {report.volume}@{report.snapshot} to {where} as {report.format}:"
        f" {format_size(report.data)} of {format_size(report.size)} are data,"
        f" in {report.seconds:.1f} s"
    )
