"""``nbdserve reload``."""

import click

from backends.errors import UnavailableError
from nbdserve.cli.options import data_directory, data_option, json_option
from nbdserve.cli.output import print_json
from nbdserve.cli.session import check_directory, connect
from nbdserve.control.client import Client, path


@click.command()
@data_option
@json_option
def reload(as_json: bool) -> None:
    """Let the daemon read its configuration file again, and say what has changed.

    No connection is dropped. When the file is not valid, nothing is changed, and the exit status
    is 1. SIGHUP does the same, and the daemon's log says what came of it.
    """
    data = data_directory()
    check_directory(data)
    connection = connect(data)
    if connection is None:
        raise UnavailableError(f"no daemon serves {data}")
    outcome = Client(lambda: connection).post(path("reload"), {})
    if as_json:
        print_json(outcome)
        return
    for line in outcome["changed"]:
        click.echo(f"changed: {line}")
    for line in outcome["needs_restart"]:
        click.echo(f"needs a restart: {line}")
    if not outcome["changed"] and not outcome["needs_restart"]:
        click.echo("nothing has changed that the daemon goes by")
