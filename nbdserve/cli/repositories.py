"""``nbdserve repo`` init, list, push, delete, verify and gc."""

import dataclasses
from typing import Any

import click

from backends.errors import CorruptError
from nbdserve.cli.completing import complete_snapshot
from nbdserve.cli.keeping import at_option, storage_class_option
from nbdserve.cli.limits import limit_options
from nbdserve.cli.options import (
    Duration,
    data_directory,
    data_option,
    json_option,
)
from nbdserve.cli.output import (
    format_size,
    print_json,
    print_listing,
    print_result,
    seconds_of,
)
from nbdserve.cli.progress import Progress
from nbdserve.cli.reports import (
    damage_line,
    print_notice,
    print_warnings,
    push_line,
    summary_document,
)
from nbdserve.cli.session import Session
from nbdserve.cli.transfer import push as push_snapshot
from nbdserve.cli.unlocking import (
    init_repository,
    open_repository,
)
from snapshots.names import check_name, parse_size, parse_snapshot_name
from snapshots.repository import (
    DEFAULT_CHUNK_SIZE,
    ObjectLock,
)

_COLUMNS = {
    "snapshot": lambda s: f"{s['volume']}@{s['snapshot']}",
    "size": lambda s: format_size(s["size"]),
    "data": lambda s: format_size(s["data"]),
    "stored": lambda s: format_size(s["stored"]),
    "uploaded": lambda s: format_size(s["uploaded"]),
    "created": lambda s: seconds_of(s["created"]),
    "parent": lambda s: s["parent"] or "-",
    "protected": lambda s: "yes" if s["protected"] else "-",
}


@click.command()
@click.argument("url")
@click.option(
    "--chunk-size",
    metavar="SIZE",
    default=format_size(DEFAULT_CHUNK_SIZE),
    show_default=True,
    help="A power of two from 4K to 4M; it never changes.",
)
@click.option(
    "--encrypt", is_flag=True, help="Encrypt it; a passphrase is asked for when no key is named."
)
@click.option(
    "--object-lock",
    metavar="TIME",
    type=Duration(),
    help="S3 Object Lock: for so long, such as 30d, no snapshot can be destroyed. The bucket must"
    " have been made with Object Lock.",
)
@click.option(
    "--object-lock-mode",
    type=click.Choice(["compliance", "governance"]),
    default="compliance",
    show_default=True,
    help="By nobody; or by nobody without the right to bypass it.",
)
@json_option
def init(
    url: str,
    chunk_size: str,
    encrypt: bool,
    object_lock: float | None,
    object_lock_mode: str,
    as_json: bool,
) -> None:
    """Make a repository at URL: the directory is created, a bucket must exist.

    With a passphrase or a key file it is encrypted. Keep that: nothing is restored without it.
    """
    lock = None if object_lock is None else ObjectLock(object_lock_mode.upper(), int(object_lock))
    repository = init_repository(url, parse_size(chunk_size), encrypt, lock)
    print_notice(repository)
    config = repository.config
    document: dict[str, Any] = {
        "url": url,
        "repository": config.repository_id,
        "chunk_size": config.chunk_size,
        "cipher": config.cipher,
    }
    if lock is not None:
        document["object_lock"] = lock._asdict()
    encrypted = "" if repository.keyring is None else "n encrypted"
    print_result(document, as_json, f"made a{encrypted} repository at {url}")


@click.command("list")
@click.argument("url")
@click.argument("volume", required=False)
@at_option
@json_option
def list_(url: str, volume: str | None, as_json: bool) -> None:
    """List the snapshots at URL, of VOLUME or of all volumes.

    DATA is what is no hole; STORED the same compressed, whoever uploaded it; UPLOADED what this
    snapshot added.
    """
    if volume is not None:
        check_name("volume", volume)
    repository = open_repository(url)
    summaries, protected = repository.list(volume), repository.list_protected()
    documents = [
        summary_document(summary) | {"protected": summary.push in protected}
        for summary in summaries
    ]
    print_listing("snapshots", documents, as_json, _COLUMNS)


