"""Import: a disk image becomes a snapshot in a repository, without a volume or a daemon."""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Iterator
from typing import Protocol

from backends.errors import InUseError, InvalidError
from snapshots.images.formats import Format
from snapshots.images.qcow2_reader import MAGIC, Qcow2Image
from snapshots.images.raw import RawImage
from snapshots.names import BLOCK_SIZE, check_volume_size
from snapshots.repository import Repository

_MAX_GAP = 1 << 20  # holes up to here are read as zeros, so that lists of extents stay short


class _Image(Protocol):
    """Of one format. ``size`` in bytes."""

    size: int

    def extents(self) -> Iterator[tuple[int, int]]: ...

    def read_into(self, offset: int, buffer: memoryview) -> None: ...


class ImageSource:
    """What a push reads (:class:`snapshots.repository.Source`), from an open image file.

    The size is that of the image, rounded up to whole blocks with zeros. The snapshots that the
    volume has in the repository all count as ancestors of which nothing is known: everything is
    read, and what is as in the newest is not stored again.
    """

    def __init__(
        self,
        repository: Repository,
        volume: str,
        snapshot: str,
        descriptor: int,
        name: str,
        image_format: Format,
    ) -> None:
        """InvalidError or CorruptError when it is no such image; ``name`` is for messages."""
        self.volume = volume
        self.snapshot = snapshot
        self.snapshot_id = f"import-{secrets.token_hex(16)}"
        self._descriptor = descriptor
        self._name = name
        self._status = _fingerprint(descriptor)
        self.created = _written(descriptor)
        self._image = _open(descriptor, name, image_format)
        self.image_size = self._image.size
        self.size = -(-self._image.size // BLOCK_SIZE) * BLOCK_SIZE
        if not self.size:
            raise InvalidError(f"{name} is empty: it is no disk image")
        check_volume_size(self.size)
        newest_first = reversed(repository.list(volume))
        self._ancestors = [summary.snapshot_id for summary in newest_first]

    def ancestors(self) -> list[str]:
        """Ids of the volume's snapshots in the repository, newest first."""
        return self._ancestors

    def extents(self) -> list[tuple[int, int]]:
        """(offset, length) in bytes of everything that may not be zero, in order."""
        extents: list[tuple[int, int]] = []
        for offset, length in self._image.extents():
            if extents and offset - sum(extents[-1]) <= _MAX_GAP:
                extents[-1] = (extents[-1][0], offset + length - extents[-1][0])
            else:
                extents.append((offset, length))
        return extents

    def changed_extents(self, since: str) -> list[tuple[int, int]]:
        """Everything: an image does not say what changed."""
        return [(0, self.size)]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; OSError. InUseError when the file has been written to meanwhile."""
        inside = max(0, min(len(buffer), self.image_size - offset))
        self._image.read_into(offset, buffer[:inside])
        buffer[inside:] = bytes(len(buffer) - inside)
        if _fingerprint(self._descriptor) != self._status:
            raise InUseError(
                f"{self._name} was changed while it was read, and nothing was stored: import it"
                " again when nobody writes to it"
            )


def _open(descriptor: int, name: str, image_format: Format) -> _Image:
    if image_format is Format.QCOW2:
        return Qcow2Image(descriptor, name)
    return RawImage(descriptor)


def looks_like_qcow2(descriptor: int) -> bool:
    """Whether a file begins as qcow2 images do; a raw image could, too, if its guest likes."""
    return os.pread(descriptor, len(MAGIC), 0) == MAGIC


def _written(descriptor: int) -> float:
    """When an image was last written to, as far as its file tells; in seconds since the epoch."""
    status = os.fstat(descriptor)
    now = time.time()
    return min(max(0.0, status.st_mtime), now) if stat.S_ISREG(status.st_mode) else now


def _fingerprint(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
