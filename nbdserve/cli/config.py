"""``nbdserve config``."""

from pathlib import Path

import click

from nbdserve.cli.options import data_option, given_data_directory, json_option
from nbdserve.cli.output import print_json
from nbdserve.configuration import file
from nbdserve.configuration.checking import check_configuration
from nbdserve.configuration.problems import ConfigurationError
from nbdserve.configuration.settings import Settings, combine


@click.group()
def config() -> None:
    """The configuration file: check."""


@config.command()
@click.argument("path", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@data_option
@json_option
def check(path: Path | None, as_json: bool) -> int:
    """Say all that is wrong with a configuration file, a line each.

    FILE is /etc/nbdserve/nbdserve.toml unless given. Nothing is started or changed. What it names
    is looked at, too: certificates and keys, users and groups, directories, host names. The exit
    status is 0 when the daemon could start with it, 1 when not.
    """
    path = path or file.DEFAULT_FILE
    problems: tuple[str, ...] = ()
    try:
        check_configuration(combine(Settings(data=given_data_directory()), file.read_file(path)))
    except ConfigurationError as error:
        problems = error.problems
    if as_json:
        print_json({"file": str(path), "problems": problems})
    else:
        for problem in problems:
            click.echo(f"nbdserve: {problem}", err=True)
        if not problems:
            click.echo(f"{path} is valid")
    return 1 if problems else 0
