"""System calls on files that Python's os module does not offer; all raise OSError."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.sync_file_range.restype = ctypes.c_int
# <linux/fiemap.h>: start, length, flags, extents found, room for extents; an extent's place in the
# file and its length, behind which follows what matters nobody here.
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP = struct.Struct("=QQIII4x")
_EXTENT = struct.Struct("=Q8xQ32x")
# What is punched at a time where the file system does not tell what it has.
_UNKNOWN = 64 << 20


def read_boot_id() -> bytes:
    """What the kernel calls this run of the machine (random(4)); empty where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b""


def sync_file_range(descriptor: int, offset: int, length: int, flags: int) -> None:
    """``sync_file_range(2)``; a ``length`` of 0 means to the end of the file."""
    while _libc.sync_file_range(descriptor, offset, length, flags) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """``fallocate(2)`` with its mode, which Python's os module does not offer."""
    while _libc.fallocate(descriptor, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def find_extents(descriptor: int, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """The first ``limit`` extents (offset, length) of a range of a file, by ``FS_IOC_FIEMAP``.

    Unlike what SEEK_DATA finds they include space that was allocated but never written. Where the
    file system cannot tell, it is all of the range, in pieces.
    """
    found = _ask_for_extents(descriptor, offset, length, limit)
    if found is None:
        starts = range(offset, offset + length, _UNKNOWN)[:limit]
        return [(start, min(_UNKNOWN, offset + length - start)) for start in starts]
    return found


def find_data(descriptor: int, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """The same, but never a hole: where the file system cannot tell, only what has been written."""
    found = _ask_for_extents(descriptor, offset, length, limit)
    if found is not None:
        return found
    found = []
    end = offset + length
    while offset < end and len(found) < limit:
        try:
            begin = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # nothing up to the file's end
        if begin >= end:
            break
        offset = min(os.lseek(descriptor, begin, os.SEEK_HOLE), end)
        found.append((begin, offset - begin))
    return found


def _ask_for_extents(
    descriptor: int, offset: int, length: int, limit: int
) -> list[tuple[int, int]] | None:
    """What FS_IOC_FIEMAP says; None: the file system does not have it."""
    buffer = bytearray(_FIEMAP.size + limit * _EXTENT.size)
    _FIEMAP.pack_into(buffer, 0, offset, length, 0, 0, limit)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, buffer)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            raise
        return None
    count = _FIEMAP.unpack_from(buffer)[3]
    found = []
    for number in range(count):
        start, size = _EXTENT.unpack_from(buffer, _FIEMAP.size + number * _EXTENT.size)
        begin, end = max(start, offset), min(start + size, offset + length)
        if begin < end:
            found.append((begin, end - begin))
    return found
