"""What became of the last backups: of each volume in each repository, the last success and failure.

A backup's command has ended long before anybody wants to know how it went, and whether the next is
overdue. Commands report how a push ended (``reports``), and this keeps it in ``DATA/backups.json``
over restarts::

    {"version": 1, "records": [{"volume": id, "repository": URL, "last_success": seconds, …}, …]}

* A record is of a volume's id: it follows a volume that is renamed, and goes with one that is
  deleted.
* A success counts when it is of a snapshot at least as young as the one that is noted: pushing an
  old snapshot by hand makes no backup younger.
* The file is replaced as a whole. It is no part of any volume: one that is damaged is put aside as
  ``backups.json.damaged`` with a warning, one that cannot be written is a warning too, and neither
  keeps anybody from backing up.
* There are at most MOST_REPOSITORIES records of a volume; the one that nothing was heard of for the
  longest time makes room.
"""

import asyncio
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from backends.errors import one_line

log = logging.getLogger(__name__)

FILE: Final = "backups.json"
MOST_REPOSITORIES: Final = 16
MOST_TEXT: Final = 2048
"""Characters of a text in a record; what is longer is cut."""

_VERSION: Final = 1
_MOST_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class BackupRecord:
    """The last backups of one volume to one repository.

    Times are seconds since the epoch, None when there was none; ``failure`` says what the last
    failure was. ``snapshot``, ``created`` (when it was taken), ``uploaded`` in bytes and
    ``seconds`` are those of the last success.
    """

    volume: str
    repository: str
    repository_id: str | None = None
    last_success: float | None = None
    last_failure: float | None = None
    failure: str | None = None
    snapshot: str | None = None
    created: float | None = None
    uploaded: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Success:
    """A push that ended well: what of, its bytes, and how long it took."""

    repository_id: str
    snapshot: str
    created: float
    uploaded: int
    seconds: float


class History:
    """The records of one data directory; ``names`` tells what volumes there are, by their id.

    A volume whose name is not known has a record and is not listed.
    """

    def __init__(self, file: Path, names: Callable[[], Mapping[str, str | None]]) -> None:
        self._file = file
        self._names = names
        self._writing = asyncio.Lock()
        self._records = _load(file)

    def records(self) -> list[BackupRecord]:
        """By volume and repository; ``volume`` is the name."""
        names = self._names()
        named = (
            dataclasses.replace(record, volume=name)
            for record in self._records.values()
            if (name := names.get(record.volume)) is not None
        )
        return sorted(named, key=lambda record: (record.volume, record.repository))

    async def succeeded(self, volume: str, repository: str, success: Success) -> None:
        """Note a push of the volume of this id."""
        old = self._record(volume, repository)
        # One of the future is the mark of a wrong clock: those that come after it do count.
        if old.created is not None and success.created < old.created <= time.time():
            return
        values = dataclasses.asdict(success)
        await self._note(dataclasses.replace(old, last_success=time.time(), **values))

    async def failed(self, volume: str, repository: str, why: str) -> None:
        """Note a failure to back up the volume of this id."""
        old = self._record(volume, repository)
        await self._note(
            dataclasses.replace(old, last_failure=time.time(), failure=why[:MOST_TEXT])
        )

    async def forget(self, volume: str, repository: str) -> bool:
        """Drop a record, of a repository that is no longer in use; whether there was one."""
        if self._records.pop((volume, repository), None) is None:
            return False
        await self._write()
        return True

    def _record(self, volume: str, repository: str) -> BackupRecord:
        return self._records.get((volume, repository)) or BackupRecord(volume, repository)

    async def _note(self, record: BackupRecord) -> None:
        names = self._names()
        self._records = {key: kept for key, kept in self._records.items() if key[0] in names}
        self._records[record.volume, record.repository] = record
        others = [kept for kept in self._records.values() if kept.volume == record.volume]
        if len(others) > MOST_REPOSITORIES:
            oldest = min(others, key=_last_heard)
            del self._records[oldest.volume, oldest.repository]
        await self._write()

    async def _write(self) -> None:
        async with self._writing:
            records = [dataclasses.asdict(record) for record in self._records.values()]
            content = json.dumps({"version": _VERSION, "records": records}, indent=1)
            try:
                await asyncio.to_thread(_replace, self._file, content.encode())
            except OSError as error:
                log.warning("what became of backups cannot be noted: %s", one_line(error))


def _last_heard(record: BackupRecord) -> float:
    return max(record.last_success or 0.0, record.last_failure or 0.0)


def _load(file: Path) -> dict[tuple[str, str], BackupRecord]:
    try:
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
        records = list(map(_record_of, _documents_of(content)))
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.warning("what became of earlier backups cannot be read: %s", one_line(error))
        return {}
    except (ValueError, TypeError, RecursionError) as error:
        aside = file.with_name(f"{file.name}.damaged")
        try:
            file.replace(aside)
        except OSError as reason:
            log.warning("%s is damaged, and stays: %s", file, one_line(reason))
        else:
            log.warning(
                "%s is damaged (%s) and now %s: what became of earlier backups is not known",
                file, one_line(error), aside.name,
            )  # fmt: skip
        return {}
    return {(record.volume, record.repository): record for record in records}


def _documents_of(content: bytes) -> list[Any]:
    if len(content) > _MOST_BYTES:
        raise ValueError("it is too long")
    document = json.loads(content)
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ValueError(f"it is not of version {_VERSION}")
    records = document.get("records")
    if not isinstance(records, list):
        raise TypeError("it has no records")
    return records


def _record_of(document: Any) -> BackupRecord:
    record = BackupRecord(**document)
    for field in dataclasses.fields(BackupRecord):
        value = getattr(record, field.name)
        if value is None and field.default is None:
            continue
        number = field.name in {"last_success", "last_failure", "created", "uploaded", "seconds"}
        wanted = (int, float) if number else (str,)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise TypeError(f"{field.name!r} is no {'number' if number else 'text'}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name!r} is no number")
    return record


def _replace(file: Path, content: bytes) -> None:
    """A temporary file, fsync, rename, fsync of the directory."""
    temporary = file.with_name(f"{file.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(descriptor)
    temporary.replace(file)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
