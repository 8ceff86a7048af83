"""Space that is reserved for volumes: kept back on the disk, so that nobody else can take it.

A volume with a reservation of R bytes can write R bytes to new places since its last snapshot,
however full others make the disk. What of it the head has taken already needs no keeping; the rest
is held in a file of its own that holds nothing else (DATA/reservations), allocated by the file
system: so it is kept from other volumes, other programs and everything else alike, over a kill
and a power cut, and costs writes nothing. Only when the disk is full does a write give some of it
back, just before it takes it (rationing.py).

What is held follows the head in steps: at a snapshot, before its gate, there must be room to hold
all of R anew, else the snapshot is refused; a rollback, and whatever else makes a head shorter, has
the rest held again as soon as there is space. That is looked at every few seconds and at the start.
When less is held than reserved, it is a warning. The manifest says R (manifest.py); what is held
for a volume that reserves nothing is let go.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from backends.errors import InvalidError, NoSpaceError
from backends.layers import LayerStore
from snapshots.manifest import Manifest
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SIZE, format_size
from snapshots.space_watch import WARNING, SpaceWarning

_log = logging.getLogger(__name__)

# More is held than reserved: for the file system's own records of where the data is, for what the
# journal takes, and for what a volume that is not rationed yet may snatch.
_MORE_SHIFT = 5
_MORE = 4 << 20
_NEAR = 1 << 20


class Reservations:
    """See the module's text; the caller holds the catalogue's commits."""

    def __init__(self, store: LayerStore, manifests: ManifestStore) -> None:
        self._store = store
        self._manifests = manifests
        self._short: dict[str, int] = {}

    @property
    def any(self) -> bool:
        """Whether anything is reserved."""
        return any(manifest.reserve for manifest in self._manifests.volumes.values())

    def warnings(self) -> list[SpaceWarning]:
        """What is reserved, but not kept back."""
        found = []
        for volume, short in self._short.items():
            manifest = self._manifests.volumes.get(volume)
            if manifest is not None:
                message = (
                    f"volume {manifest.name}: of {format_size(manifest.reserve)} reserved"
                    f" {format_size(short)} are not kept back, for want of space"
                )
                found.append(SpaceWarning("reserve", WARNING, message))
        return found

    async def change(self, manifest: Manifest, reserve: int) -> None:
        """Reserve so much for a volume from now on, durably. NoSpaceError, InvalidError."""
        check_reserve(reserve, manifest.size)
        new = manifest.changed(reserve=reserve)
        try:
            await self._hold_all(new, await self._wanted(new))
            await self._manifests.commit([new])
        finally:
            await self.keep()

    async def prepare(self, manifests: Sequence[Manifest]) -> None:
        """Hold all that is reserved for volumes whose heads are to be new ones. NoSpaceError."""
        try:
            for manifest in manifests:
                if manifest.reserve:
                    await self._hold_all(manifest, _with_more(manifest.reserve))
        except BaseException:
            await self.keep()
            raise

    async def keep(self) -> None:
        """Hold what is reserved, as far as there is space, and no more.

        No error: what cannot be done now is done later.
        """
        try:
            found = await self._store.list_held()
        except OSError as error:
            _log.warning("what is reserved is looked at later: %s", error)
            return
        for volume in found:
            manifest = self._manifests.volumes.get(volume)
            if manifest is None and not self._manifests.unreadable:
                with contextlib.suppress(OSError):
                    await self._store.hold(volume, 0)
        for manifest in list(self._manifests.volumes.values()):
            await self._keep(manifest, found.get(manifest.id, 0))

    async def _keep(self, manifest: Manifest, held: int) -> None:
        if not manifest.reserve and not held:
            self._short.pop(manifest.id, None)
            return
        try:
            wanted = await self._wanted(manifest)
            if wanted == 0 or abs(wanted - held) > _NEAR:
                held = await self._store.hold(manifest.id, wanted)
        except OSError as error:
            _log.warning("volume %s: its reservation is looked at later: %s", manifest.name, error)
            return
        missing = _without_more(wanted) - held
        if missing > 0:
            self._short[manifest.id] = missing
        else:
            self._short.pop(manifest.id, None)

    async def _hold_all(self, manifest: Manifest, wanted: int) -> None:
        held = await self._store.hold(manifest.id, wanted)
        if held < wanted:
            free = (await self._store.space()).free
            raise NoSpaceError(
                f"volume {manifest.name}: to reserve {format_size(manifest.reserve)} another"
                f" {format_size(wanted - held)} must be kept back, and"
                f" {format_size(free)} are free: make room, or reserve less"
            )

    async def _wanted(self, manifest: Manifest) -> int:
        if not manifest.reserve:
            return 0
        taken = await self._store.allocated(manifest.head)
        return _with_more(manifest.reserve - taken)


def check_reserve(reserve: int, size: int) -> None:
    """InvalidError when no volume of this size may have that reserved."""
    if reserve > size:
        raise InvalidError(
            f"{format_size(reserve)} cannot be reserved for a volume of {format_size(size)}:"
            " reserve its size at most"
        )
    if reserve % BLOCK_SIZE:
        raise InvalidError(f"{reserve} bytes cannot be reserved: write a multiple of 4 KiB")


def _with_more(length: int) -> int:
    if length <= 0:
        return 0
    more = (length >> _MORE_SHIFT) + _MORE
    return (length + more + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE


def _without_more(wanted: int) -> int:
    return max(0, ((wanted - _MORE) << _MORE_SHIFT) // ((1 << _MORE_SHIFT) + 1))
