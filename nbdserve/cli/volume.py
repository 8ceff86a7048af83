"""``nbdserve volume``."""

from typing import Any

import click

from backends.errors import UnavailableError
from nbdserve.cli.completing import complete_snapshot, complete_volume
from nbdserve.cli.options import (
    data_directory,
    data_option,
    force_option,
    json_option,
    parse_rate,
    rate_option,
)
from nbdserve.cli.output import (
    describe_hydration,
    describe_limits,
    describe_unreadable,
    format_size,
    percentage,
    print_fields,
    print_json,
    print_listing,
    print_result,
    seconds_of,
)
from nbdserve.cli.progress import Progress
from nbdserve.cli.session import Session
from nbdserve.cli.volume_map import MOST_CELLS, print_map
from nbdserve.control.client import path
from snapshots.names import check_name, parse_size

_COLUMNS = {
    "name": lambda v: v["name"],
    "size": lambda v: format_size(v["size"]),
    "mapped": lambda v: format_size(v["mapped"]),
    "own": lambda v: format_size(v["own"]),
    "shared": lambda v: format_size(v["shared"]),
    "reserved": lambda v: format_size(v["reserved"]) if v["reserved"] else "-",
    "snapshots": lambda v: str(v["snapshots"]),
    "clients": lambda v: str(v["clients"]),
    "fetched": lambda v: _fetched(v["hydration"]),
    "created": lambda v: seconds_of(v["created"]),
}


def _fetched(hydration: dict[str, Any] | None) -> str:
    """How much of a volume is here."""
    return "all" if hydration is None else percentage(hydration)


@click.group()
def volume() -> None:
    """Volumes: create, list, show, resize, reserve, rename, delete."""


reserve_option = click.option(
    "--reserve", metavar="SIZE", help="Reserve so much space; see 'volume reserve'."
)


def _checked(name: str) -> str:
    """``name``, which becomes part of a request's path."""
    return check_name("volume", name)


def _print(info: dict[str, Any], as_json: bool, done: str) -> None:
    print_result(info, as_json, f"{done} volume {info['name']}, {format_size(info['size'])}")


