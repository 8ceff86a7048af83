"""``nbdserve repo restore``; a lazy one is the daemon's work."""

import click

from nbdserve.cli.keeping import at_option, refuse_time
from nbdserve.cli.key_options import refuse_key_options
from nbdserve.cli.limits import limit_options, refuse_limits
from nbdserve.cli.options import (
    data_directory,
    data_option,
    force_option,
    json_option,
    parse_rate,
    rate_option,
    skip_damaged_option,
)
from nbdserve.cli.output import format_size, print_result
from nbdserve.cli.session import Session
from nbdserve.control.client import path
from snapshots.names import check_name, parse_snapshot_name


@click.command()
@click.argument("url")
@click.argument("snapshot", metavar="VOL@SNAP")
@click.argument("new", metavar="NEWVOL")
@click.option(
    "--lazy",
    is_flag=True,
    help="Make it at once; its data comes when it is read, and by and by, with the daemon's"
    " credentials.",
)
@rate_option
@at_option
@limit_options
@skip_damaged_option
@force_option
@data_option
@json_option
def restore(
    url: str,
    snapshot: str,
    new: str,
    lazy: bool,
    rate: str | None,
    skip_damaged: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make the volume NEWVOL from a snapshot at URL; everything read is verified."""
    parse_snapshot_name(snapshot)
    check_name("volume", new)
    data = data_directory()
    if not lazy:
        if rate is not None:
            raise click.UsageError("--rate is for --lazy", click.get_current_context())
        # What reads a repository takes longer to import than all that a lazy restore does here.
        from nbdserve.cli.whole_restore import restore_whole  # noqa: PLC0415

        restore_whole(
            data, url, snapshot, new, skip_damaged=skip_damaged, force=force, as_json=as_json
        )
        return
    if skip_damaged:
        raise click.UsageError(
            "--skip-damaged is not for --lazy: reads of what is damaged fail, the rest is read",
            click.get_current_context(),
        )
    refuse_key_options()
    refuse_limits()
    refuse_time()
    body: dict[str, object] = {"volume": new, "url": url, "snapshot": snapshot, "force": force}
    body["rate"] = parse_rate(rate)
    with Session(data, create=True) as session:
        made = session.client.post(path("restores"), body)
    line = f"made volume {new} of {snapshot}, {format_size(made['size'])}; its data is fetched"
    print_result({"restored": made}, as_json, line)
