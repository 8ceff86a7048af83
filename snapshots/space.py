"""Room in a data directory: what there is, what was promised of it, and the policy about both.

Volumes are thin: the sum of their sizes, what is **provisioned**, may be more than the disk can
hold. What it can hold for them, its **capacity**, is what their layers use now, what is kept back
for reservations, and what is free: files of others beside the data directory leave less of it. The
ratio of the two is the **overcommit**.

The policy bounds what is promised: beyond ``max_overcommit`` no volume is made or grown unless
forced. Below ``min_free`` none is made and no snapshot taken, for those need some space
themselves; what is there goes on to the last block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from backends.errors import NoSpaceError
from backends.layers import LayerStore, Space
from snapshots.manifest_store import ManifestStore
from snapshots.names import format_size
from snapshots.space_watch import SpaceWarning, SpaceWatch, Threshold

_WARN, _CRITICAL = Threshold(share=0.10), Threshold(share=0.03)
# A new head and a manifest need some of it.
_LEAST = Threshold(size=16 << 20)


@dataclass(frozen=True)
class SpacePolicy:
    """``max_overcommit`` None: no bound. The others are of the file system's size."""

    max_overcommit: float | None = None
    warn_free: Threshold = _WARN
    critical_free: Threshold = _CRITICAL
    min_free: Threshold = _LEAST


DEFAULT_POLICY = SpacePolicy()


@dataclass(frozen=True)
class Room:
    """Bytes (see the module's text); ``free`` and ``total`` are the file system's.

    ``provisioned`` includes volumes that are being restored; ``used`` is by layers, those included
    that are being deleted or wiped. ``held`` is kept back of what is ``reserved``.
    """

    provisioned: int
    reserved: int
    used: int
    held: int
    space: Space

    @property
    def capacity(self) -> int:
        """What the file system can hold for volumes."""
        return self.used + self.held + self.space.free

    @property
    def overcommit(self) -> float:
        """Provisioned over capacity, to three places."""
        return round(self.provisioned / max(1, self.capacity), 3)


class SpaceAccount:
    """See the module's text; ``policy`` may be replaced at any time."""

    def __init__(
        self, store: LayerStore, manifests: ManifestStore, restoring: Callable[[], int]
    ) -> None:
        """``restoring`` tells the size of all volumes that are being restored."""
        self._store = store
        self._manifests = manifests
        self._restoring = restoring
        self._policy = DEFAULT_POLICY
        self._watch = SpaceWatch()
        self.policy = self._policy

    @property
    def policy(self) -> SpacePolicy:
        """What holds from now on."""
        return self._policy

    @policy.setter
    def policy(self, policy: SpacePolicy) -> None:
        self._policy = policy
        self._watch.thresholds = policy.warn_free, policy.critical_free

    async def watch(self) -> None:
        """Look how much is free, and log what that is the first sign of; called now and then."""
        self._watch.look(await self._store.space())

    async def measure(self) -> Room:
        """What there is now; it looks at every layer's files."""
        used = 0
        for layer in await self._store.list_layers():
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                used += await self._store.allocated(layer)
        manifests = self._manifests.volumes.values()
        reserved = sum(manifest.reserve for manifest in manifests)
        held = sum((await self._store.list_held()).values())
        return Room(self._provisioned(), reserved, used, held, await self._store.space())

    def warnings(self, space: Space) -> list[SpaceWarning]:
        """What is to be said of ``space``."""
        return self._watch.warnings(space)

    def _provisioned(self) -> int:
        volumes = self._manifests.volumes.values()
        return sum(manifest.size for manifest in volumes) + self._restoring()

    async def check_provisioned(self, volume: str, added: int, force: bool = False) -> None:
        """NoSpaceError when ``added`` bytes more for a volume were beyond the policy."""
        most = self._policy.max_overcommit
        if most is None or force or added <= 0:
            return
        room = await self.measure()
        after = room.provisioned + added
        if after > most * room.capacity:
            raise NoSpaceError(
                f"volume {volume}: {format_size(added)} more would make"
                f" {format_size(after)} provisioned, {after / max(1, room.capacity):.2f} times the"
                f" {format_size(room.capacity)} that the disk can hold ({format_size(room.used)}"
                f" used, {format_size(room.held)} kept back, {format_size(room.space.free)} free);"
                f" max_overcommit is {most:g}:"
                " delete volumes, make room, or force it"
            )

    async def check_free(self, what: str) -> None:
        """NoSpaceError when less is free than the policy wants for ``what``."""
        space = await self._store.space()
        least = self._policy.min_free.of(space.total)
        if space.free < least:
            raise NoSpaceError(
                f"{format_size(space.free)} are free, {format_size(least)} are needed for {what}:"
                " delete snapshots or make room"
            )
