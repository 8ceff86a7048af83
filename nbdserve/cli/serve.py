"""``nbdserve serve``."""

import asyncio
from pathlib import Path

import click

from nbdserve import daemon
from nbdserve.cli.options import data_option, given_data_directory
from nbdserve.configuration.environment import named_file
from nbdserve.configuration.file import read_file
from nbdserve.configuration.settings import (
    LOG_LEVELS,
    MAX_WORKERS,
    MOST_BY_DEFAULT,
    Settings,
    combine,
)
from nbdserve.configuration.space import MOST_OVERCOMMIT, SpaceSettings, parse_threshold
from nbdserve.configuration.tls import TLS_MODES, TlsSettings
from nbdserve.logs import write_logs


@click.command()
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="TOML with the same settings, as in log_level, which the command line wins over; and with"
    " what there is no option for: TLS and access lists of one address, exports for certain clients"
    " only, limits.  [default: what NBDSERVE_CONFIG names]",
)
@click.option(
    "--listen",
    metavar="HOST:PORT|unix:PATH",
    multiple=True,
    help="Where to serve; may be repeated. What the file says about the same address holds."
    "  [default: 127.0.0.1:10809 and unix:DIR/nbd.sock]",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1, MAX_WORKERS),
    help="How many processes serve volumes, each its own; with 1 the daemon does it itself."
    f"  [default: one for each core, at most {MOST_BY_DEFAULT}]",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="What to write to standard error.")
@click.option(
    "--tls-certificate",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The server's certificate and those that lead to its CA, in PEM.",
)
@click.option(
    "--tls-key",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The certificate's private key, in PEM, not encrypted.",
)
@click.option(
    "--tls-client-ca",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Refuse clients without a certificate that this CA signed, in PEM.",
)
@click.option(
    "--tls",
    type=click.Choice(TLS_MODES),
    help="Whether connections are encrypted.  [default: required, given a certificate]",
)
@click.option(
    "--max-overcommit",
    metavar="RATIO",
    type=click.FloatRange(0, MOST_OVERCOMMIT, min_open=True),
    help="How many times what the disk can hold may be provisioned.  [default: unbounded]",
)
@click.option("--warn-free", metavar="SIZE|PERCENT", help="Warn when less is free.  [default: 10%]")
@click.option("--critical-free", metavar="SIZE|PERCENT", help="Warn once more.  [default: 3%]")
@click.option(
    "--min-free",
    metavar="SIZE|PERCENT",
    help="Refuse new volumes and snapshots when less is free.  [default: 16M]",
)
@data_option
def serve(
    config: Path | None,
    listen: tuple[str, ...],
    workers: int | None,
    log_level: str | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    tls: str | None,
    max_overcommit: float | None,
    warn_free: str | None,
    critical_free: str | None,
    min_free: str | None,
) -> None:
    """Serve the volumes over NBD until SIGTERM or SIGINT.

    The first signal drains: requests in flight are answered and all data is flushed. A second one
    ends the process at once.
    """
    config = config or named_file()
    file = Settings() if config is None else read_file(config)
    given = TlsSettings(tls, tls_certificate, tls_key, tls_client_ca)
    thresholds = (
        None if text is None else parse_threshold(text)
        for text in (warn_free, critical_free, min_free)
    )
    space = SpaceSettings(max_overcommit, *thresholds)
    configuration = combine(
        Settings(given_data_directory(), listen or None, log_level, given, workers, space=space),
        file,
    )
    write_logs(configuration.log_level)
    asyncio.run(daemon.run(configuration, _announce))


def _announce(address: str) -> None:
    click.echo(f"listening on {address}")  # which flushes
