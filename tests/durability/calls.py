"""The system calls on files that backends/local_layers.py and local_data.py make, on a ``Disk``.

``SimulatedPath`` is what the store is given for its directory; ``Calls`` stands for the ``os``
module, with nothing in it but what is simulated and the constants. ``routed`` puts them into the
two modules, makes whatever else differs between two runs the same, and collects what the product
complains of in its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import logging
import os
import random
import secrets
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from backends import local_data, local_layers
from snapshots import dirty_pages, head, merge, punching, threads, volume, wiping

from .disk import PAGE, Directory, Disk, File
from .loop import InlineExecutor, to_thread

_SPACE = 1 << 40
_PUNCH = 0x02


@functools.total_ordering
class SimulatedPath:
    """As much of ``pathlib.Path`` as the store uses."""

    def __init__(self, disk: Disk, path: str) -> None:
        self.disk = disk
        self.path = path

    def __truediv__(self, name: str) -> SimulatedPath:
        return SimulatedPath(self.disk, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimulatedPath) and self.path == other.path

    def __lt__(self, other: SimulatedPath) -> bool:
        return self.path < other.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> SimulatedPath:
        return SimulatedPath(self.disk, self.path.rpartition("/")[0] or "/")

    def with_name(self, name: str) -> SimulatedPath:
        return self.parent / name

    def exists(self) -> bool:
        try:
            self.disk.find(self.path)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        try:
            return isinstance(self.disk.find(self.path), Directory)
        except FileNotFoundError:
            return False

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if parents and self.path.count("/") > 1 and not self.parent.exists():
            self.parent.mkdir(parents=True, exist_ok=True)
        try:
            make_directory(self, mode)
        except FileExistsError:
            if not exist_ok:
                raise

    def unlink(self) -> None:
        unlink(self)

    def iterdir(self) -> Iterator[SimulatedPath]:
        for name in list_directory(self):
            yield self / name

    def glob(self, pattern: str) -> Iterator[SimulatedPath]:
        first, _, rest = pattern.partition("/")
        for name in list_directory(self):
            if fnmatchcase(name, first):
                path = self / name
                if not rest:
                    yield path
                elif path.is_dir():
                    yield from path.glob(rest)


def make_directory(path: SimulatedPath, mode: int = 0o777) -> None:
    directory, name = path.disk.place(path.path)
    if name in directory.entries:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path.path)
    path.disk.note(f"mkdir {path}")
    path.disk.change((directory, name, Directory({})))


def unlink(path: SimulatedPath) -> None:
    directory, name = path.disk.place(path.path)
    if isinstance(path.disk.find(path.path), Directory):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path.path)
    path.disk.note(f"unlink {path}")
    path.disk.change((directory, name, None))


def remove_tree(path: SimulatedPath) -> None:
    for below in list(path.iterdir()):
        if below.is_dir():
            remove_tree(below)
        else:
            unlink(below)
    directory, name = path.disk.place(path.path)
    path.disk.note(f"rmdir {path}")
    path.disk.change((directory, name, None))


def rename(old: SimulatedPath, new: SimulatedPath) -> None:
    disk = old.disk
    node = disk.find(old.path)
    directory, name = disk.place(old.path)
    to, new_name = disk.place(new.path)
    taken = to.entries.get(new_name)
    if isinstance(taken, Directory) and taken.entries:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), new.path)
    disk.note(f"rename {old} {new}")
    disk.change((directory, name, None), (to, new_name, node))


def stat_path(path: SimulatedPath) -> SimpleNamespace:
    return _stat(path.disk.find(path.path))


def list_directory(path: SimulatedPath) -> list[str]:
    directory = path.disk.find(path.path)
    if not isinstance(directory, Directory):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path.path)
    return list(directory.entries)


class Calls:
    """The ``os`` module of one process; descriptors are its own."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Disk, str, File | Directory]] = {}
        self._next = 1000
        self._locks: dict[int, tuple[File | Directory, int]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.isupper() or name == "strerror":
            return getattr(os, name)
        raise AttributeError(f"os.{name} is not simulated")

    def open(self, path: SimulatedPath, flags: int, mode: int = 0o777) -> int:
        disk = path.disk
        if disk.dead:
            disk.note("open")
        try:
            node = disk.find(path.path)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            directory, name = disk.place(path.path)
            disk.note(f"create {path}")
            node = File({}, 0)
            disk.change((directory, name, node))
        else:
            if flags & os.O_EXCL:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path.path)
        self._next += 1
        self._open[self._next] = disk, path.path, node
        return self._next

    def close(self, descriptor: int) -> None:
        del self._open[descriptor]
        self._locks.pop(descriptor, None)

    def close_all(self) -> None:
        """The process ends."""
        self._open.clear()
        self._locks.clear()

    def _file(self, descriptor: int) -> tuple[Disk, str, File]:
        disk, path, node = self._open[descriptor]
        assert isinstance(node, File), path
        return disk, path, node

    def pwrite(self, descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        disk, path, file = self._file(descriptor)
        disk.note(f"write {path} {offset}+{len(data)}")
        file.write(offset, bytes(data))
        return len(data)

    def preadv(self, descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        disk, _, file = self._file(descriptor)
        if disk.dead:
            disk.note("read")
        (buffer,) = buffers
        data = file.read(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        disk, _, file = self._file(descriptor)
        if disk.dead:
            disk.note("read")
        return file.read(offset, length)

    def fstat(self, descriptor: int) -> SimpleNamespace:
        return _stat(self._file(descriptor)[2])

    def lseek(self, descriptor: int, offset: int, how: int) -> int:
        assert how == os.SEEK_DATA
        _, _, file = self._file(descriptor)
        found = [page * PAGE for page in sorted(file.pages) if (page + 1) * PAGE > offset]
        if not found:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return max(offset, found[0])

    def fsync(self, descriptor: int) -> None:
        disk, path, node = self._open[descriptor]
        disk.note(f"fsync {path}")
        if isinstance(node, File):
            node.sync()
        else:
            disk.sync_directory(node)

    def fdatasync(self, descriptor: int) -> None:
        disk, path, file = self._file(descriptor)
        disk.note(f"fdatasync {path}")
        file.sync()

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        disk, path, file = self._file(descriptor)
        disk.note(f"allocate {path} {offset}+{length}")
        file.grow(offset + length)

    def ftruncate(self, descriptor: int, length: int) -> None:
        disk, path, file = self._file(descriptor)
        disk.note(f"truncate {path} {length}")
        file.truncate(length)

    def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        disk, path, file = self._file(descriptor)
        punch = bool(mode & _PUNCH)
        disk.note(f"{'punch' if punch else 'zero'} {path} {offset}+{length}")
        file.clear(offset, length, allocated=not punch)
        if not punch:
            file.grow(offset + length)

    def posix_fadvise(self, descriptor: int, offset: int, length: int, advice: int) -> None:
        """Of DONTNEED: clean pages go, and read as before; writing dirty ones is begun, which makes
        nothing durable, and they stay."""

    def sync_file_range(self, descriptor: int, offset: int, length: int, flags: int) -> None:
        """Writing is begun, which makes nothing durable."""

    def is_cached(self, descriptor: int, offset: int, length: int) -> bool:
        return False

    def count_unwritten(self, descriptor: int) -> int | None:
        return len(self._file(descriptor)[2].changes) * PAGE

    def find_extents(
        self, descriptor: int, offset: int, length: int, limit: int
    ) -> list[tuple[int, int]]:
        _, _, file = self._file(descriptor)
        pages = [page * PAGE for page in sorted(file.pages)]
        return [(page, PAGE) for page in pages if offset <= page < offset + length][:limit]

    def statvfs(self, path: SimulatedPath) -> SimpleNamespace:
        pages = _SPACE // PAGE
        return SimpleNamespace(
            f_bavail=pages, f_frsize=PAGE, f_blocks=pages, f_favail=pages, f_files=pages
        )

    @contextlib.contextmanager
    def scandir(self, path: SimulatedPath) -> Iterator[list[SimpleNamespace]]:
        yield [
            SimpleNamespace(
                name=below.name, stat=functools.partial(_stat, below.disk.find(below.path))
            )
            for below in path.iterdir()
        ]

    def flock(self, descriptor: int, operation: int) -> None:
        _, _, node = self._open[descriptor]
        exclusive = operation & fcntl.LOCK_EX
        for other, (locked, mode) in self._locks.items():
            if locked is node and other != descriptor and (exclusive or mode & fcntl.LOCK_EX):
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        self._locks[descriptor] = node, operation


def _stat(node: File | Directory) -> SimpleNamespace:
    if isinstance(node, Directory):
        return SimpleNamespace(st_size=PAGE, st_blocks=8, st_mode=stat.S_IFDIR, st_nlink=2)
    return SimpleNamespace(
        st_size=node.size,
        st_blocks=len(node.pages) * PAGE // 512,
        st_mode=stat.S_IFREG,
        st_nlink=1,
    )


class _AsynchronousFiles:
    """``aiofiles``: the same calls, from a thread."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

        def exists(path: SimulatedPath) -> bool:
            return path.exists()

        def is_directory(path: SimulatedPath) -> bool:
            return path.is_dir()

        def look_up(path: SimulatedPath) -> None:
            path.disk.find(path.path)

        def make_directories(path: SimulatedPath, mode: int, exist_ok: bool) -> None:
            path.mkdir(mode, parents=True, exist_ok=exist_ok)

        self.os = SimpleNamespace(
            replace=_threaded(rename),
            rename=_threaded(rename),
            unlink=_threaded(unlink),
            mkdir=_threaded(make_directory),
            makedirs=_threaded(make_directories),
            listdir=_threaded(list_directory),
            stat=_threaded(stat_path),
            path=SimpleNamespace(exists=_threaded(exists), isdir=_threaded(is_directory)),
        )

    @contextlib.asynccontextmanager
    async def open(self, path: SimulatedPath, mode: str) -> Any:
        flags = {"rb": os.O_RDONLY, "xb": os.O_RDWR | os.O_CREAT | os.O_EXCL}[mode]
        descriptor = await _threaded(self._calls.open)(path, flags)
        file = self._calls._file(descriptor)[2]
        try:

            def read() -> bytes:
                return file.read(0, file.size)

            def write(data: bytes) -> None:
                self._calls.pwrite(descriptor, data, file.size)

            async def flush() -> None:
                pass

            yield SimpleNamespace(
                read=_threaded(read), write=_threaded(write), flush=flush, fileno=lambda: descriptor
            )
        finally:
            self._calls.close(descriptor)


def _threaded(function: Any) -> Any:
    return functools.partial(to_thread, function)


# Small, so that short workloads reach what long ones do.
_LIMITS = {
    (head, "JOURNAL_STEP"): 4 << 10,
    (head, "RESERVED"): 1 << 10,
    (head, "_AMPLE"): 8 << 10,
    (head, "_COMPACT_FROM"): 4 << 10,
    (merge, "JOURNAL_STEP"): 4 << 10,
    (merge, "_CHUNK_BLOCKS"): 3,
    (volume, "INLINE_WRITE"): 3 * PAGE,
    (volume, "SYNC_FROM"): 24,
    (local_layers, "RESERVE_SIZE"): 8 << 10,
    (wiping, "_PIECE"): 3 * PAGE,
    (wiping, "_WRITE"): 2 * PAGE,
}


class _Complaints(logging.Handler):
    """Collects lines in a list."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Process:
    """What is routed: ``end`` it before another one is run; ``complaints`` is its log."""

    def __init__(self, calls: Calls, complaints: list[str]) -> None:
        self.complaints = complaints
        self._calls = calls

    def end(self) -> None:
        """Close what it had open, forget what it has logged."""
        self._calls.close_all()
        self.complaints.clear()


@contextlib.contextmanager
def routed(seed: object) -> Iterator[Process]:
    """Route the store's calls to the disks of the paths that it is given."""
    calls = Calls()
    handler = _Complaints()
    source = random.Random(repr(seed))
    stand_ins = {
        **_LIMITS,
        (local_layers, "os"): calls,
        (local_layers, "aiofiles"): _AsynchronousFiles(calls),
        (local_layers, "shutil"): SimpleNamespace(rmtree=remove_tree),
        (local_layers, "fcntl"): SimpleNamespace(
            flock=calls.flock,
            LOCK_EX=fcntl.LOCK_EX,
            LOCK_SH=fcntl.LOCK_SH,
            LOCK_NB=fcntl.LOCK_NB,
        ),
        (local_layers, "read_boot_id"): lambda: b"",
        (local_data, "os"): calls,
        (local_data, "fallocate"): calls.fallocate,
        (local_data, "find_extents"): calls.find_extents,
        (local_data, "find_data"): calls.find_extents,
        (local_data, "sync_file_range"): calls.sync_file_range,
        (local_data, "is_cached"): calls.is_cached,
        (local_data, "count_unwritten"): calls.count_unwritten,
        (threads, "ThreadPoolExecutor"): InlineExecutor,
        (asyncio, "to_thread"): to_thread,
        (dirty_pages, "read_room"): lambda: 1 << 30,
        (punching, "sleep"): lambda seconds: None,
        (punching, "perf_counter"): lambda: 0.0,
        (secrets, "token_hex"): lambda count: f"{source.getrandbits(8 * count):0{2 * count}x}",
    }
    loggers = [logging.getLogger(name) for name in ("backends", "snapshots")]
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.enter_context(patch.object(logger, "handlers", [handler]))
            stack.enter_context(patch.object(logger, "propagate", False))
        for (module, name), value in stand_ins.items():
            stack.enter_context(patch.object(module, name, value))
        yield Process(calls, handler.lines)
