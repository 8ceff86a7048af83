"""``nbdserve check``.

With nobody serving the data directory the command does not serve it, as others do, but takes the
lock and looks at it as it is: what cannot be opened can be checked, and nothing is changed.
"""

import asyncio
import time
from pathlib import Path
from socket import socket
from typing import Any

import click

from backends.errors import CorruptError, InUseError, UnavailableError
from backends.local_layers import LocalLayerStore
from backends.ownership import give_to_owner
from nbdserve.cli.completing import complete_volume
from nbdserve.cli.options import data_directory, data_option, json_option
from nbdserve.cli.output import print_json
from nbdserve.cli.progress import Progress
from nbdserve.cli.session import PATIENCE, check_directory, connect, wait_for_lock
from nbdserve.control.client import Client, Document, path
from nbdserve.control.documents import check_report
from snapshots.checking import check_store
from snapshots.names import check_name


@click.command()
@click.argument("volume", metavar="[VOL]", required=False, shell_complete=complete_volume)
@click.option(
    "--repair", is_flag=True, help="Repair what is safe: orphaned layers, a torn end of a journal."
)
@data_option
@json_option
def check(volume: str | None, repair: bool, as_json: bool) -> None:
    """Look for damage in the data directory, in one volume or in all.

    With a daemon it is done by the daemon, while clients read and write. The exit status is 0 when
    nothing is wrong, or nothing any more after --repair. What is written in the blocks of a volume
    cannot be checked.
    """
    if volume is not None:
        check_name("volume", volume)
    data = data_directory()
    check_directory(data)
    with Progress(f"checking {volume or data}") as progress:
        report = _check(data.absolute(), volume, repair, progress)
    if as_json:
        print_json(report)
    else:
        _print(report)
    left = [found for found in report["findings"] if not found["repaired"]]
    if left:
        raise CorruptError(
            f"{_count(len(left), 'finding')} in {data}, the first is {left[0]['file']}:"
            f" {left[0]['problem']}"
        )


def _check(data: Path, volume: str | None, repair: bool, progress: Progress) -> Document:
    """By the daemon, or by this process when nobody serves the directory."""
    deadline = time.monotonic() + PATIENCE
    while True:
        connection = connect(data)
        if connection is not None:
            return _ask(connection, volume, repair, progress)
        try:
            store = LocalLayerStore(data)
            report = check_report(asyncio.run(check_store(store, volume, repair, progress.update)))
        except InUseError as error:
            wait_for_lock(error, deadline)
        else:
            give_to_owner(data)
            return report


def _ask(connection: socket, volume: str | None, repair: bool, progress: Progress) -> Document:
    client = Client(lambda: connection)
    body = {"volume": volume, "repair": repair}
    with client.stream("POST", path("check"), body) as answer:
        for line in answer.lines():
            if "findings" in line:
                return line
            progress.update(line["done"], line["total"])
    raise UnavailableError("the daemon stopped before it had checked everything")


def _print(report: dict[str, Any]) -> None:
    for found in report["findings"]:
        click.echo(f"{found['file']}: {found['problem']}")
        if found["harms"]:
            click.echo(f"  harms: {', '.join(found['harms'])}")
        click.echo("  repaired" if found["repaired"] else f"  what to do: {found['advice']}")
    counts = (_count(report[f"{what}s"], what) for what in ("volume", "snapshot", "layer"))
    click.echo(f"checked {', '.join(counts)}: {_count(len(report['findings']), 'finding')}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