@click.command()
@click.argument("snapshot", metavar="VOL@SNAP", shell_complete=complete_snapshot)
@click.argument("url")
@storage_class_option
@limit_options
@data_option
@json_option
def push(snapshot: str, url: str, as_json: bool) -> None:
    """Push a snapshot: only what its newest snapshot at URL does not have."""
    volume, name = parse_snapshot_name(snapshot)
    data = data_directory()
    repository = open_repository(url)
    print_notice(repository)
    with Session(data) as session:
        report = push_snapshot(session, repository, url, volume, name)
    print_warnings(report)
    print_result(dataclasses.asdict(report), as_json, push_line(report))


@click.command()
@click.argument("url")
@click.argument("snapshot", metavar="VOL@SNAP")
@json_option
def delete(url: str, snapshot: str, as_json: bool) -> None:
    """Delete a snapshot at URL; the others stay whole."""
    deleted = open_repository(url).delete(*parse_snapshot_name(snapshot))
    print_result({"deleted": summary_document(deleted)}, as_json, f"deleted {snapshot} at {url}")


@click.command()
@click.argument("url")
@click.argument("snapshot", metavar="[VOL@SNAP]", required=False)
@click.option("--deep", is_flag=True, help="Read all data and check its SHA-256.")
@at_option
@limit_options
@json_option
def verify(url: str, snapshot: str | None, deep: bool, as_json: bool) -> None:
    """Look for damage at URL, in one snapshot or in all."""
    volume, name = (None, None) if snapshot is None else parse_snapshot_name(snapshot)
    repository = open_repository(url)
    with Progress(f"verifying {snapshot or url}") as progress:
        report = repository.verify(volume, name, deep=deep, progress=progress.update)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        for damage in report.damaged:
            click.echo(damage_line(damage))
        click.echo(
            f"checked {report.snapshots} snapshots, {report.pages} pages, {report.chunks} chunks"
            f"; read {format_size(report.fetched)} of data in {report.seconds:.1f} s"
        )
        if report.noted:
            click.echo(
                f"noted {report.noted} damaged objects: the next push of the volume stores anew"
                " what it still has of them"
            )
    for warning in report.warnings:
        click.echo(f"nbdserve: warning: {warning}", err=True)
    if report.damaged:
        count = len(report.damaged)
        raise CorruptError(
            f"{count} damaged object{'s' if count > 1 else ''} at {url}, the first is"
            f" {report.damaged[0].key}: {report.damaged[0].problem}"
        )


@click.command()
@click.argument("url")
@click.option(
    "--give-up-after",
    metavar="TIME",
    type=Duration(),
    default="7d",
    show_default=True,
    help="End pushes that began so long ago and never ended: 90s, 30m, 12h, 7d.",
)
@click.option("--dry-run", is_flag=True, help="Delete nothing; say what would be deleted.")
@storage_class_option
@limit_options
@json_option
def gc(url: str, give_up_after: float, dry_run: bool, as_json: bool) -> None:
    """Free the space of deleted snapshots and of failed pushes at URL.

    May run at any time, beside pushes and restores, and on several hosts at once.
    """
    repository = open_repository(url)
    print_notice(repository)
    with Progress(f"collecting {url}") as progress:
        report = repository.collect(give_up_after, dry_run=dry_run, progress=progress.update)
    would = "would free" if dry_run else "freed"
    line = (
        f"{would} {format_size(report.freed)} in {report.objects} objects in"
        f" {report.seconds:.1f} s; {report.live} snapshots are live"
    )
    if report.under_way:
        line += f", and {report.under_way} pushes are under way"
    if report.repacked:
        line += (
            f"; repacked {report.repacked} sparse segments, writing {format_size(report.written)}:"
            f" the next gc frees {format_size(report.to_be_freed)}"
        )
    print_result(dataclasses.asdict(report), as_json, line)
