"""The picture that ``nbdserve volume map`` draws."""

from string import ascii_lowercase
from typing import Any, Final

import click

from nbdserve.cli.output import format_size, print_json, print_table, seconds_of

MOST_CELLS: Final = 4096

_CELLS_A_LINE: Final = 64


def print_map(document: dict[str, Any], as_json: bool) -> None:
    """A letter a cell, then what the letters stand for."""
    if as_json:
        print_json(document)
        return
    cell_size, size = document["cell_size"], document["size"]
    letters = _letters(len(document["layers"]))
    picture = ["."] * -(-size // cell_size)
    for cell in document["cells"]:
        number = cell["offset"] // cell_size
        letter = letters[cell["layer"]]
        full = 2 * cell["mapped"] >= min(cell_size, size - cell["offset"])
        picture[number] = letter.upper() if full else letter
    click.echo(
        f"{document['volume']}: {format_size(document['mapped'])} of {format_size(size)} hold data;"
        f" {format_size(cell_size)} a letter, {format_size(_CELLS_A_LINE * cell_size)} a line"
    )
    starts = range(0, len(picture), _CELLS_A_LINE)
    offsets = [format_size(start * cell_size) for start in starts]
    width = max(map(len, offsets))
    for start, offset in zip(starts, offsets, strict=True):
        click.echo(f"{offset.rjust(width)}  {''.join(picture[start : start + _CELLS_A_LINE])}")
    click.echo()
    print_table(
        ["", "layer", "mapped", "disk", "snapshots", ""],
        [
            [
                letter,
                layer["layer"],
                format_size(layer["mapped"]),
                format_size(layer["disk"]),
                ", ".join(layer["snapshots"]) or "-",
                _state(document, number),
            ]
            for number, (letter, layer) in enumerate(zip(letters, document["layers"], strict=True))
        ],
    )
    click.echo()
    click.echo(_changed(document))


def _letters(count: int) -> str:
    """A letter for each layer; of more than 26, the oldest share one."""
    return "a" * (count - len(ascii_lowercase)) + ascii_lowercase[:count]


def _state(document: dict[str, Any], number: int) -> str:
    head = number == len(document["layers"]) - 1
    changed = document["layers"][number]["changed"]
    return ", ".join(["head"] * head + ["since the last backup"] * changed)


def _changed(document: dict[str, Any]) -> str:
    since = document["since"]
    if since is None:
        return "No snapshot here is a backup's: what changed since the last backup is not known."
    when = seconds_of(since["created"])
    return (
        f"{format_size(document['changed'])} were written since the last backup,"
        f" {document['volume']}@{since['snapshot']} ({when})."
    )
