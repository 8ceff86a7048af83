"""What the server needs of the things that it exports.

An export whose data is in this process is an ``Export``: the server carries out requests on it. One
that another process has open is a ``RemoteExport``: the server gives the client's socket away
once the handshake is over, and that process does what follows.

All methods are called on the event loop's thread. Offsets and lengths are in bytes; the server has
checked that they lie within ``size``. Failures are OSError, whose errno becomes the NBD error.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nbdserve.logs import about
from nbdserve.protocol.constants import ReplyStyle
from nbdserve.protocol.options import ExportDescription
from snapshots.lending import Borrower
from snapshots.limits import NO_LIMITS, Limits

__all__ = [
    "Agreement",
    "Export",
    "ExportDescription",
    "ExportRegistry",
    "RemoteExport",
    "Serving",
]


@dataclass(frozen=True)
class Agreement:
    """What the handshake leads to; ``contexts`` are the metadata contexts chosen, (ID, name).

    ``received`` is what the client sent behind the handshake; ``peer`` and the number of the
    ``connection`` name it in the log; ``relayed`` says that a relay of ours is what sends and
    receives; ``limits`` are the export's.
    """

    style: ReplyStyle
    contexts: tuple[tuple[int, str], ...]
    peer: str
    received: bytes
    relayed: bool
    connection: int | None = None
    limits: Limits = NO_LIMITS

    def about(self, export: str) -> dict[str, Mapping[str, object]]:
        """The ``extra`` of a log call about the connection."""
        return about(connection=self.connection, client=self.peer, export=export)


class Serving(Protocol):
    """The transmission phase of one connection, and its end; it has begun."""

    async def transmit(self) -> None:
        """Return when the last request has ended: the export is not used any more."""

    async def linger(self) -> None:
        """Return when the connection can be closed, or is."""

    def finish(self) -> None:
        """Answer what was received, then end."""

    def abort(self) -> None:
        """End now."""


class OpenedExport(Protocol):
    """What every export is to a client, wherever its data is."""

    @property
    def key(self) -> str:
        """What it is counted under, whatever its name becomes."""

    @property
    def name(self) -> str:
        """Name that clients know it by."""

    @property
    def size(self) -> int:
        """Size in bytes; may grow."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    @property
    def block_size(self) -> int:
        """Preferred block size in bytes; requests may have any size and alignment."""


class Export(OpenedExport, Protocol):
    """One opened export, in this process."""

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` at once; False when that would block (its content is then undefined)."""

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, however long it takes."""

    def is_data(self, offset: int, length: int) -> bool:
        """Whether no part of the range is a hole, so that asking for ``extents`` is for nothing."""

    def try_lend(self, offset: int, length: int) -> list[tuple[int, int, int]] | None:
        """Pieces (descriptor, position, length) of files that sendfile can send the range from.

        None when the range has to be read. Only for one of the ``borrowers``.
        """

    @property
    def borrowers(self) -> set[Borrower]:
        """The connections that use ``try_lend``."""

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """Return runs of (length, holds data) from ``offset`` on.

        At least one run and at most ``limit``; neighbours differ; together at most ``length``.
        """

    def status(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """Return runs of (length, status) of a metadata context other than base:allocation.

        As ``extents``: at least one run and at most ``limit``, together at most ``length``.
        """

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Write all of ``data`` at once; False when that would block (nothing is then written)."""

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data``, which stays valid and unchanged until this returns."""

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        """Make the range read as zeroes; ``no_hole`` asks for space to be kept for it."""

    async def trim(self, offset: int, length: int) -> None:
        """Give up the content of the range."""

    async def cache(self, offset: int, length: int) -> None:
        """Prepare for reads of the range."""

    async def flush(self) -> None:
        """Make everything durable that was written, by any connection, before this was called."""

    def note(self) -> None:
        """See to it that what was done is found again when this process is killed.

        Called before replies are sent: a client that stays relies on them.
        """


@runtime_checkable
class RemoteExport(OpenedExport, Protocol):
    """One export that another process has open."""

    def serve(self, sock: socket.socket, agreement: Agreement) -> Serving:
        """Take the socket, which is not to be used here any more, and begin."""


class ExportRegistry(Protocol):
    """Finds exports by name. Failures are StorageError, whose line the client gets to see."""

    def list_names(self) -> list[str]:
        """Return the names that NBD_OPT_LIST shows."""

    async def describe(self, name: str) -> ExportDescription:
        """Describe an export; NotFoundError when there is none of that name."""

    async def open(
        self, name: str, contexts: Sequence[str], revoke: Callable[[], None]
    ) -> Export | RemoteExport:
        """Open an export for a client that chose these of its metadata contexts.

        ``revoke`` may be called later to force the connection closed.
        """

    async def close(self, export: Export | RemoteExport) -> None:
        """Take back what ``open`` returned; called once for each ``open``."""
