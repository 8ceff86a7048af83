"""``nbdserve snapshot``."""

import click

from backends.errors import InvalidError
from nbdserve.cli.completing import complete_new_snapshot, complete_snapshot, complete_volume
from nbdserve.cli.options import data_directory, data_option, json_option
from nbdserve.cli.output import (
    format_size,
    print_difference,
    print_listing,
    print_result,
    seconds_of,
)
from nbdserve.cli.progress import Progress
from nbdserve.cli.session import Session
from nbdserve.control.client import Client, Document, path
from snapshots.names import check_name, parse_snapshot_name

_COLUMNS = {
    "snapshot": lambda s: f"{s['volume']}@{s['name']}",
    "size": lambda s: format_size(s["size"]),
    "created": lambda s: seconds_of(s["created"]),
    "clients": lambda s: str(s["clients"]),
    "labels": lambda s: ",".join(f"{key}={value}" for key, value in s["labels"].items()),
}


@click.group()
def snapshot() -> None:
    """Snapshots: create, list, delete, roll back, compare."""


@snapshot.command()
@click.argument(
    "snapshots", metavar="VOL@SNAP…", nargs=-1, required=True, shell_complete=complete_new_snapshot
)
@data_option
@json_option
def create(snapshots: tuple[str, ...], as_json: bool) -> None:
    """Take snapshots; several are all of the same instant."""
    with Session(data_directory()) as session:
        taken = session.client.post(path("snapshots"), {"snapshots": list(snapshots)})
    lines = [f"created snapshot {info['volume']}@{info['name']}" for info in taken["snapshots"]]
    print_result(taken, as_json, "\n".join(lines))


@snapshot.command("list")
@click.argument("volume", required=False, shell_complete=complete_volume)
@data_option
@json_option
def list_(volume: str | None, as_json: bool) -> None:
    """List the snapshots, oldest first, of VOLUME or of all volumes."""
    if volume is None:
        where = path("snapshots")
    else:
        where = path("volumes", check_name("volume", volume), "snapshots")
    with Session(data_directory()) as session:
        snapshots = session.client.get(where)["snapshots"]
    print_listing("snapshots", snapshots, as_json, _COLUMNS)


@snapshot.command()
@click.argument("snapshot", metavar="VOL@SNAP", shell_complete=complete_snapshot)
@data_option
@json_option
def delete(snapshot: str, as_json: bool) -> None:
    """Delete a snapshot; its space is given back while the volume stays in use.

    When Ctrl-C interrupts it, the daemon goes on giving back space; without a daemon the next
    command or daemon does.
    """
    volume, name = parse_snapshot_name(snapshot)
    with Session(data_directory()) as session:
        document = delete_snapshot(session.client, volume, name)
    print_result(document, as_json, f"deleted snapshot {snapshot}")


def delete_snapshot(client: Client, volume: str, name: str) -> Document:
    """Delete it and show the progress."""
    where = path("volumes", volume, "snapshots", name)
    document: Document = {}
    with (
        client.stream("DELETE", where) as answer,
        Progress(f"deleting {volume}@{name}") as progress,
    ):
        for document in answer.lines():
            if "done" in document:
                progress.update(document["done"], document["total"])
    return document


@snapshot.command()
@click.argument("snapshot", metavar="VOL@SNAP", shell_complete=complete_snapshot)
@click.option("--force", is_flag=True, help="Disconnect the clients that have the volume open.")
@data_option
@json_option
def rollback(snapshot: str, force: bool, as_json: bool) -> None:
    """Make the volume what it was at the snapshot; what was written since is lost."""
    volume, name = parse_snapshot_name(snapshot)
    with Session(data_directory()) as session:
        info = session.client.post(
            path("volumes", volume, "rollback"), {"snapshot": name, "force": force}
        )
    print_result(info, as_json, f"rolled volume {volume} back to {snapshot}")


@snapshot.command()
@click.argument("older", metavar="VOL@A", shell_complete=complete_snapshot)
@click.argument("newer", metavar="[VOL@B]", required=False, shell_complete=complete_snapshot)
@data_option
@json_option
def diff(older: str, newer: str | None, as_json: bool) -> None:
    """List the extents that may differ in VOL@B from VOL@A, or in the volume as it is now.

    "zero": they read as zeros there, and need not be read. --json also has ids and sizes of both.
    """
    volume, first = parse_snapshot_name(older)
    second = None
    if newer is not None:
        other, second = parse_snapshot_name(newer)
        if other != volume:
            raise InvalidError(f"{older} and {newer} are not snapshots of one volume")
    where = path("volumes", volume, "diff", **{"from": first, "to": second})
    with Session(data_directory()) as session, session.client.stream("GET", where) as answer:
        compared = answer.first()
        extents = list(answer.lines())
    print_difference({**compared, "extents": extents}, as_json)
