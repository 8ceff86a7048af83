"""Raw images: the bytes of the volume, and nothing else. In files, zeros are holes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator

from snapshots.images.blocks import data_runs, read_at, write_at

_ZEROS = bytes(1 << 20)


class RawFileWriter:
    """Writes a new, empty file; ``size`` in bytes."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        os.ftruncate(descriptor, size)

    def write(self, offset: int, content: bytes) -> None:
        """Write ``content``; what is never written reads as zeros. OSError."""
        view = memoryview(content)
        for start, end in data_runs(view):
            write_at(self._descriptor, view[start:end], offset + start)

    def finish(self) -> None:
        """Nothing is left to do."""


class RawStreamWriter:
    """Writes from front to back, to a pipe for example.

    When it is the end of a file that is written to (``… >image``), zeros become holes there.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._position = 0
        self._sparse = _is_end_of_file(descriptor)

    def write(self, offset: int, content: bytes) -> None:
        """Write ``content``, and zeros up to it; offsets only grow. OSError."""
        view = memoryview(content)
        if not self._sparse:
            self._skip_to(offset)
            self._put(view)
            return
        for start, end in data_runs(view):
            self._skip_to(offset + start)
            self._put(view[start:end])

    def finish(self) -> None:
        """Write zeros to the end."""
        self._skip_to(self._size)
        if self._sparse:
            os.ftruncate(self._descriptor, os.lseek(self._descriptor, 0, os.SEEK_CUR))

    def _skip_to(self, offset: int) -> None:
        if self._sparse:
            os.lseek(self._descriptor, offset - self._position, os.SEEK_CUR)
            self._position = offset
        while self._position < offset:
            self._put(memoryview(_ZEROS)[: offset - self._position])

    def _put(self, view: memoryview) -> None:
        self._position += len(view)
        while view:
            view = view[os.write(self._descriptor, view) :]


def _is_end_of_file(descriptor: int) -> bool:
    """Whether seeking leaves holes: in a file, at its end, that is not opened for appending."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        return False
    return os.lseek(descriptor, 0, os.SEEK_CUR) == status.st_size


class RawImage:
    """Reads a file or a block device; its descriptor is the caller's."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.lseek(descriptor, 0, os.SEEK_END)

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of what is no hole, as the file system tells it, in order."""
        position = 0
        while position < self.size:
            try:
                start = os.lseek(self._descriptor, position, os.SEEK_DATA)
                position = os.lseek(self._descriptor, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole
                    return
                if error.errno == errno.EINVAL:  # a device, or a file system that does not tell
                    start, position = position, self.size
                else:
                    raise
            yield start, min(position, self.size) - start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; OSError, also when the file has become shorter."""
        if read_at(self._descriptor, buffer, offset) < len(buffer):
            raise OSError(errno.EIO, "it ends too early")
