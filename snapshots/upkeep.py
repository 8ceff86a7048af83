"""What a catalogue does without being asked: at its start, and every few seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from backends.errors import StorageError, one_line
from backends.layers import LayerStore
from snapshots.freeing import Freeing
from snapshots.gates import adopt, move_down
from snapshots.layer import clear_away
from snapshots.manifest_store import ManifestStore
from snapshots.merging import Merging
from snapshots.names import BLOCK_SHIFT
from snapshots.open_views import OpenViews
from snapshots.recent import read_recent
from snapshots.reservations import Reservations
from snapshots.space import SpaceAccount
from snapshots.wiping import Wiping

_log = logging.getLogger(__name__)

_RECORD_SECONDS = 5


class Upkeep:
    """``start``, then ``run`` in a task until it is cancelled."""

    def __init__(
        self,
        store: LayerStore,
        manifests: ManifestStore,
        views: OpenViews,
        merging: Merging,
        freeing: Freeing,
        space: SpaceAccount,
        wiping: Wiping,
        reservations: Reservations,
        commits: asyncio.Lock,
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._views = views
        self._merging = merging
        self._freeing = freeing
        self._space = space
        self._wiping = wiping
        self._reservations = reservations
        self._commits = commits

    async def start(self) -> None:
        """Finish what a crash left half done; the manifests have all been read."""
        await self._merging.drop_condemned()
        await self._adopt_recent()
        await self._set_strangers_aside()
        await self._reservations.keep()

    def resume(self) -> None:
        """Go on in the background with indexes and merges that were not finished."""
        heads = {manifest.head for manifest in self._manifests.volumes.values()}
        for layer in self._manifests.live_layers() - heads:
            self._merging.index(layer)
        self._merging.resume()
        self._wiping.resume()

    async def run(self) -> None:
        """Bound what a crash can lose of blocks that nobody flushed, and the space they hold."""
        while True:
            await asyncio.sleep(_RECORD_SECONDS)
            await self._views.record_all()
            self._freeing.go_round()
            with contextlib.suppress(OSError):
                await self._store.keep_reserve()
                await self._space.watch()
            if self._reservations.any:
                async with self._commits:
                    await self._reservations.keep()
            if self._merging.deferred:
                self._merging.resume()
            self._wiping.go_on()

    async def _adopt_recent(self) -> None:
        """Give heads what a killed process was about to (recent.py, gates.py).

        What cannot be read is said, and done, when the volume is opened.
        """
        if self._store.was_orderly:
            return
        heads = {manifest.head: manifest for manifest in self._manifests.volumes.values()}
        known = self._manifests.live_layers()
        for layer in await self._store.list_layers():
            found = await read_recent(self._store, layer)
            below = layer if layer in heads else found.follows
            if below not in heads or (layer in known and layer != below):
                continue
            manifest = heads[below]
            blocks = manifest.size >> BLOCK_SHIFT
            try:
                if layer != below:
                    await move_down(self._store, layer, below, blocks)
                    await self._store.delete_layer(layer)
                elif found.runs:
                    await adopt(self._store, layer, blocks)
            except (OSError, StorageError) as error:
                if layer == below:
                    continue
                _log.error(
                    "volume %s: what was written to it in the last moments before the kill is lost,"
                    " or in part: %s",
                    manifest.name,
                    one_line(error),
                )

    async def _set_strangers_aside(self) -> None:
        """Deal with layers that nothing lists and nothing condemned (``clear_away``).

        While a volume is unreadable, they may be that one's, and stay where they are.
        """
        if self._manifests.unreadable:
            return
        known = self._manifests.live_layers() | self._merging.in_use()
        known.update(*self._manifests.condemned.values())
        for layer in await self._store.list_layers():
            if layer in known:
                continue
            try:
                kept = await clear_away(self._store, layer)
                if kept is not None:
                    _log.warning("layer %s belongs to no volume; it is kept in %s", layer, kept)
            except OSError as error:
                _log.warning("layer %s, of no volume, stays where it is: %s", layer, error)
