"""Who fetches what lazy layers lack: the border between the catalogue and a fetcher.

The catalogue knows which layers are lazy, and owns their records; a **fetcher** talks to
repositories, verifies, and fills the layers' data and ``fetched`` logs. All that passes is plain
data, so it may be, and in a daemon is, in another process: verifying takes time, credentials are
only needed there, and a client that a store made hang or die takes nothing with it.

- A layer is the fetcher's from ``begin`` to the end of ``end``: nobody else writes its data and
  its log then.
- What is told of a layer after ``end`` was called means nothing.
- ``want`` may be forgotten; whoever waits asks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from snapshots.lazy import LazyLayer


class FetchWatcher(Protocol):
    """Who is told by a fetcher, on the event loop's thread."""

    def fetched(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        """Runs of chunks (first, end) can be read from the layer's data."""

    def lost_again(self, layer: str, runs: Sequence[tuple[int, int]]) -> None:
        """They could, but the disk failed to keep them."""

    def refused(self, layer: str, first: int, end: int, why: str) -> None:
        """What of these chunks is not here does not come for now."""

    def progress(self, layer: str, done: int, problem: str | None) -> None:
        """Bytes that are here, and what hinders, if anything does."""

    def pinned(self, layer: str, pin: str) -> None:
        """This pin keeps the snapshot alive from now on: it belongs into the record."""

    def whole(self, layer: str) -> None:
        """All that the layer claims is in its ``fetched`` log."""


class Fetcher(Protocol):
    """Fetches for many layers (see the module's text)."""

    async def start(self, watcher: FetchWatcher) -> None:
        """Be ready."""

    async def close(self) -> None:
        """End everything; pins stay."""

    async def find(self, url: str, volume: str, snapshot: str, rate: int | None) -> LazyLayer:
        """Find and pin a snapshot, and describe a layer that would hold it. StorageError."""

    def begin(self, layer: str, lazy: LazyLayer) -> None:
        """Fetch for this layer from now on."""

    def want(self, layer: str, first: int, end: int) -> None:
        """Somebody waits for these chunks; none: tell which are here."""

    def set_rate(self, layer: str, rate: int | None) -> None:
        """Bytes a second for what nobody waits for; None: no bound; 0: nothing."""

    async def end(self, layer: str) -> None:
        """Fetch no more for a layer; one that was never begun is no error."""

    async def let_go(self, lazy: LazyLayer) -> None:
        """Give up the pin of a snapshot that nothing more is read from. StorageError."""
