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
        "used": f"{format_size(document['used'])} by volumes and snapshots",
        "reserved": f"{format_size(document['reserved'])}, of which"
        f" {format_size(document['held'])} are kept back",
        "provisioned": _describe_provisioned(document),
        "warnings": "; ".join(found["message"] for found in document["warnings"]) or "-",
        "volumes": str(document["volumes"]),
        "unreadable": "; ".join(map(describe_unreadable, document["unreadable"])) or "-",
        "snapshots": str(document["snapshots"]),
        "clients": str(document["clients"]),
        "backups": ", ".join(document["backups"]) or "-",
        "jobs": "; ".join(map(_describe_job, document["jobs"])) or "-",
        "fetched": "; ".join(
            f"volume {found['volume']}: {describe_hydration(found)}"
            for found in document["hydrations"]
        )
        or "-",
        "wiping": "; ".join(map(_describe_wipe, document["wiping"])) or "-",
        "version": document["version"],
    }
    print_fields(document, as_json, fields)


def _describe_provisioned(document: dict[str, Any]) -> str:
    most = document["max_overcommit"]
    bound = "" if most is None else f", at most {most:g}"
    return (
        f"{format_size(document['provisioned'])}, {document['overcommit']:.2f} times what the disk"
        f" can hold{bound}"
    )


def _describe_job(job: dict[str, Any]) -> str:
    what = f"{job['volume']}@{job['snapshot']}" if job["kind"] == "push" else job["volume"]
    done, total = format_size(job["done"]), format_size(job["total"])
    return f"{job['kind']} of {what}, {job['repository']}: {done} of {total}"


def _describe_wipe(wipe: dict[str, Any]) -> str:
    if wipe["problem"] is not None:
        return f"volume {wipe['volume']}, deleted: {wipe['problem']}"
    done, total = format_size(wipe["done"]), format_size(wipe["total"])
    return f"volume {wipe['volume']}, deleted: {done} of {total}"


def _describe_worker(worker: dict[str, Any]) -> str:
    if worker["pid"] is None:
        return "one that is started"
    volumes = worker["volumes"]
    return f"process {worker['pid']} with {volumes} volume{'' if volumes == 1 else 's'}"
