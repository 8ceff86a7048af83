"""``nbdserve serve``."""

import asyncio
from pathlib import Path

import click

from nbdserve import daemon
from nbdserve.cli.options import data_option, given_data_directory
from nbdserve.configuration import file
from nbdserve.configuration.file import DEFAULT_FILE
from nbdserve.configuration.settings import (
    DRAIN_SECONDS,
    LOG_FORMATS,
    LOG_LEVELS,
    MAX_DRAIN_SECONDS,
    MAX_HANDSHAKE_TIMEOUT,
    MAX_WORKERS,
    MOST_BY_DEFAULT,
    Configuration,
    Settings,
    combine,
)
from nbdserve.configuration.space import MOST_OVERCOMMIT, SpaceSettings, parse_threshold
from nbdserve.configuration.tls import TLS_MODES, TlsSettings
from nbdserve.configuration.watching import MAX_SLOW_SECONDS, WatchingSettings
from nbdserve.logs import write_logs
from nbdserve.server.connection import HANDSHAKE_TIMEOUT


@click.command()
@click.option(
    "--config",
    metavar="FILE",
    envvar="NBDSERVE_CONFIG",
    type=click.Path(path_type=Path),
    help="TOML with the same settings, as in log_level, which the command line wins over; and with"
    " what there is no option for: TLS and access lists of one address, exports for certain clients"
    f" only, limits.  [default: {DEFAULT_FILE}, if it exists and no data directory is given]",
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
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    help="How to write it: lines for people, or JSON objects.  [default: text]",
)
@click.option(
    "--handshake-timeout",
    metavar="SECONDS",
    type=click.IntRange(1, MAX_HANDSHAKE_TIMEOUT),
    help=f"How long a client's handshake may take.  [default: {HANDSHAKE_TIMEOUT:.0f}]",
)
@click.option(
    "--drain-seconds",
    metavar="SECONDS",
    type=click.IntRange(1, MAX_DRAIN_SECONDS),
    help="How long requests in flight may take once the daemon is told to stop."
    f"  [default: {DRAIN_SECONDS}]",
)
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
    "--http",
    metavar="HOST:PORT|unix:PATH",
    help="Where to serve metrics (/metrics) and health (/health), read-only.  [default: nowhere]",
)
@click.option(
    "--http-host",
    "http_hosts",
    metavar="NAME",
    multiple=True,
    help="A name that HTTP clients know this host by; may be repeated. Addresses, localhost and"
    " the host's own name need none.",
)
@click.option(
    "--slow-request-seconds",
    metavar="SECONDS",
    type=click.FloatRange(0, MAX_SLOW_SECONDS),
    help="Log requests that take this long; 0: none.  [default: 10]",
)
@click.option(
    "--web/--no-web",
    default=None,
    help="Whether a page for browsers is served at the root of --http.  [default: no]",
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
    log_format: str | None,
    handshake_timeout: int | None,
    drain_seconds: int | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    tls: str | None,
    http: str | None,
    http_hosts: tuple[str, ...],
    slow_request_seconds: float | None,
    web: bool | None,
    max_overcommit: float | None,
    warn_free: str | None,
    critical_free: str | None,
    min_free: str | None,
) -> None:
    """Serve the volumes over NBD until SIGTERM or SIGINT.

    The first signal drains: requests in flight are answered and all data is flushed. A second one
    ends the process at once. The exit status is 0 when all requests were answered.
    """
    thresholds = (
        None if text is None else parse_threshold(text)
        for text in (warn_free, critical_free, min_free)
    )
    given = Settings(
        data=given_data_directory(),
        listen=listen or None,
        log_level=log_level,
        tls=TlsSettings(tls, tls_certificate, tls_key, tls_client_ca),
        workers=workers,
        handshake_timeout=handshake_timeout,
        drain_seconds=drain_seconds,
        log_format=log_format,
        watching=WatchingSettings(http, http_hosts or None, slow_request_seconds, web),
        space=SpaceSettings(max_overcommit, *thresholds),
    )
    if config is None and given.data is None and file.DEFAULT_FILE.exists():
        config = file.DEFAULT_FILE
    path = None if config is None else config.absolute()

    def read() -> Configuration:
        return combine(given, Settings() if path is None else file.read_file(path))

    configuration = read()
    write_logs(configuration.logs)
    asyncio.run(daemon.run(configuration, _announce, read))


def _announce(address: str) -> None:
    click.echo(f"listening on {address}")  # which flushes
