"""The layer store contract: random-access, mutable bytes under the volumes.

A **layer** is one level of a volume's copy-on-write stack. To a store it is a name that owns

* **data**: a sparse space of bytes in which a block lies at the offset it has in the volume;
* **logs**: small named files that only grow (journal, merge log) or that appear whole (index).

Beside the layers a store keeps **records**: small blobs, grouped by kind, each replaced atomically.

Three kinds of call, told apart because they run in different places:

* ``DataFile`` methods and ``LogFile`` methods are synchronous. ``try_read`` never blocks on a
  disk; the others may, and callers choose between the event loop and a thread.
* ``LayerStore`` methods that touch the disk are coroutines: they are rare, off the data path.
* Errors of the data path are plain ``OSError`` with an errno, since the NBD reply needs one;
  errors of the coroutines are ``StorageError`` where the user can do something about it, else
  ``OSError``.

**Durability.** ``DataFile.sync`` and ``LogFile.sync`` return when everything written before is on
stable storage. A coroutine that creates, replaces or removes something returns when that is
durable, its directory entry included. Nothing else is promised to survive a power cut, and no
order between unsynced writes either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Space:
    """Room on the file system under a store, in bytes; and in files, 0 where it has no bound."""

    free: int
    total: int
    inodes_free: int = 0
    inodes: int = 0


@dataclass(frozen=True)
class LayerFiles:
    """What a layer has beside its data: names of logs, and where there is what no store made."""

    logs: list[str]
    strange: list[str]


class DataFile(Protocol):
    """The data of one layer, addressed by volume offset in bytes."""

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` without waiting for a disk; False when that is not possible now."""

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; EIO when the layer ends before it is full."""

    def arrival(self, offset: int, length: int) -> asyncio.Future[None] | None:
        """What to wait for before ``read`` can serve the range; None: nothing but a disk.

        Called on the event loop. The future ends in an OSError when the range does not come.
        """

    def lend(self, offset: int, length: int) -> tuple[int, int] | None:
        """(descriptor, position) of a file to send the range from, as it can be without a disk.

        None when that is not possible now. What is sent refers to the page cache: whoever punches
        the range before it has been received changes it on its way.
        """

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``; on an error any part of it may have been written."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes while keeping it allocated."""

    def punch(self, offset: int, length: int) -> None:
        """Give the range's space back; it then reads as zeroes."""

    def allocated_ranges(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """The first ``limit`` ranges (offset, length) of the range that may use disk space.

        In order; it may wait for a disk. What is not in them uses none, up to the end of the last
        one when there are ``limit``, else up to the end of the range.
        """

    def occupied_ranges(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """The first ``limit`` ranges of the range with disk space that was ever written; in order.

        Unlike those of ``allocated_ranges`` they never are a hole: overwriting them takes no space.
        """

    def cache(self, offset: int, length: int) -> None:
        """Ask for the range to be read ahead into the page cache."""

    def prepare(self, offset: int, length: int) -> None:
        """Do beforehand what the first write to the range would have to do; adds no data."""

    def write_back(self) -> None:
        """Begin to bring to the disk what was written; it may wait for some of that, not for all.

        It makes nothing durable, and an error here means what one of ``sync`` means.
        """

    def unwritten(self) -> int | None:
        """Bytes that wait in memory for the disk; None when that is not known."""

    def sync(self) -> None:
        """Make every write and punch that returned before durable."""

    def allocated(self) -> int:
        """Bytes of disk space in use."""

    def find_short(self, ends: Sequence[int]) -> str | None:
        """What keeps ``read`` from reaching one of these offsets, in words; None: nothing does.

        A write behind the end of what is left would turn what is missing into zeroes. OSError.
        """

    def close(self) -> None:
        """Release descriptors; no other call may follow."""


class LogFile(Protocol):
    """A file that grows at its end."""

    def append(self, data: Buffer) -> None:
        """Write at the end.

        Where space was reserved, zeroes of it lie behind what was appended even after a power cut:
        a reader can tell a log that ends from one that was cut short.
        """

    def reserve(self, length: int) -> None:
        """Guarantee that ``length`` further bytes can be appended whatever fills the disk."""

    def sync(self) -> None:
        """Make everything appended before durable."""

    def close(self) -> None:
        """Release descriptors; no other call may follow."""


class ScratchFile(Protocol):
    """Bytes beside a layer that outlive the process, not the machine: nothing ever syncs them."""

    def write(self, position: int, data: Buffer) -> None:
        """Write all of ``data``; on an error any part of it may have been written."""

    def clear(self) -> None:
        """Make it empty; needs no space."""

    def reserve(self, length: int) -> None:
        """Have space for its first ``length`` bytes, whatever fills the disk."""

    def remove(self) -> None:
        """Take its name away."""

    def close(self) -> None:
        """Release the descriptor; no other call may follow."""


class LayerClaim(Protocol):
    """A hold on a layer against other processes, until released or until the process ends."""

    def release(self) -> None:
        """Let go; a second call does nothing."""


class StagedRecord(Protocol):
    """A record that is written and synced, but does not count until ``commit``."""

    async def commit(self) -> None:
        """Make it the record of its name; needs no space."""

    async def discard(self) -> None:
        """Remove it again."""


class LayerStore(Protocol):
    """Where layers and records live."""

    @property
    def machine_run(self) -> bytes:
        """What tells this run of the machine from the ones before; empty when nothing does.

        What a scratch file has was written in the same run, or says nothing.
        """

    @property
    def was_orderly(self) -> bool:
        """Whether the last owner let go in good order; once this process is the owner."""

    async def lock(self) -> None:
        """Become the one owner of the store; InUseError when another process is."""

    async def unlock(self, *, orderly: bool = True) -> None:
        """Stop being the owner; not ``orderly``: what is cached may not be what is on the disk."""

    async def space(self) -> Space:
        """Room left and in all."""

    async def release_reserve(self) -> bool:
        """Free the space kept back for metadata, when there is any; whether some was freed."""

    async def keep_reserve(self) -> None:
        """Keep that space back again; does nothing when there is none to spare."""

    async def list_held(self) -> dict[str, int]:
        """What space is held, by the names that it is held under, in bytes."""

    async def hold(self, name: str, length: int) -> int:
        """Hold ``length`` bytes under a name, no more and no less, as far as there is space.

        Nobody else can take them then. Returns what is held; durable, but for what is let go.
        """

    def spend(self, name: str, length: int) -> int:
        """Let go of ``length`` bytes held under a name, or of all; how many they were. Blocking."""

    def holds_any(self) -> bool:
        """Whether space is held under any name; it may wait for a disk, but hardly ever does."""

    def free_now(self) -> int:
        """Bytes that are free; blocking in the same way."""

    async def list_layers(self) -> list[str]:
        """Names of all layers."""

    async def list_files(self, layer: str) -> LayerFiles:
        """What a layer consists of; NotFoundError."""

    async def list_set_aside(self) -> list[str]:
        """Where the layers are that were set aside."""

    async def create_layer(self, layer: str) -> None:
        """Make an empty layer."""

    async def delete_layer(self, layer: str) -> None:
        """Remove a layer and all that it owns; a layer that is gone already is no error."""

    async def holds_data(self, layer: str) -> bool:
        """Whether anything was ever written to the data of a layer."""

    async def set_aside_layer(self, layer: str) -> str:
        """Move a layer out of the store without destroying it; returns where it is."""

    async def allocated(self, layer: str) -> int:
        """Bytes of disk space that a layer uses, its logs included."""

    async def open_data(self, layer: str, *, writable: bool) -> DataFile:
        """Open the data of a layer."""

    async def drop_cache(self, layer: str) -> None:
        """Let what of a layer is cached, and counts as durable, be read from the disk again.

        A process that was killed may have left what a sync of its own had failed to write.
        """

    async def create_log(self, layer: str, log: str, content: bytes) -> None:
        """Make a log with this content, replacing one of that name atomically."""

    async def open_log(self, layer: str, log: str, end: int) -> LogFile:
        """Open a log to append at byte ``end``, which callers found by reading it."""

    async def read_log(self, layer: str, log: str) -> bytes | None:
        """The whole content of a log, space reserved at its end included; None: no such log."""

    async def has_log(self, layer: str, log: str) -> bool:
        """Whether a layer has a log of that name."""

    async def log_size(self, layer: str, log: str) -> int:
        """Bytes of a log, space reserved at its end included; 0: no such log."""

    async def delete_log(self, layer: str, log: str) -> None:
        """Remove a log; one that is gone already is no error."""

    def open_scratch(self, layer: str, name: str) -> ScratchFile:
        """Open a scratch file, empty, and make it if need be; ``read_log`` reads it. OSError."""

    async def pin_layer(self, layer: str) -> LayerClaim:
        """Share the layer with readers of other processes; InUseError while it is claimed."""

    async def claim_layer(self, layer: str) -> LayerClaim | None:
        """Have the layer exclusively; None while a process pins it."""

    async def list_records(self, kind: str) -> list[str]:
        """Names of the records of a kind."""

    async def read_record(self, kind: str, name: str) -> bytes:
        """One record; NotFoundError."""

    async def commit_record(self, kind: str, name: str, content: bytes) -> None:
        """Create or replace a record: after a crash it is the old or the new one, whole."""

    async def stage_record(self, kind: str, name: str, content: bytes) -> StagedRecord:
        """Write a record that replaces the one of its name once it is committed."""

    async def delete_record(self, kind: str, name: str) -> None:
        """Remove a record; one that is gone already is no error."""

    def describe_layer(self, layer: str) -> str:
        """Where a layer is, for messages."""

    def describe(self, layer: str, log: str) -> str:
        """Where a log is, for messages."""

    def describe_record(self, kind: str, name: str) -> str:
        """Where a record is, for messages."""
