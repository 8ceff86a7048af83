"""``nbdserve serve``."""

import asyncio
import logging
import time
from pathlib import Path

import click

from nbdserve import daemon
from nbdserve.cli.options import data_option, given_data_directory
from nbdserve.configuration import LOG_LEVELS, Settings, combine, read_file


@click.command()
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="TOML with data, listen and log_level; the command line wins.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT|unix:PATH",
    multiple=True,
    help="Where to serve; may be repeated.  [default: 127.0.0.1:10809 and unix:DIR/nbd.sock]",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="What to write to standard error.")
@data_option
def serve(config: Path | None, listen: tuple[str, ...], log_level: str | None) -> None:
    """Serve the volumes over NBD until SIGTERM or SIGINT.

    The first signal drains: requests in flight are answered and all data is flushed. A second one
    ends the process at once.
    """
    file = Settings() if config is None else read_file(config)
    configuration = combine(Settings(given_data_directory(), listen or None, log_level), file)
    _log(configuration.log_level)
    asyncio.run(daemon.run(configuration, _announce))


def _announce(address: str) -> None:
    click.echo(f"listening on {address}")  # which flushes


def _log(level: str) -> None:
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
