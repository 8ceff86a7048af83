"""``nbdserve attach``, ``detach`` and ``attached``."""

from pathlib import Path

import click

from backends.errors import InvalidError
from nbdserve.addresses import UnixAddress
from nbdserve.attach import attaching, detaching
from nbdserve.attach.connecting import Connector, TlsFiles
from nbdserve.attach.device import parse_device
from nbdserve.attach.keeper import Wishes
from nbdserve.attach.server import ServerUri, parse_uri
from nbdserve.cli.options import data_directory, data_option, json_option
from nbdserve.cli.output import Document, format_size, print_listing, print_result
from nbdserve.cli.session import check_directory
from nbdserve.protocol.handshake import TlsMode
from snapshots.names import check_name, parse_snapshot_name

_MOST_CONNECTIONS = 16
_LONGEST = 86400

_COLUMNS = {
    "device": lambda d: d["device"],
    "volume": lambda d: d["volume"] or "-",
    "size": lambda d: format_size(d["size"]),
    "mode": lambda d: "read-only" if d["read_only"] else "read-write",
    "keeper": lambda d: str(d["keeper"] or "-"),
    "from": lambda d: d["uri"] or "-",
}


@click.command()
@click.argument("volume", metavar="VOL|VOL@SNAP")
@click.argument("device", metavar="[/dev/nbdX]", required=False)
@click.option(
    "--uri",
    metavar="URI",
    help="The server: nbd://HOST:PORT/, nbds://HOST:PORT/ or nbd+unix:///?socket=PATH."
    "  [default: the daemon of this host]",
)
@click.option(
    "--connections",
    metavar="N",
    type=click.IntRange(1, _MOST_CONNECTIONS),
    default=1,
    show_default=True,
    help="How many connections; with more than one the kernel gives up a request's connection"
    " after 30 seconds, unless --timeout says otherwise.",
)
@click.option(
    "--block-size",
    type=click.Choice(["512", "4096"]),
    default="512",
    show_default=True,
    help="The logical block size of the device, in bytes.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.IntRange(0, _LONGEST),
    default=0,
    show_default=True,
    help="Give up a connection on which a request takes longer; 0: a slow server is waited for.",
)
@click.option(
    "--dead-timeout",
    metavar="SECONDS",
    type=click.IntRange(1, _LONGEST),
    default=600,
    show_default=True,
    help="How long I/O waits for a server that is gone, before it fails.",
)
@click.option("--read-only", is_flag=True, help="Make the device read-only.")
@click.option(
    "--tls-ca",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The CA that signed the server's certificate, in PEM.  [default: the system's]",
)
@click.option(
    "--tls-certificate",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The certificate to show to the server, in PEM.",
)
@click.option(
    "--tls-key",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The certificate's private key, in PEM, not encrypted.",
)
@click.option(
    "--tls-hostname",
    metavar="NAME",
    help="The name in the server's certificate.  [default: the URI's host, or localhost]",
)
@click.option(
    "--foreground", is_flag=True, help="Stay, as a service does, instead of in the background."
)
@data_option
@json_option
def attach(
    volume: str,
    device: str | None,
    uri: str | None,
    connections: int,
    block_size: str,
    timeout: int,
    dead_timeout: int,
    read_only: bool,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_hostname: str | None,
    foreground: bool,
    as_json: bool,
) -> None:
    """Attach a volume, or read-only a snapshot, to this machine as /dev/nbdX.

    Without a device the kernel chooses a free one. A process stays that connects again when the
    server has been away, and lets the device grow when the volume does. Attaching what is attached
    already changes nothing.
    """
    _check_export(volume)
    index = None if device is None else parse_device(device)
    server = _local_server() if uri is None else parse_uri(uri, volume)
    files = TlsFiles(tls_ca, tls_certificate, tls_key, tls_hostname)
    if not server.tls and files != TlsFiles():
        raise click.UsageError(
            "TLS options need --uri nbds://… or nbds+unix://…", click.get_current_context()
        )
    connector = Connector(server, volume, files)
    wishes = Wishes(volume, index, connections, int(block_size), timeout, dead_timeout, read_only)
    with attaching.open_kernel() as kernel:
        if foreground:
            attaching.attach_in_foreground(
                kernel, connector, wishes, lambda document: _print(document, as_json)
            )
        else:
            _print(attaching.attach(kernel, connector, wishes), as_json)


@click.command()
@click.argument("what", metavar="VOL|/dev/nbdX")
@json_option
def detach(what: str, as_json: bool) -> None:
    """Detach a volume, or a device, from this machine.

    A device that is mounted, or in use in another way, stays as it is.
    """
    with attaching.open_kernel() as kernel:
        index = attaching.find_device(what)
        detaching.detach(kernel, index)
    print_result({"detached": f"/dev/nbd{index}"}, as_json, f"detached /dev/nbd{index}")


@click.command()
@json_option
def attached(as_json: bool) -> None:
    """List the nbd devices of this machine that are attached.

    KEEPER is the process that connects again when the server has been away; devices that
    other programs have attached have none, and their volume is not known.
    """
    print_listing("attached", attaching.list_devices(), as_json, _COLUMNS)


def _local_server() -> ServerUri:
    """The daemon of the data directory, at an address where it does not insist on TLS."""
    # A keeper that is told the URI has its memory locked without all that this imports.
    from nbdserve.configuration.environment import listeners_of  # noqa: PLC0415

    data = data_directory()
    check_directory(data)
    loopback = None
    for listener in listeners_of(data):
        if listener.tls is not None and listener.tls.mode is TlsMode.REQUIRED:
            continue
        address = listener.address
        if isinstance(address, UnixAddress):
            return ServerUri(UnixAddress(address.path.resolve()), False)
        if loopback is None and address.is_loopback and address.port:
            loopback = address
    if loopback is None:
        raise InvalidError(
            f"the daemon of {data} has no Unix socket and no loopback address without TLS:"
            " give --uri"
        )
    return ServerUri(loopback, False)


def _check_export(name: str) -> None:
    if "@" in name:
        parse_snapshot_name(name)
    else:
        check_name("volume", name)


def _print(document: Document, as_json: bool) -> None:
    done = "attached" if document["new"] else "already attached:"
    mode = ", read-only" if document["read_only"] else ""
    print_result(
        document,
        as_json,
        f"{done} {document['volume']} as {document['device']},"
        f" {format_size(document['size'])}{mode}",
    )
