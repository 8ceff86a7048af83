"""``nbdserve repo diff``."""

from typing import Any

import click

from backends.errors import InvalidError
from nbdserve.cli.options import json_option
from nbdserve.cli.output import print_difference
from nbdserve.cli.unlocking import open_repository
from nbdserve.control.documents import timestamp
from snapshots.names import parse_snapshot_name
from snapshots.repository import Summary
from snapshots.repository.difference import compare_roots
from snapshots.repository.stream import read_root


@click.command()
@click.argument("url")
@click.argument("older", metavar="VOL@A")
@click.argument("newer", metavar="VOL@B")
@json_option
def diff(url: str, older: str, newer: str, as_json: bool) -> None:
    """List the extents that differ in VOL@B from VOL@A, both at URL.

    They are whole chunks of the repository. "zero": they read as zeros in VOL@B.
    """
    (volume, first), (other, second) = parse_snapshot_name(older), parse_snapshot_name(newer)
    if other != volume:
        raise InvalidError(f"{older} and {newer} are not snapshots of one volume")
    repository = open_repository(url)
    old, new = read_root(repository, volume, first), read_root(repository, volume, second)
    extents = compare_roots(repository, old, new)
    document = {
        "volume": volume,
        "block_size": repository.config.chunk_size,
        "from": _state(old.summary),
        "to": _state(new.summary),
        "extents": [
            {"offset": extent.offset, "length": extent.length, "zero": extent.zero}
            for extent in extents
        ],
    }
    print_difference(document, as_json)


def _state(summary: Summary) -> dict[str, Any]:
    """As in ``snapshot diff``."""
    return {
        "snapshot": summary.snapshot,
        "id": summary.snapshot_id,
        "created": timestamp(summary.created),
        "size": summary.size,
    }
