"""What push reads from and restore writes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: Called with (bytes done, bytes in all), always from the thread that made the call.
Progress = Callable[[int, int], None]


class Source(Protocol):
    """An immutable snapshot of a volume. Methods block and may be called from any thread."""

    @property
    def volume(self) -> str:
        """Name of the volume; the repository groups by it."""

    @property
    def snapshot(self) -> str:
        """Name of the snapshot."""

    @property
    def snapshot_id(self) -> str:
        """What tells this snapshot from every other, also from one of the same name later."""

    @property
    def created(self) -> float:
        """When the snapshot was taken, in seconds since the epoch."""

    @property
    def size(self) -> int:
        """Bytes."""

    def ancestors(self) -> list[str]:
        """Ids of the snapshots that :meth:`changed_extents` accepts, newest first."""

    def extents(self) -> list[tuple[int, int]]:
        """(offset, length) in bytes of everything that may not be zero, sorted."""

    def changed_extents(self, since: str) -> list[tuple[int, int]]:
        """(offset, length) in bytes of what may differ from the snapshot ``since``, sorted."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset``; OSError when they cannot be read."""


class Sink(Protocol):
    """A volume that is being filled. Methods block and may be called from any thread.

    It reads as zeros at first; no place is written twice, and zeros are not written at all.
    """

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset`` (bytes); OSError when that fails."""

    def holds(self, offset: int, length: int) -> bool:
        """Whether all of that range (bytes) is there from an earlier, interrupted restore."""

    def complete(self, offset: int, length: int) -> None:
        """All of that range that is not zero was written; OSError when it cannot be kept."""
