"""One seam under backends/: it counts every input and output of a data directory, and fails one.

``Seam`` replaces what backends/ calls (the functions of os, shutil's and pathlib's among them,
aiofiles' files, fallocate, sync_file_range, ioctl, flock) for as long as it is entered. Whatever
is about a file below its root is counted under a **name**: the call, the file's role and how many
such calls there were before, as in ``fdatasync layers/2/journal #3``. Layers are numbered in the
order of their making, for their real names are random. So a script that is run again makes the
same calls, whichever thread is first. close(2) alone is not counted: what it may tell on a local
file system, a sync has told before.

A ``Fault`` fails the call of one name, once, or from it on every call that would take space
(``full``). A call that fails does nothing.

**A failed sync.** When fdatasync fails, Linux takes the pages for clean: they read as before, but
are not on the disk and never will be, whatever a later fdatasync says, until they are written
again or leave the page cache. The seam keeps the pages as they were when they were last synced;
``lose`` puts those back that were lost in that way, as the end of the machine does, and so does
FADV_DONTNEED for a file.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import io
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import aiofiles.os
import aiofiles.ospath
import aiofiles.threadpool

from backends import local_data

PAGE = 4096
_BY_DESCRIPTOR = (
    "preadv",
    "posix_fallocate",
    "posix_fadvise",
    "lseek",
    "fstat",
    "ftruncate",
    "pread",
)
_BY_PATH = ("mkdir", "rename", "replace", "unlink", "rmdir", "listdir", "scandir", "stat", "lstat")
_OTHERS = ("open", "close", "pwrite", "fsync", "fdatasync", "statvfs")
_PUNCH_HOLE = 0x02


@dataclass(frozen=True)
class Fault:
    """The call of this name fails with ``error``; with ``full`` all that take space do, too."""

    name: str
    error: int
    full: bool = False

    def __str__(self) -> str:
        return f"{errno.errorcode[self.error]}{' from' if self.full else ' at'} {self.name}"


@dataclass
class _Pages:
    """What of a file is not on the disk: pages as they were when they were last synced."""

    path: str
    dirty: dict[int, bytes] = field(default_factory=dict)
    lost: dict[int, bytes] = field(default_factory=dict)
    # Pages that have space although they may hold nothing.
    kept: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Open:
    path: str
    pages: _Pages


class Seam:
    """See the module's text; a context manager. ``names`` are the calls in
    order; ``counted`` is how many of them came before ``clear``."""

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.root = str(root)
        self.fault = fault
        self.fired = False
        self.cleared = False
        self.names: list[str] = []
        self.counted = 0
        self.takes_space: set[str] = set()
        self.open: dict[int, _Open] = {}
        self._pages: dict[int, _Pages] = {}
        self._layers: dict[str, int] = {}
        self._roles: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._real: dict[str, Any] = {}
        self._patches: list[Any] = []

    def clear(self) -> None:
        """Nothing fails from here on."""
        if not self.cleared:
            self.cleared = True
            self.counted = len(self.names)

    def begin_again(self) -> None:
        """Count calls from here on, as if there had been none."""
        self.names.clear()
        self._counts.clear()

    def fail_next(self, call: str, layer: Path) -> None:
        """Let the next such call on the data of a layer fail with EIO."""
        name = f"{call} {self._role(f'{layer}/data-00000')}"
        self.fault = Fault(f"{name} #{self._counts[name] + 1}", errno.EIO)

    def lose(self) -> None:
        """Let the pages that failed syncs have lost be as the disk has them."""
        for pages in self._pages.values():
            self._lose(pages)

    def close_all(self) -> list[str]:
        """Close what is open, as the end of a process does; returns what it was."""
        left = [found.path for found in self.open.values()]
        for descriptor in list(self.open):
            self._close(descriptor)
        return left

    # What is replaced

    def __enter__(self) -> Seam:
        for name in (*_BY_DESCRIPTOR, *_BY_PATH, *_OTHERS):
            self._real[name] = getattr(os, name)
        for name in _BY_DESCRIPTOR:
            self._replace(os, name, self._by_descriptor(name))
        for name in _BY_PATH:
            self._replace(os, name, self._by_path(name))
        self._replace(os, "statvfs", self._by_path("statvfs"))
        self._replace(os, "open", self._open)
        self._replace(os, "close", self._close)
        self._replace(os, "pwrite", self._pwrite)
        self._replace(os, "fsync", self._sync("fsync"))
        self._replace(os, "fdatasync", self._sync("fdatasync"))
        self._real["ioctl"], self._real["flock"] = fcntl.ioctl, fcntl.flock
        self._replace(fcntl, "ioctl", self._by_descriptor("ioctl"))
        self._replace(fcntl, "flock", self._by_descriptor("flock"))
        self._real["fallocate"] = local_data.fallocate
        self._replace(local_data, "fallocate", self._fallocate)
        self._real["sync_file_range"] = local_data.sync_file_range
        self._replace(local_data, "sync_file_range", self._by_descriptor("sync_file_range"))
        self._replace(aiofiles.threadpool, "sync_open", self._sync_open)
        # aiofiles took the functions when it was imported.
        for name in ("mkdir", "rename", "replace", "unlink", "listdir", "makedirs", "stat"):
            self._replace(aiofiles.os, name, aiofiles.os.wrap(_late(os, name)))
        for name in ("exists", "isdir"):
            self._replace(aiofiles.ospath, name, aiofiles.os.wrap(_late(os.path, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self._patches):
            patch.stop()
        self._patches.clear()

    def _replace(self, module: Any, name: str, function: Any) -> None:
        patch = mock.patch.object(module, name, function)
        patch.start()
        self._patches.append(patch)

    def _by_descriptor(self, name: str) -> Any:
        real = self._real[name]
        space = name == "posix_fallocate"

        @functools.wraps(real)
        def call(descriptor: int, *args: Any, **kwargs: Any) -> Any:
            found = self.open.get(descriptor)
            if found is not None:
                self._count(name, found.path, space)
                if name == "posix_fadvise" and args[2] == os.POSIX_FADV_DONTNEED:
                    self._lose(found.pages)
                if space:
                    found.pages.kept.update(range(args[0] // PAGE, (args[0] + args[1]) // PAGE))
            return real(descriptor, *args, **kwargs)

        return call

    def _by_path(self, name: str) -> Any:
        real = self._real[name]
        space = name == "mkdir"

        @functools.wraps(real)
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            place = self._place(path, kwargs.get("dir_fd"))
            if place is not None:
                self._count(name, place, space)
            return real(path, *args, **kwargs)

        return call

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        if place is None:
            return int(self._real["open"](path, flags, mode, dir_fd=dir_fd))
        self._count("open", place, bool(flags & os.O_CREAT) and not self._exists(place))
        descriptor: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        self._note(descriptor, place)
        return descriptor

    def _exists(self, path: str) -> bool:
        try:
            self._real["stat"](path)
        except FileNotFoundError:
            return False
        return True

    def _note(self, descriptor: int, path: str) -> None:
        with self._lock:
            inode = self._real["fstat"](descriptor).st_ino
            self.open[descriptor] = _Open(path, self._pages.setdefault(inode, _Pages(path)))

    def _close(self, descriptor: int) -> None:
        self.open.pop(descriptor, None)
        self._real["close"](descriptor)

    def _sync_open(self, path: Any, mode: str = "r", **_: Any) -> Any:
        place = self._place(path, None)
        assert place is not None, f"{path} is not below the data directory"
        raw = _File(self, place, mode)
        return io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)

    def _pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        found = self.open.get(descriptor)
        if found is None:
            return int(self._real["pwrite"](descriptor, data, offset))
        length = memoryview(data).nbytes
        pages = found.pages
        touched = range(offset // PAGE, (offset + length + PAGE - 1) // PAGE)
        has_space = pages.kept.issuperset(touched) or self._allocated(descriptor, offset, length)
        self._count("pwrite", found.path, not has_space)
        with self._lock:
            for page in touched:
                if page in pages.lost:
                    pages.dirty[page] = pages.lost.pop(page)
                elif page not in pages.dirty:
                    pages.dirty[page] = self._real["pread"](descriptor, PAGE, page * PAGE)
        return int(self._real["pwrite"](descriptor, data, offset))

    def _allocated(self, descriptor: int, offset: int, length: int) -> bool:
        """Whether a write there takes no space."""
        try:
            seek = self._real["lseek"]
            return bool(
                seek(descriptor, offset, os.SEEK_DATA) == offset
                and seek(descriptor, offset, os.SEEK_HOLE) >= offset + length
            )
        except OSError:
            return False

    def _sync(self, name: str) -> Any:
        """A sync of ours need not reach the disk: its power is never cut."""

        def sync(descriptor: int) -> None:
            found = self.open.get(descriptor)
            if found is None:
                self._real[name](descriptor)
                return
            try:
                self._count(name, found.path)
            except OSError:
                with self._lock:
                    found.pages.lost.update(found.pages.dirty)
                    found.pages.dirty.clear()
                raise
            with self._lock:
                found.pages.dirty.clear()

        return sync

    def _fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        found = self.open.get(descriptor)
        if found is not None:
            punches = bool(mode & _PUNCH_HOLE)
            self._count("punch" if punches else "fallocate", found.path, not punches)
            with self._lock:
                for page in range(offset // PAGE, (offset + length) // PAGE):
                    found.pages.dirty.pop(page, None)
                    found.pages.lost.pop(page, None)
                    (found.pages.kept.discard if punches else found.pages.kept.add)(page)
        self._real["fallocate"](descriptor, mode, offset, length)

    def _lose(self, pages: _Pages) -> None:
        with self._lock:
            lost, pages.lost = pages.lost, {}
            if not lost or not self._exists(pages.path):
                return
            descriptor = self._real["open"](pages.path, os.O_RDWR)
            try:
                for page, content in lost.items():
                    self._real["pwrite"](descriptor, content.ljust(PAGE, b"\0"), page * PAGE)
            finally:
                self._real["close"](descriptor)

    # Names

    def _place(self, path: Any, directory: int | None) -> str | None:
        if isinstance(path, int):
            found = self.open.get(path)
            return None if found is None else found.path
        place = os.fspath(path)
        if directory is not None:
            above = self.open.get(directory)
            return None if above is None else f"{above.path}/{place}"
        if isinstance(place, str) and place.startswith(self.root):
            return place
        return None

    def _role(self, path: str) -> str:
        """What a file is, without what is random in its name."""
        role = self._roles.get(path)
        if role is None:
            role = self._roles[path] = self._make_role(path)
        return role

    def _make_role(self, path: str) -> str:
        parts = path[len(self.root) :].strip("/").split("/")
        if parts[0] in ("layers", "lost") and len(parts) > 1:
            gone = ".new-" if parts[1].startswith(".new-") else ""
            layer = parts[1].removeprefix(".new-")
            parts[1] = gone + str(self._layers.setdefault(layer, len(self._layers) + 1))
        parts = [re.sub(r"-?[0-9a-f]{16,32}|-[0-9a-f]{8}$", "", part) for part in parts]
        return "/".join(parts)

    def _count(self, call: str, path: str, space: bool = False) -> None:
        with self._lock:
            name = f"{call} {self._role(path)}"
            self._counts[name] += 1
            name = f"{name} #{self._counts[name]}"
            self.names.append(name)
            if space:
                self.takes_space.add(name)
            fault = self.fault
            if fault is None or self.cleared:
                return
            if name == fault.name:
                self.fired = True
            elif not (self.fired and fault.full and space):
                return
        raise OSError(fault.error, os.strerror(fault.error), path)


class _File(io.FileIO):
    """A file of aiofiles, below its buffer."""

    def __init__(self, seam: Seam, path: str, mode: str) -> None:
        self._seam = seam
        self._path = path
        seam._count("open", path, "x" in mode)
        super().__init__(path, mode)
        seam._note(self.fileno(), path)

    def write(self, data: Any) -> int:
        self._seam._count("write", self._path, True)
        return super().write(data)

    def readall(self) -> bytes:
        self._seam._count("read", self._path)
        return super().readall()

    def close(self) -> None:
        if not self.closed:
            self._seam.open.pop(self.fileno(), None)
        super().close()


def _late(module: Any, name: str) -> Any:
    """A function that looks the real one up when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(module, name)(*args, **kwargs)

    return call
