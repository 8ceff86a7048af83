"""What can be completed where a volume, a snapshot or a file is asked for.

The names are read from the manifests in the data directory, as far as the user may read them: with
a daemon or without, nobody is asked, nothing is locked and nothing recovered. Where there is
nothing to read there is nothing to complete, silently; a manifest that cannot be read is left out.
"""

from __future__ import annotations  # CompletionItem[str] is for type checkers alone

from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from backends.errors import StorageError
from nbdserve.cli.options import data_directory_of, system_data_directory


def complete_volume(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Names of volumes; those that the command line has already are left out."""
    taken = _values_of(context, parameter)
    return [
        name for name, _ in _volumes(context) if name.startswith(incomplete) and name not in taken
    ]


def complete_snapshot(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """``VOL@SNAP`` of all snapshots; those that the command line has already are left out."""
    taken = _values_of(context, parameter)
    names = (f"{volume}@{snapshot}" for volume, found in _volumes(context) for snapshot in found)
    return [name for name in names if name.startswith(incomplete) and name not in taken]


def complete_new_snapshot(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """``VOL@`` of all volumes, for a name that there is not yet."""
    names = (f"{volume}@" for volume, _ in _volumes(context))
    return [name for name in names if name.startswith(incomplete)]


def complete_file(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """A file: the shell's own business."""
    return [CompletionItem(incomplete, type="file")]


def _values_of(context: click.Context, parameter: click.Parameter) -> tuple[str, ...]:
    value = context.params.get(parameter.name or "")
    return value if isinstance(value, tuple) else ()


def _volumes(context: click.Context) -> Iterator[tuple[str, list[str]]]:
    """Each volume and its snapshots, by name, those of a volume from the oldest."""
    from snapshots.manifest import unpack_manifest  # noqa: PLC0415 - most commands complete nothing

    data = data_directory_of(context) or system_data_directory()
    found = []
    for file in [] if data is None else _files(data / "volumes"):
        try:
            manifest = unpack_manifest(file.read_bytes(), str(file), file.name)
        except (OSError, StorageError):
            continue
        found.append((manifest.name, [snapshot.name for snapshot in manifest.snapshots]))
    return iter(sorted(found))


def _files(directory: Path) -> list[Path]:
    try:
        return [file for file in directory.iterdir() if not file.name.startswith(".")]
    except OSError:
        return []
