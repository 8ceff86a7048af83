"""What other processes are told, so that they can read a snapshot or fill a volume by themselves.

Backups run outside the daemon: it **pins** a snapshot, which keeps its layers as they are, and
describes it; the other process opens the layers (source.py). An **import** is the other way
round: the daemon makes a layer that belongs to no volume yet, the other process fills it
(sink.py), and a commit turns it into a volume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SnapshotRef:
    """Another snapshot of the same volume: its id, size in bytes, top layer of its stack."""

    id: str
    size: int
    layer: str


@dataclass(frozen=True)
class SourceDescription:
    """A pinned snapshot; ``parents`` has every layer of it and of ``others``, newest first."""

    volume: str
    snapshot: str
    snapshot_id: str
    created: float
    size: int
    layer: str
    parents: dict[str, str]
    others: tuple[SnapshotRef, ...]
    merges: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class SinkDescription:
    """A layer to be filled for a volume of ``size`` bytes.

    ``resumable``: what is filled is noted, so that another process can go on (imports.py).
    """

    volume: str
    size: int
    layer: str
    resumable: bool = False


@dataclass(frozen=True)
class Origin:
    """What a volume is restored from: ids of the repository and of the push; a name for people."""

    repository: str
    push: str
    source: str


@dataclass(eq=False)
class Pin:
    """A snapshot that must stay as it is until ``release``, which may be called twice."""

    source: SourceDescription
    layers: frozenset[str]
    on_release: Callable[[Pin], None]

    def release(self) -> None:
        """Let go."""
        self.on_release(self)


@dataclass(eq=False)
class Import:
    """A volume that is being filled and does not exist yet."""

    sink: SinkDescription
    created: float
    id: str
    origin: Origin | None = None
