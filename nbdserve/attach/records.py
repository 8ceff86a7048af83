"""What is attached and who keeps it: a file in /run for each export that is attached.

A keeper holds the lock of its export's file for as long as it lives, so there is never a second
one, and a number of a process in a file counts only while somebody holds its lock. The kernel knows
what is attached; the files know what it does not tell. They are gone after a boot, as the devices
are.
"""

import fcntl
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from backends.errors import InUseError, UnavailableError, one_line

DIRECTORY: Final = Path("/run/nbdserve/attach")
_SUFFIX: Final = ".json"


@dataclass(frozen=True)
class Record:
    """An export that is attached. ``flags`` are those that the kernel was told."""

    index: int
    volume: str
    uri: str
    flags: int
    connections: int
    keeper: int


class Claim:
    """The lock of an export; held until ``close``, or the end of every process that has it."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path

    @classmethod
    def take(cls, uri: str, directory: Path = DIRECTORY) -> Self | None:
        """None when a keeper has it. Raises UnavailableError without permission."""
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            path = _path(uri, directory)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UnavailableError(one_line(error)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if not path.exists():  # it was taken away by who had the lock
            os.close(descriptor)
            return cls.take(uri, directory)
        return cls(descriptor, path)

    def read(self) -> Record | None:
        """What was noted before, by a keeper that is gone."""
        return _read(self._path)

    def write(self, record: Record) -> None:
        """Note what is attached."""
        data = json.dumps(asdict(record)).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)

    def remove(self) -> None:
        """Nothing is attached any more."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._descriptor)


def list_records(directory: Path = DIRECTORY) -> Iterator[Record]:
    """What is noted; a device may have been detached or attached anew since, by others."""
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        record = _read(path)
        if record is not None:
            yield record


def has_keeper(record: Record, directory: Path = DIRECTORY) -> bool:
    """Whether the process that a record names lives."""
    try:
        descriptor = os.open(_path(record.uri, directory), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def tell_keeper(record: Record, number: signal.Signals) -> bool:
    """Send a signal to a keeper; False when there is none."""
    try:
        process = os.pidfd_open(record.keeper)
    except ProcessLookupError:
        return False
    try:
        # What holds the lock now is what the descriptor is of, or the keeper has just ended.
        if not has_keeper(record):
            return False
        signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(process)
    return True


def stop_keeper(record: Record, seconds: float = 15.0) -> None:
    """End a keeper, which leaves the device attached; InUseError when it does not end."""
    deadline = time.monotonic() + seconds
    tell_keeper(record, signal.SIGTERM)
    while has_keeper(record):
        if time.monotonic() > deadline:
            raise InUseError(f"the keeper, process {record.keeper}, does not end")
        time.sleep(0.02)


def _path(uri: str, directory: Path) -> Path:
    return directory / (hashlib.sha256(uri.encode()).hexdigest()[:32] + _SUFFIX)


def _read(path: Path) -> Record | None:
    """A file's record; None while there is none in it."""
    try:
        return Record(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
