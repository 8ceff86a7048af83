"""Which limits hold for an export: those of the volume itself, or else those of the configuration.

A volume's own are in its manifest, and hold for its snapshots too, each by itself. They are set at
run time and survive restarts; a volume may also have none of its own on purpose, so that what the
configuration says does not hold for it.
"""

from __future__ import annotations

from nbdserve.measuring import Measuring
from nbdserve.server.permissions import Permissions
from snapshots.catalogue import Catalogue
from snapshots.limits import NO_LIMITS, Limits


class Limiting:
    """``rules`` are the configuration's, until ``change_rules``."""

    def __init__(
        self, catalogue: Catalogue, measuring: Measuring, rules: Permissions | None = None
    ) -> None:
        self._catalogue = catalogue
        self._measuring = measuring
        self._rules = rules or Permissions()

    def configured(self, volume: str) -> Limits:
        """What the configuration says of a volume of that name."""
        return self._rules.limits(volume)

    def of_volume(self, volume: str) -> Limits:
        """What holds for a volume; NotFoundError."""
        own = self._catalogue.volume_limits(volume)
        return self.configured(volume) if own is None else own

    def of_key(self, key: str) -> Limits:
        """What holds for an export, by the id of its volume or snapshot; none when it is gone."""
        found = self._catalogue.names_of([key]).get(key)
        return NO_LIMITS if found is None else self.of_volume(found[0])

    def apply(self, volume: str) -> None:
        """Let what holds for a volume now hold for its open connections."""
        limits = self.of_volume(volume)
        for key in self._catalogue.export_keys(volume):
            self._measuring.limit(key, limits)

    def change_rules(self, rules: Permissions) -> None:
        """The configuration says something else from now on."""
        self._rules = rules
        for volume in self._catalogue.volume_names():
            self.apply(volume)
