"""Which snapshots are being read by other processes, and so which layers must stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from snapshots.manifest import Manifest, Merge, Snapshot
from snapshots.transfer import Pin, SnapshotRef, SourceDescription


class Pins:
    """The pins that are held now; ``released`` is called when one is let go."""

    def __init__(self, released: Callable[[], None]) -> None:
        self._held: set[Pin] = set()
        self._released = released

    def add(self, manifest: Manifest, snapshot: Snapshot) -> Pin:
        """Pin a snapshot, and with it the volume's other snapshots: they tell what changed."""
        others = [other for other in manifest.snapshots if other is not snapshot]
        others.sort(key=lambda other: other.created, reverse=True)
        parents = {
            layer: manifest.parents[layer]
            for top in (snapshot.layer, *(other.layer for other in others))
            for layer in manifest.stack(top)
        }
        description = SourceDescription(
            volume=manifest.name,
            snapshot=snapshot.name,
            snapshot_id=snapshot.id,
            created=snapshot.created,
            size=snapshot.size,
            layer=snapshot.layer,
            parents=parents,
            others=tuple(SnapshotRef(other.id, other.size, other.layer) for other in others),
            merges=(),
        )
        pin = Pin(description, frozenset(parents), self._release)
        self._held.add(pin)
        return pin

    def complete(self, pin: Pin, merges: Iterable[Merge]) -> None:
        """Describe the merges that stand still for the pin."""
        stopped = tuple(asdict(merge) for merge in merges if merge.target in pin.layers)
        pin.source = replace(pin.source, merges=stopped)

    def _release(self, pin: Pin) -> None:
        if pin in self._held:
            self._held.remove(pin)
            self._released()

    def holds(self, snapshot_id: str) -> bool:
        """Whether a snapshot is pinned."""
        return any(pin.source.snapshot_id == snapshot_id for pin in self._held)

    def touch(self, layers: Iterable[str]) -> bool:
        """Whether any of ``layers`` belongs to a pinned snapshot."""
        wanted = frozenset(layers)
        return any(pin.layers & wanted for pin in self._held)

    def layers(self) -> set[str]:
        """Every layer that a pin covers."""
        return {layer for pin in self._held for layer in pin.layers}