@volume.command()
@click.argument("name")
@click.option("--size", help="Size, such as 10G; with --from it may only be larger.")
@click.option(
    "--from",
    "source",
    metavar="VOL@SNAP",
    shell_complete=complete_snapshot,
    help="Clone this snapshot.",
)
@reserve_option
@force_option
@data_option
@json_option
def create(
    name: str,
    size: str | None,
    source: str | None,
    reserve: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Create the volume NAME: empty, or as a clone that shares a snapshot's data."""
    if size is None and source is None:
        raise click.UsageError("Missing option '--size'", click.get_current_context())
    body: dict[str, object] = {"name": name, "force": force}
    if size is not None:
        body["size"] = parse_size(size)
    if source is not None:
        body["from"] = source
    if reserve is not None:
        body["reserve"] = parse_size(reserve)
    with Session(data_directory(), create=True) as session:
        info = session.client.post(path("volumes"), body)
    _print(info, as_json, "created")


@volume.command("list")
@data_option
@json_option
def list_(as_json: bool) -> None:
    """List the volumes.

    MAPPED is what the guest sees as data; OWN and SHARED are bytes on disk, in layers of this
    volume alone and in layers that other volumes use too. RESERVED is what it can write since its
    last snapshot however full the disk gets. FETCHED is how much of what was restored
    lazily is here. Volumes that cannot be read are named on
    standard error.
    """
    with Session(data_directory()) as session:
        document = session.client.get(path("volumes"))
    if as_json:
        print_json(document)
        return
    print_listing("volumes", document["volumes"], as_json, _COLUMNS)
    for lost in document["unreadable"]:
        click.echo(f"nbdserve: warning: {describe_unreadable(lost)}", err=True)
    for half in document["half_restored"]:
        click.echo(
            f"nbdserve: warning: volume {half['volume']} is half restored from {half['source']}:"
            " the same 'repo restore' goes on with that, 'volume delete' discards it",
            err=True,
        )


@volume.command()
@click.argument("name", shell_complete=complete_volume)
@data_option
@json_option
def show(name: str, as_json: bool) -> None:
    """Show the volume NAME."""
    with Session(data_directory()) as session:
        info = session.client.get(path("volumes", _checked(name)))
    fields = {
        "name": info["name"],
        "id": info["id"],
        "size": f"{format_size(info['size'])} ({info['size']} bytes)",
        "mapped": f"{format_size(info['mapped'])} (holds data, as the guest sees it)",
        "own": f"{format_size(info['own'])} (on disk, used by this volume alone)",
        "shared": f"{format_size(info['shared'])} (on disk, used by other volumes too)",
        "reserved": format_size(info["reserved"]) if info["reserved"] else "-",
        "layers": str(info["layers"]),
        "snapshots": str(info["snapshots"]),
        "clients": str(info["clients"]),
        "fetched": "all" if info["hydration"] is None else describe_hydration(info["hydration"]),
        "created": seconds_of(info["created"]),
    }
    print_fields(info, as_json, fields)


@volume.command("map")
@click.argument("name", shell_complete=complete_volume)
@click.option(
    "--cells",
    type=click.IntRange(1, MOST_CELLS),
    default=1024,
    show_default=True,
    help="In at most so many parts.",
)
@data_option
@json_option
def map_(name: str, cells: int, as_json: bool) -> None:
    """Draw which layer holds which part of the volume NAME.

    Every snapshot ends a layer: what is written after it goes to the next one. A capital letter
    stands for a part of which at least half holds data, a dot for one that is empty. What was
    written since the last backup is in the layers that are marked so; 'snapshot diff' lists it,
    and what was zeroed too.
    """
    where = path("volumes", _checked(name), "map", cells=str(cells))
    with Session(data_directory()) as session:
        document = session.client.get(where)
    print_map(document, as_json)


@volume.command()
@click.argument("name", shell_complete=complete_volume)
@click.option("--size", required=True, help="The new size, such as 20G; never less than before.")
@force_option
@data_option
@json_option
def resize(name: str, size: str, force: bool, as_json: bool) -> None:
    """Grow the volume NAME."""
    body = {"size": parse_size(size), "force": force}
    with Session(data_directory()) as session:
        info = session.client.post(path("volumes", _checked(name), "resize"), body)
    _print(info, as_json, "resized")


@volume.command()
@click.argument("name", shell_complete=complete_volume)
@click.argument("size", metavar="SIZE|none")
@data_option
@json_option
def reserve(name: str, size: str, as_json: bool) -> None:
    """Reserve SIZE for the volume NAME.

    That much it can write to new places since its last snapshot, however full others make the disk.
    """
    body = {"reserve": 0 if size == "none" else parse_size(size)}
    with Session(data_directory()) as session:
        info = session.client.post(path("volumes", _checked(name), "reserve"), body)
    shown = format_size(info["reserved"]) if info["reserved"] else "nothing"
    print_result(info, as_json, f"reserved {shown} for volume {name}")


@volume.command()
@click.argument("old", shell_complete=complete_volume)
@click.argument("new")
@data_option
@json_option
def rename(old: str, new: str, as_json: bool) -> None:
    """Rename the volume OLD to NEW."""
    with Session(data_directory()) as session:
        info = session.client.post(path("volumes", _checked(old), "rename"), {"name": new})
    _print(info, as_json, "renamed")


@volume.command()
@click.argument("name", shell_complete=complete_volume)
@rate_option
@click.option("--wait", is_flag=True, help="Return when the volume is whole.")
@data_option
@json_option
def hydrate(name: str, rate: str | None, wait: bool, as_json: bool) -> None:
    """Change how fast the rest of a lazily restored volume is fetched, or wait for it.

    When Ctrl-C interrupts the waiting, the daemon goes on fetching. Without a daemon this command
    does it as long as it waits.
    """
    if rate is None and not wait:
        raise click.UsageError("give --rate or --wait", click.get_current_context())
    where = path("volumes", _checked(name), "hydration")
    with Session(data_directory()) as session:
        if rate is not None:
            session.client.post(where, {"rate": parse_rate(rate)})
        if wait:
            _await_whole(session, name)
        info = session.client.get(path("volumes", name))
    state = "whole" if wait else describe_hydration(info["hydration"])
    print_result(info, as_json, f"volume {name}: {state}")


def _await_whole(session: Session, name: str) -> None:
    where = path("volumes", name, "hydration")
    problem = None
    with session.client.stream("GET", where) as answer, Progress(f"fetching {name}") as progress:
        for line in answer.lines():
            if "done" in line:
                progress.update(line["done"], line["total"])
                if line["problem"] not in (None, problem):
                    click.echo(f"nbdserve: warning: {line['problem']}", err=True)
                problem = line["problem"]
            elif line.get("whole"):
                return
    raise UnavailableError("the daemon closed the connection before the volume was whole")


@volume.command()
@click.argument("name", shell_complete=complete_volume)
@click.option("--iops", metavar="N", type=click.IntRange(0), help="Requests a second; 0: any.")
@click.option("--iops-burst", metavar="N", type=click.IntRange(0), help="Requests at once.")
@click.option("--bandwidth", metavar="SIZE", help="Bytes read and written a second, such as 50M.")
@click.option("--bandwidth-burst", metavar="SIZE", help="Bytes at once.")
@click.option("--none", "none", is_flag=True, help="No limits, whatever the configuration says.")
@click.option("--default", "default", is_flag=True, help="What the configuration says, again.")
@data_option
@json_option
def limit(
    name: str,
    iops: int | None,
    iops_burst: int | None,
    bandwidth: str | None,
    bandwidth_burst: str | None,
    none: bool,
    default: bool,
    as_json: bool,
) -> None:
    """Limit the requests on the volume NAME, at once; without options, show its limits.

    What is not given stays as it is; 0 takes a limit away. After a pause, a burst may be done at
    once, a tenth of a second's unless given. The limits hold until they are changed, also after
    the daemon was restarted.
    """
    sizes = {"bandwidth": bandwidth, "bandwidth_burst": bandwidth_burst}
    given = {
        "iops": iops,
        "iops_burst": iops_burst,
        **{key: None if text is None else parse_size(text) for key, text in sizes.items()},
    }
    body: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    if none + default + bool(body) > 1:
        raise click.UsageError(
            "--none, --default and limits exclude each other", click.get_current_context()
        )
    if none or default:
        body = {"none": True} if none else {"default": True}
    where = path("volumes", _checked(name), "limits")
    with Session(data_directory()) as session:
        found = session.client.post(where, body) if body else session.client.get(where)
    print_result(found, as_json, f"volume {name}: {describe_limits(found)}")


@volume.command()
@click.argument("name", shell_complete=complete_volume)
@click.option("--with-snapshots", is_flag=True, help="Delete its snapshots with it.")
@click.option(
    "--wipe", is_flag=True, help="Overwrite what it has on the disk, and no other volume uses."
)
@data_option
@json_option
def delete(name: str, with_snapshots: bool, wipe: bool, as_json: bool) -> None:
    """Delete the volume NAME.

    It is gone at once. When Ctrl-C interrupts the wiping, the daemon goes on; without a daemon the
    next command that opens the data directory does.
    """
    snapshots = "true" if with_snapshots else None
    with Session(data_directory()) as session:
        if wipe:
            where = path("volumes", _checked(name), with_snapshots=snapshots, wipe="true")
            document = _follow_wipe(session, name, where)
        else:
            where = path("volumes", _checked(name), with_snapshots=snapshots)
            document = session.client.delete(where)
    print_result(document, as_json, _deleted_line(name, document))


def _follow_wipe(session: Session, name: str, where: str) -> dict[str, Any]:
    with session.client.stream("DELETE", where) as answer, Progress(f"wiping {name}") as progress:
        for line in answer.lines():
            if "done" in line:
                progress.update(line["done"], line["total"])
            else:
                return line
    raise UnavailableError("the daemon closed the connection before the volume was wiped")


def _deleted_line(name: str, document: dict[str, Any]) -> str:
    line = f"deleted volume {name}"
    if "wiped" in document:
        line += f", wiped {format_size(document['wiped'])}"
    if document.get("shared"):
        others = ", ".join(document["others"])
        line += f"; not wiped: {format_size(document['shared'])} that {others} use too"
    return line
