"""Where views are open: the border between the catalogue and the views that clients use.

The catalogue knows the manifests and decides; a **host** has the open views, each under a key (the
id of its volume or snapshot): owner maps, heads, journals, threads. All that passes between the two
is plain data, so a host may be in this process (local_host.py) or in another.

Rules for both sides:

- A key is opened once and then used until ``close_view``, and what changes the layers under open
  views happens while none is opened or closed: the catalogue sees to both.
- A call takes effect when it begins, in the order of the calls; what it returns may take longer.
- A host in another process may be **lost**. Then that process has ended, all its views are gone,
  ``Watcher.lost`` has been told, and every call that was not answered raises HostLostError.
- A volume that failed (see volume.py) is told to ``Watcher.failed`` before anybody is answered.

The gate of a snapshot: ``add_head`` puts the next head beside the old one; ``freeze`` lets writes
wait that have not begun; ``swap_heads`` makes the next heads the heads of all its volumes in one
step, ends the freeze, and lets FLUSHes wait; ``finish_seal`` makes the old head durable;
``end_commit`` lets FLUSHes go on. ``freeze`` is for groups over several hosts only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from backends.errors import UnavailableError
from snapshots.extent_log import Run
from snapshots.handle import Lease

MergeNames = tuple[str, str, str]
"""The lower layer, the upper one and the target of a merge under way."""


class Cell(NamedTuple):
    """A part of a volume, all in blocks: ``number`` times the size of a cell is where it begins.

    ``mapped`` of its blocks hold data; the layer that ``layer`` counts holds ``most`` of them, more
    than any other; ``changed`` are in layers above the one that was asked about.
    """

    number: int
    mapped: int
    layer: int
    most: int
    changed: int


LayerCells = tuple[Sequence[tuple[str, int]], Sequence[Cell]]
"""Layers with how many blocks each holds, in any order, and the cells that hold any, in order."""


class HostLostError(UnavailableError):
    """The host ended before it answered; its views are gone."""


class Watcher(Protocol):
    """Who is told what happens to a host."""

    def lost(self, host: ViewHost) -> None:
        """The host's process has ended, and all its views with it."""

    def failed(self, key: str, why: str) -> None:
        """A volume refuses writes and flushes from now on."""

    def wanted(self, host: ViewHost, layer: str, first: int, end: int) -> None:
        """Chunks of a lazy layer are wanted (lazy_data.py).

        None, ``first`` and ``end`` being 0: the host has just opened it, and wants to know which
        chunks are here.
        """


class ViewHost(Protocol):
    """Views that are open in one process (see the module's text); sizes in bytes."""

    @property
    def available(self) -> bool:
        """Whether views can be opened now."""

    @property
    def pid(self) -> int | None:
        """The process that the views are in; None while there is none."""

    async def start(self, watcher: Watcher) -> None:
        """Begin; the data directory is locked."""

    async def close(self) -> None:
        """End; no view is open."""

    def kill(self) -> None:
        """Lose the host: it does not answer."""

    def lease(
        self,
        key: str,
        name: str,
        size: int,
        read_only: bool,
        bases: Mapping[str, str],
        revoke: Callable[[], None],
    ) -> Lease:
        """What a client gets of an open view; ``revoke`` asks for it back.

        ``bases`` are the views that its metadata contexts compare with, by the contexts' names.
        They may be closed while the lease is out: then the contexts answer with an error.
        """

    # Views

    async def open_volume(
        self,
        key: str,
        name: str,
        size: int,
        stack: Sequence[str],
        merges: Sequence[MergeNames],
        failure: str | None,
    ) -> None:
        """Open a volume; ``stack`` from the oldest layer to the head. OSError, StorageError."""

    async def open_snapshot(
        self, key: str, name: str, size: int, stack: Sequence[str], merges: Sequence[MergeNames]
    ) -> None:
        """Open a snapshot. OSError, StorageError."""

    async def close_view(self, key: str) -> None:
        """Close a view that no client can reach any more, without flushing it."""

    async def flush(self, key: str) -> None:
        """Make what was written before durable; OSError."""

    async def record(self, key: str) -> None:
        """Make durable which blocks were taken or zeroed before, with what they hold; OSError."""

    async def free_hidden(self, key: str, layer: str | None) -> None:
        """Give back what a volume's head hides in ``layer``, its own (hidden.py), None: as before.

        Returns when all has been looked at.
        """

    async def grow(self, key: str, size: int) -> None:
        """A volume is larger now."""

    async def count_owned(self, key: str) -> int:
        """How many blocks hold data."""

    async def count_cells(
        self, key: str, blocks: int, cell_blocks: int, since: str | None
    ) -> LayerCells:
        """Which layers hold the first ``blocks`` of a volume, cell by cell.

        ``since`` is the layer above which everything counts as changed. Takes effect while it
        runs; HostLostError when the view is closed meanwhile.
        """

    async def list_changed(
        self, key: str, layers: Sequence[str], blocks: int
    ) -> Sequence[tuple[int, int, bool]]:
        """What ``layers`` and pending writes say of a volume: (offset, length, reads as zero)."""

    async def check_journal(self, key: str) -> None:
        """Compare the journal of a volume with what was written to it; OSError, CorruptError."""

    # Snapshots

    async def settle(self, key: str) -> None:
        """Sync until so little is pending that the gate takes a moment; OSError."""

    async def add_head(self, key: str, layer: str) -> None:
        """Open an empty layer as the next head."""

    async def drop_head(self, key: str) -> None:
        """Close the next head again."""

    async def freeze(self, keys: Sequence[str]) -> None:
        """Let new writes of these volumes wait; reads go on."""

    async def thaw(self, keys: Sequence[str]) -> None:
        """Let writes go on."""

    async def swap_heads(self, keys: Sequence[str]) -> None:
        """The gate, for all of these volumes in one step."""

    async def finish_seal(self, key: str) -> None:
        """Make the old head durable, with all that was being written to it; OSError.

        Once it is, calling again does nothing.
        """

    async def fail(self, key: str, why: str) -> None:
        """Refuse writes and flushes from now on."""

    async def end_commit(self, key: str) -> None:
        """Let FLUSHes go on, and close the old head."""

    # Merges

    async def recall(self, layer: str) -> None:
        """Lend nothing of a layer from now on; returns when all that was lent is back.

        UnavailableError when a client does not take its replies (lending.py).
        """

    async def move(self, source: str, target: str, runs: Sequence[Run]) -> None:
        """These blocks are now the target's; returns when no read in the source is under way."""

    async def follow_merge(self, source: str, target: str) -> None:
        """Take over all that the target's merge log says."""

    async def drop_layer(self, layer: str) -> None:
        """A layer that owns no block any more is in no stack any more."""

    # Lazy layers; the first three take effect at once, and do nothing when it is not open

    def fetched(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        """Runs of chunks (first, end) are here, and can be read."""

    def lost_again(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        """They were here, but the disk could not keep them."""

    def refused(self, layer: str, first: int, end: int, why: str) -> None:
        """Chunks that are not here do not come for now; reads that wait for them fail."""

    async def complete(self, layer: str) -> None:
        """A lazy layer has its index now: from here on it is an ordinary layer."""
