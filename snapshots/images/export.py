"""Export: a snapshot in a repository becomes a disk image.

Everything is verified before it is written (:mod:`snapshots.repository.stream`). A file appears
under its name when it is whole and durable; a stream that fails ends early, and only the exit
status tells.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from backends.errors import StorageError
from snapshots.images.formats import Format
from snapshots.images.new_file import NewFile
from snapshots.images.qcow2_writer import Qcow2Writer
from snapshots.images.raw import RawFileWriter, RawStreamWriter
from snapshots.repository import Progress, Repository
from snapshots.repository.losses import Hole, Losses
from snapshots.repository.records import Root
from snapshots.repository.stream import read_in_order, read_root


@dataclass(frozen=True)
class ExportReport:
    """What an export did. Sizes in bytes; ``data`` is that of the chunks that are no holes."""

    volume: str
    snapshot: str
    push: str
    format: str
    size: int
    data: int
    seconds: float
    holes: list[Hole] = field(default_factory=list)  # what could not be had, when that was allowed


class _Writer(Protocol):
    """Of one format; offsets only grow."""

    def write(self, offset: int, content: bytes) -> None: ...

    def finish(self) -> None: ...


def export_to_file(
    repository: Repository,
    volume: str,
    snapshot: str,
    path: Path,
    image_format: Format = Format.RAW,
    *,
    replace: bool = False,
    skip_damaged: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Make the file ``path``; StorageError, and then there is none (or still the old one).

    With ``skip_damaged`` what is missing or damaged is left out, and listed in the report.
    """
    new = NewFile(path, replace=replace)
    root = read_root(repository, volume, snapshot)
    make = RawFileWriter if image_format is Format.RAW else Qcow2Writer
    with new:
        descriptor = new.open()
        try:
            report = _export(
                repository, root, image_format, lambda size: make(descriptor, size), progress,
                skip_damaged=skip_damaged,
            )  # fmt: skip
            new.commit()
        except OSError as error:
            raise new.failure(error) from error
    return report


def export_to_stream(
    repository: Repository,
    volume: str,
    snapshot: str,
    descriptor: int,
    progress: Progress | None = None,
    *,
    skip_damaged: bool = False,
) -> ExportReport:
    """Write the raw image to an open file or pipe, from front to back; StorageError."""
    root = read_root(repository, volume, snapshot)
    try:
        return _export(
            repository, root, Format.RAW, lambda size: RawStreamWriter(descriptor, size), progress,
            skip_damaged=skip_damaged,
        )  # fmt: skip
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise StorageError(
                f"whoever read {root.summary.label} from standard output went away before its end"
            ) from None
        raise StorageError(
            f"cannot write {root.summary.label} to standard output: {error.strerror or error}"
        ) from error


def _export(
    repository: Repository,
    root: Root,
    image_format: Format,
    open_writer: Callable[[int], _Writer],
    progress: Progress | None,
    *,
    skip_damaged: bool,
) -> ExportReport:
    started = time.monotonic()
    summary = root.summary
    writer = open_writer(summary.size)
    done = 0
    losses = Losses() if skip_damaged else None
    with closing(read_in_order(repository, root, losses)) as chunks:
        for offset, content in chunks:
            writer.write(offset, content)
            done += repository.config.chunk_size
            if progress:
                progress(done, summary.data)
    writer.finish()
    return ExportReport(
        summary.volume,
        summary.snapshot,
        summary.push,
        image_format.value,
        summary.size,
        summary.data,
        time.monotonic() - started,
        losses.holes(repository.config.chunk_size, summary.size) if losses else [],
    )
