"""Which snapshots are being read by other processes, and so which layers must stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

from snapshots.transfer import Pin


class Pins:
    """The pins that are held now."""

    def __init__(self) -> None:
        self._held: set[Pin] = set()

    def add(self, pin: Pin) -> None:
        """Hold a pin."""
        self._held.add(pin)

    def remove(self, pin: Pin) -> bool:
        """Drop a pin; whether it was held."""
        held = pin in self._held
        self._held.discard(pin)
        return held

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
