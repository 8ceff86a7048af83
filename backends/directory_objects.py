"""An object store in a directory: the object ``a/b`` is the file ``a/b`` below it.

An object is written to a temporary file in ``incoming~`` (no key can have that name), made durable
with fsync, then linked (``put_if_absent``: link fails when the name is taken, so one of many wins,
also between hosts on NFS) or renamed (``put``) to its place, and the directory is made durable
too. A reader sees a whole object or none. What a crash leaves in ``incoming~`` is removed when
the store is opened a day later.

``delete`` removes directories that it empties, so writing and deleting race for a directory: the
writer makes it again.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backends.errors import (
    CorruptError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from backends.objects import check_key, check_prefix, is_component

_INCOMING = "incoming~"
_ABANDONED_AFTER = 24 * 3600.0  # seconds; a put takes far less
_PLACE_ATTEMPTS = 100


class DirectoryObjectStore:
    """Objects as files below ``root``. See the module's text."""

    def __init__(self, root: Path, *, create: bool = False) -> None:
        self.name = f"file://{root}"
        self._root = root
        self._lock = threading.Lock()
        self._durable_directories: set[Path] = set()
        with self._explained("open"):
            if create:
                self._create()
            if not root.is_dir():
                if root.exists():
                    raise InvalidError(f"{root} is not a directory: name one")
                raise NotFoundError(f"there is no directory {root}: create it, or mount its disk")
            self._remove_abandoned()

    def _create(self) -> None:
        """Make the directory, but not those that it lies in: a disk may not be mounted there."""
        try:
            self._root.mkdir()
        except FileExistsError:
            return
        except FileNotFoundError:
            raise NotFoundError(
                f"there is no directory {self._root.parent}: create it, or mount its disk"
            ) from None
        _sync_directory(self._root.parent)

    def put(self, key: str, data: bytes | bytearray) -> None:
        target = self._path(key)
        with self._explained("write", key), self._temporary(data) as temporary:
            self._place(target, lambda: temporary.replace(target))

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        target = self._path(key)
        with self._explained("write", key):
            if os.path.lexists(target):
                return False
            with self._temporary(data) as temporary:
                try:
                    self._place(target, lambda: target.hardlink_to(temporary))
                except FileExistsError:
                    return False
                return True

    def get(self, key: str, limit: int) -> bytes:
        with self._explained("read", key), self._opened(key) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise CorruptError(
                    f"object {key} of {self.name} has {size} bytes, at most {limit} are expected"
                )
            return self._read(descriptor, key, 0, size)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        with self._explained("read", key), self._opened(key) as descriptor:
            size = os.fstat(descriptor).st_size
            if offset + length > size:
                raise CorruptError(
                    f"object {key} of {self.name} ends at {size}, before {offset + length}"
                )
            return self._read(descriptor, key, offset, length)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        check_prefix(prefix)
        with self._explained("list"):
            if not self._root.is_dir():
                raise FileNotFoundError(errno.ENOENT, "the directory is gone", str(self._root))
            start = prefix.rpartition("/")[0]
            yield from self._walk(start, prefix)

    def size(self, key: str) -> int | None:
        with self._explained("look at", key):
            try:
                found = self._path(key).stat(follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                self._check_root()
                return None
            return None if stat.S_ISDIR(found.st_mode) else found.st_size

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained("delete", key):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._check_root()
                return
            with suppress(FileNotFoundError):  # another delete removed the directory already
                _sync_directory(path.parent)
            for directory in path.parents:
                if directory == self._root:
                    break
                try:
                    directory.rmdir()
                except OSError:  # not empty, or another delete was faster
                    break
                with self._lock:
                    self._durable_directories.discard(directory)

    def stop_retrying(self) -> None:
        """Nothing is ever tried again here."""

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _check_root(self) -> None:
        """An unmounted disk must not look like a repository without objects."""
        if not self._root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the directory is gone", str(self._root))

    @contextmanager
    def _temporary(self, data: bytes | bytearray) -> Iterator[Path]:
        """A durable file with ``data`` in it, removed afterwards unless it was renamed."""
        incoming = self._root / _INCOMING
        with suppress(FileExistsError):
            incoming.mkdir()
        path = incoming / secrets.token_hex(16)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield path
        finally:
            with suppress(FileNotFoundError):
                path.unlink()

    def _place(self, target: Path, place: Callable[[], object]) -> None:
        for _ in range(_PLACE_ATTEMPTS):
            try:
                self._make_directories(target.parent)
                place()
            except FileNotFoundError:  # a delete removed the directory meanwhile
                self._check_root()
                continue
            try:
                _sync_directory(target.parent)
            except FileNotFoundError:  # our object was deleted again, and the directory with it
                return
            return
        raise UnavailableError(f"cannot write {target}: its directory keeps disappearing")

    def _make_directories(self, directory: Path) -> None:
        if directory == self._root:
            return
        with self._lock:
            if directory in self._durable_directories and directory.is_dir():
                return
        self._make_directories(directory.parent)
        with suppress(FileExistsError):
            directory.mkdir()
        # Also when it was there: whoever made it may not have made it durable yet.
        _sync_directory(directory.parent)
        with self._lock:
            self._durable_directories.add(directory)

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            raise NotFoundError(f"there is no object {key} in {self.name}") from None
        try:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise NotFoundError(f"there is no object {key} in {self.name}")
            yield descriptor
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, key: str, offset: int, length: int) -> bytes:
        data = os.pread(descriptor, length, offset)
        while len(data) < length:
            more = os.pread(descriptor, length - len(data), offset + len(data))
            if not more:
                raise CorruptError(
                    f"object {key} of {self.name} ends at {offset + len(data)}, "
                    f"before {offset + length}"
                )
            data += more
        return data

    def _walk(self, directory: str, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            with os.scandir(self._root / directory) as scan:
                entries = [entry for entry in scan if is_component(entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            return
        names = []
        for entry in entries:
            key = f"{directory}/{entry.name}" if directory else entry.name
            if entry.is_dir(follow_symlinks=False):
                names.append((key + "/", entry))
            elif entry.is_file(follow_symlinks=False):
                names.append((key, entry))
        for key, entry in sorted(names, key=lambda pair: pair[0]):
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key[:-1], prefix)
            elif key.startswith(prefix):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    yield key, entry.stat(follow_symlinks=False).st_size

    def _remove_abandoned(self) -> None:
        oldest = time.time() - _ABANDONED_AFTER
        with suppress(FileNotFoundError, PermissionError):
            for path in (self._root / _INCOMING).iterdir():
                if path.stat().st_mtime < oldest:
                    path.unlink()

    @contextmanager
    def _explained(self, doing: str, key: str = "") -> Iterator[None]:
        """Turn an OSError into the one line that names the place and what to do."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            what = f"cannot {doing} {self._root / key if key else self._root}"
            reason = (error.strerror or type(error).__name__).lower()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NoSpaceError(f"{what}: {reason}; free some space in {self._root}") from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UnavailableError(
                    f"{what}: {reason}; the file system must allow this user to write and to make "
                    "hard links there"
                ) from error
            if error.errno in (errno.EOPNOTSUPP, errno.EMLINK):
                raise UnavailableError(
                    f"{what}: {reason}; use a file system that has hard links"
                ) from error
            if error.errno == errno.ENOENT:
                raise NotFoundError(
                    f"{what}: {reason}; is the disk of {self._root} mounted?"
                ) from error
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise CorruptError(f"{what}: it is not a regular file") from error
            raise UnavailableError(f"{what}: {reason}; check the disk") from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
