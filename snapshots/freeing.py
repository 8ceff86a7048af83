"""Which volumes have space to be given back below their heads, and when that is looked after.

hidden.py says what a head's **own** layer is and how space is freed there, in the host that has the
volume open. Here it is decided which layer that is, with the manifests before one's eyes:

* when a deletion has ended, for the volumes that may have come to have one, open or not;
* when a volume is opened, and every few seconds as long as it is;
* a last time when it is closed (open_views.py).

A backup that outlived the daemon it began under may still read the layers of a snapshot that has
been deleted since. No other process can begin to read the head's own layer, so it is enough to see
once that none does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from backends.errors import StorageError
from snapshots.manifest_store import ManifestStore
from snapshots.merging import Merging
from snapshots.open_views import OpenViews

_log = logging.getLogger(__name__)


class Freeing:
    """See the module's text; ``commits`` is held wherever manifests change."""

    def __init__(
        self, manifests: ManifestStore, views: OpenViews, commits: asyncio.Lock, merging: Merging
    ) -> None:
        self._manifests = manifests
        self._views = views
        self._commits = commits
        self._merging = merging
        self._round: asyncio.Task[None] | None = None
        self._stopped = False

    def stop(self) -> None:
        """Begin nothing any more."""
        self._stopped = True

    def go_round(self) -> None:
        """Begin with every open volume, in the background, unless that is under way."""
        if self._round is None or self._round.done():
            self._round = asyncio.get_running_loop().create_task(self._go_round())

    async def _go_round(self) -> None:
        for volume in self._views.open_volumes():
            manifest = self._manifests.volumes.get(volume)
            if manifest is not None and self._manifests.own_layer(manifest):
                async with self._commits:
                    await self.begin(volume)

    async def free(self, volume: str) -> None:
        """Give back what the head of a volume hides now, be it open or not."""
        async with self._commits:
            freeing = await self.begin(volume)
        if freeing is not None:
            await asyncio.wait([freeing])

    async def begin(self, volume: str) -> asyncio.Task[None] | None:
        """Begin with a volume; the caller holds ``commits``. None when there is nothing to do."""
        manifest = self._manifests.volumes.get(volume)
        if manifest is None or self._stopped or self._manifests.in_doubt is not None:
            return None
        layer = self._manifests.own_layer(manifest)
        try:
            if layer is None or not await self._merging.nobody_reads(layer):
                return None
            return await self._views.free_hidden(manifest, layer)
        except (OSError, StorageError) as error:
            _log.warning("volume %s: space is given back later: %s", manifest.name, error)
            return None

    async def free_shared(self, layers: Iterable[str]) -> None:
        """The same for all volumes that stand on ``layers``, behind the merges that wait."""
        await self._merging.settled()
        shared = set(layers)
        for manifest in list(self._manifests.volumes.values()):
            if not shared.isdisjoint(manifest.parents):
                await self.free(manifest.id)
