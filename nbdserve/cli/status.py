"""``nbdserve status``."""

from typing import Any

import click

from nbdserve.cli.options import data_directory, data_option, json_option
from nbdserve.cli.output import (
    describe_hydration,
    describe_unreadable,
    format_size,
    print_fields,
    seconds_of,
)
from nbdserve.cli.session import Session
from nbdserve.cli.watch import DEFAULT_SECONDS, watch
from nbdserve.control.client import path


@click.command()
@click.option(
    "--watch",
    "seconds",
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=DEFAULT_SECONDS,
    type=click.FloatRange(0.1, 3600),
    help="Show what the daemon does, again and again, every 2 seconds unless given: requests and"
    " bytes a second of each volume, latencies, jobs. With --json a line each time.",
)
@data_option
@json_option
def status(seconds: float | None, as_json: bool) -> None:
    """Show whether a daemon serves the data directory, and what it holds."""
    if seconds is not None:
        watch(data_directory(), seconds, as_json)
        return
    with Session(data_directory()) as session:
        document = session.client.get(path("status"))
    if document["daemon"]:
        daemon = f"runs as process {document['pid']} since {seconds_of(document['started'])}"
    else:
        daemon = "does not run"
    fields = {
        "daemon": daemon,
        "listening": ", ".join(document["listening"]) or "-",
        "http": ", ".join(document["http"]) or "-",
        "workers": ", ".join(map(_describe_worker, document["workers"])) or "-",
        "data": document["data"],
        "free": f"{format_size(document['free'])} of {format_size(document['total'])}",
        "volumes": str(document["volumes"]),
        "unreadable": "; ".join(map(describe_unreadable, document["unreadable"])) or "-",
        "snapshots": str(document["snapshots"]),
        "clients": str(document["clients"]),
        "backups": ", ".join(document["backups"]) or "-",
        "fetched": "; ".join(
            f"volume {found['volume']}: {describe_hydration(found)}"
            for found in document["hydrations"]
        )
        or "-",
        "version": document["version"],
    }
    print_fields(document, as_json, fields)


def _describe_worker(worker: dict[str, Any]) -> str:
    if worker["pid"] is None:
        return "one that is started"
    volumes = worker["volumes"]
    return f"process {worker['pid']} with {volumes} volume{'' if volumes == 1 else 's'}"
