"""Layer data in sparse local files.

A file system ends a file somewhere (ext4 just short of 16 TiB), and a row of smaller files keeps
every operation on one of them cheap, so a layer's data is cut at each TiB: ``data-00000`` holds
volume offsets 0 to 1 TiB, ``data-00001`` the next, and so on. ``prepare`` makes a file, or the
first write to it; one that is missing holds no blocks. Its directory entry becomes durable with the
next ``sync``.

``try_read`` assumes Linux's ``preadv2`` with RWF_NOWAIT: a page that is not in the page cache makes
it return short or raise BlockingIOError, and the caller then reads in a thread. A file system
that lacks the flag (EOPNOTSUPP) is read in threads only.

Reading leaves the time of access alone where we may ask for that: after a write, the first read
would otherwise have to write to the file system's journal, and may wait for a commit of it.

**A failed sync.** Linux takes pages that it could not write for clean: they read as if they were on
the disk, and a later sync has nothing to say of them. So when a sync has failed, closing drops the
cache: whoever opens the file again, this process or the next one, finds what the disk has.

**A file that somebody removed or cut short** while it is open can be written and synced all the
same, and what is written behind its end turns what is missing into zeroes. ``sync`` looks for that.

``write_back`` and ``unwritten`` tell the kernel to write early, and ask it how much is left to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from backends.file_calls import fallocate, find_data, find_extents, sync_file_range
from backends.layers import Buffer
from backends.page_cache import count_unwritten, is_cached

ROW_SHIFT = 40
ROW_SIZE = 1 << ROW_SHIFT
_ROW_MASK = ROW_SIZE - 1
# Longer writes are cut. The page cache keeps what one write brings in folios as large as it can,
# and ext4 goes through all blocks of a folio at each later write to it: measured on Linux 6.18,
# 4 KiB over data that came in 1 MiB writes take 7.8 µs, in 128 KiB writes 2.6 µs, and the large
# writes themselves are three times as slow.
_PIECE = 128 << 10

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10
_ZEROES = memoryview(bytes(1 << 20))

_NOWAIT = os.RWF_NOWAIT

_SYNC_FILE_RANGE_WRITE = 2


Find = Callable[[int, int, int, int], list[tuple[int, int]]]


class LocalDataFile:
    """The data of one layer as a row of sparse files in a directory (see the module's text).

    Descriptors are opened when first needed and kept. The first ``sync`` visits all rows, later
    ones only those written since.
    """

    def __init__(self, directory: Path, *, writable: bool) -> None:
        self._directory = directory
        self._writable = writable
        self._rows: dict[int, int] = {}
        self._dirty: set[int] = set()
        # How long each was at the end of the last sync: none ever gets shorter.
        self._sizes: dict[int, int] = {}
        self._failed = False
        self._making = threading.Lock()
        try:
            for path in sorted(directory.glob("data-*")):
                flags = os.O_RDWR if writable else os.O_RDONLY
                row = int(path.name[5:])
                self._rows[row] = _open(path, flags)
                self._sizes[row] = os.fstat(self._rows[row]).st_size
        except BaseException:
            self.close()
            raise
        # What a killed process made and wrote may not be durable yet.
        self._entries_made = bool(self._rows)
        self._dirty.update(self._rows)

    def _row_for_write(self, row: int) -> int:
        descriptor = self._rows.get(row)
        if descriptor is None:
            with self._making:
                descriptor = self._rows.get(row)
                if descriptor is None:
                    descriptor = self._rows[row] = self._make_row(row)
        return descriptor

    def _make_row(self, row: int) -> int:
        descriptor = _open(self._directory / f"data-{row:05d}", os.O_RDWR | os.O_CREAT)
        # The directory entry must be as durable as the first block that is synced.
        self._entries_made = True
        return descriptor

    def _row_for_read(self, row: int) -> int | None:
        descriptor = self._rows.get(row)
        if descriptor is None:
            with self._making, contextlib.suppress(FileNotFoundError):
                # A merge in another process may have made it since this was opened.
                flags = os.O_RDWR if self._writable else os.O_RDONLY
                descriptor = self._rows.get(row)
                if descriptor is None:
                    path = self._directory / f"data-{row:05d}"
                    descriptor = self._rows[row] = _open(path, flags)
        return descriptor

    def prepare(self, offset: int, length: int) -> None:
        for row, _, _ in _pieces(offset, length):
            self._row_for_write(row)

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        row = offset >> ROW_SHIFT
        try:
            # At the end of a row it is short: that is read in a thread.
            return os.preadv(self._rows[row], (buffer,), offset & _ROW_MASK, _NOWAIT) == len(buffer)
        except BlockingIOError:
            return False
        except KeyError:
            return False  # made by another process since, or missing: see ``read``
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return False
            raise

    def arrival(self, offset: int, length: int) -> None:
        return None

    def lend(self, offset: int, length: int) -> tuple[int, int] | None:
        position = offset & _ROW_MASK
        descriptor = self._rows.get(offset >> ROW_SHIFT)
        if descriptor is None or position + length > ROW_SIZE:
            return None
        return (descriptor, position) if is_cached(descriptor, position, length) else None

    def read(self, offset: int, buffer: memoryview) -> None:
        while len(buffer) > 0:
            row = offset >> ROW_SHIFT
            position = offset & _ROW_MASK
            part = buffer[: ROW_SIZE - position]
            descriptor = self._row_for_read(row)
            if descriptor is None:
                raise OSError(errno.EIO, f"{self._directory}/data-{row:05d} is missing")
            got = os.preadv(descriptor, (part,), position)
            if got == 0:
                raise OSError(
                    errno.EIO, f"{self._directory}/data-{row:05d} ends before offset {position}"
                )
            buffer = buffer[got:]
            offset += got

    def write(self, offset: int, data: Buffer) -> None:
        row = offset >> ROW_SHIFT
        position = offset & _ROW_MASK
        length = len(data)
        if length <= _PIECE and position + length <= ROW_SIZE:
            descriptor = self._rows.get(row)
            if descriptor is None:
                descriptor = self._row_for_write(row)
            written = os.pwrite(descriptor, data, position)
            # Only after the write: a sync in another thread must not clear the mark before it.
            self._dirty.add(row)
            if written == length:
                return
            data = memoryview(data)[written:]
            offset += written
        view = memoryview(data)
        while len(view) > 0:
            row = offset >> ROW_SHIFT
            position = offset & _ROW_MASK
            part = view[: min(_PIECE, ROW_SIZE - position)]
            written = os.pwrite(self._row_for_write(row), part, position)
            self._dirty.add(row)
            view = view[written:]
            offset += written

    def write_zeroes(self, offset: int, length: int) -> None:
        for row, position, count in _pieces(offset, length):
            descriptor = self._row_for_write(row)
            try:
                fallocate(descriptor, _FALLOC_FL_ZERO_RANGE, position, count)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                done = 0
                while done < count:
                    done += os.pwrite(descriptor, _ZEROES[: count - done], position + done)
            self._dirty.add(row)

    def punch(self, offset: int, length: int) -> None:
        for row, position, count in _pieces(offset, length):
            if row not in self._rows:
                continue
            try:
                fallocate(
                    self._row_for_write(row),
                    _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE,
                    position,
                    count,
                )
            except OSError as error:
                # Space is not given back there; what the blocks read as is not decided here.
                if error.errno != errno.EOPNOTSUPP:
                    raise
            self._dirty.add(row)

    def allocated_ranges(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return self._find(find_extents, offset, length, limit)

    def occupied_ranges(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return self._find(find_data, offset, length, limit)

    def _find(self, find: Find, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for row, position, count in _pieces(offset, length):
            descriptor = self._rows.get(row)
            if descriptor is not None and len(found) < limit:
                base = row << ROW_SHIFT
                extents = find(descriptor, position, count, limit - len(found))
                found += [(base + start, size) for start, size in extents]
        return found

    def cache(self, offset: int, length: int) -> None:
        for row, position, count in _pieces(offset, length):
            descriptor = self._rows.get(row)
            if descriptor is not None:
                os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_WILLNEED)

    def write_back(self) -> None:
        for descriptor in list(self._rows.values()):
            try:
                sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)
            except OSError:
                self._failed = True
                raise

    def unwritten(self) -> int | None:
        counts = [count_unwritten(descriptor) for descriptor in list(self._rows.values())]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def sync(self) -> None:
        # Rows written from here on are the next sync's; a failed one is never taken as done.
        rows = list(self._dirty)
        self._dirty.difference_update(rows)
        if self._entries_made:
            self._entries_made = False
            try:
                _sync_directory(self._directory)
            except OSError:
                self._entries_made = True
                self._dirty.update(rows)
                raise
        try:
            for row in rows:
                os.fdatasync(self._rows[row])
        except OSError:
            self._failed = True
            raise
        for row in rows:
            path = self._directory / f"data-{row:05d}"
            self._sizes[row] = check_there(self._rows[row], path, self._sizes.get(row, 0))

    def allocated(self) -> int:
        return sum(os.fstat(descriptor).st_blocks * 512 for descriptor in self._rows.values())

    def find_short(self, ends: Sequence[int]) -> str | None:
        for end in ends:
            row = (end - 1) >> ROW_SHIFT
            position = end - (row << ROW_SHIFT)
            path = self._directory / f"data-{row:05d}"
            descriptor = self._row_for_read(row)
            if descriptor is None:
                return f"{path}: is missing, {position} bytes expected"
            size = os.fstat(descriptor).st_size
            if size < position:
                return f"{path}: cut short at offset {size}, {position} bytes expected"
        return None

    def close(self) -> None:
        for descriptor in self._rows.values():
            if self._failed:
                drop_cache(descriptor)
            os.close(descriptor)
        self._rows.clear()


def check_there(descriptor: int, path: Path, size: int) -> int:
    """The size of an open file; EIO when it was removed, or is shorter than ``size`` bytes."""
    found = os.fstat(descriptor)
    if found.st_nlink == 0:
        raise OSError(errno.EIO, f"{path} was removed while it was open")
    if found.st_size < size:
        raise OSError(errno.EIO, f"{path} was cut short from {size} to {found.st_size} bytes")
    return found.st_size


def drop_cache(descriptor: int) -> None:
    """Let what of a file is in the page cache and counts as clean be read from the disk again."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _open(path: Path, flags: int) -> int:
    flags |= os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOATIME, 0o600)
    except PermissionError:
        return os.open(path, flags, 0o600)  # a file of somebody else's


def holds_data(path: Path) -> bool:
    """Whether a sparse file holds anything but holes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_DATA) >= 0
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pieces(offset: int, length: int) -> list[tuple[int, int, int]]:
    """Cut a range at the rows' borders: (row, position in it, length)."""
    pieces = []
    end = offset + length
    while offset < end:
        position = offset & _ROW_MASK
        count = min(end - offset, ROW_SIZE - position)
        pieces.append((offset >> ROW_SHIFT, position, count))
        offset += count
    return pieces
