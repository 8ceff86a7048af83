"""Sealing heads: the gate of a snapshot and its commit, for one volume or a group at one instant.

1. Create the next heads, write the next manifests under temporary names, and sync what is pending
   so that the gate has little to capture. All that needs space is done then.
2. The gate: swap every volume's head in one step of the event loop (volume.py).
3. Make the old heads durable, commit the manifests in one commit; FLUSHes wait until then.
4. Later, turn each sealed layer's journal into its index.

When step 3 fails, writes have gone into the new heads already, which a reopened volume would not
know: the volumes refuse writes and flushes until then, so nothing is taken for durable.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

from backends.errors import StorageError
from backends.layers import LayerStore
from snapshots.head import Head
from snapshots.manifest import Manifest, Snapshot
from snapshots.manifest_store import ManifestStore, StagedCommit
from snapshots.merging import Merging
from snapshots.open_views import OpenViews
from snapshots.volume import Volume

_log = logging.getLogger(__name__)

# Below this much free space a snapshot is refused: its new head and the manifest need some of it.
LOW_WATER = 16 << 20


class Sealing:
    """See the module's text; the caller holds the catalogue's commits."""

    def __init__(
        self, store: LayerStore, manifests: ManifestStore, views: OpenViews, merging: Merging
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._views = views
        self._merging = merging

    async def seal(self, manifests: list[Manifest], snapshots: Sequence[Snapshot | None]) -> None:
        """Give each volume a new head, and its old one the name of a snapshot or none."""
        prepared: list[tuple[Volume, Head]] = []
        acquired: list[str] = []
        try:
            try:
                for manifest in manifests:
                    volume = await self._views.acquire_volume(manifest)
                    acquired.append(manifest.id)
                    head = await self._views.add_head(volume, secrets.token_hex(8))
                    prepared.append((volume, head))
                staged = await self._manifests.stage(
                    [
                        _sealed(manifest, head.layer.name, snapshot)
                        for manifest, (_, head), snapshot in zip(
                            manifests, prepared, snapshots, strict=True
                        )
                    ]
                )
                try:
                    for volume, _ in prepared:
                        await volume.settle()
                except BaseException:
                    await staged.record.discard()
                    raise
            except BaseException:
                for volume, head in prepared:
                    await self._views.remove_head(volume, head)
                raise
            await self._swap_and_commit(prepared, staged)
            for manifest in manifests:
                self._merging.index(manifest.head)
        finally:
            for key in acquired:
                await self._views.release(key)

    async def _swap_and_commit(
        self, prepared: list[tuple[Volume, Head]], staged: StagedCommit
    ) -> None:
        sealed = []
        # The gate: no await between the first swap and the last.
        for volume, head in prepared:
            volume.commit_begins()
            sealed.append(volume.swap_head(head))
        try:
            for (volume, _), (old, runs) in zip(prepared, sealed, strict=True):
                await volume.finish_seal(old, runs)
            await self._manifests.finish(staged)
        except BaseException as error:
            for volume, _ in prepared:
                volume.fail(f"the commit of a snapshot failed: {error}")
            raise
        finally:
            for (volume, _), (old, _) in zip(prepared, sealed, strict=True):
                volume.commit_ended()
                old.close()

    async def free_head_boundary(self, volume: str, layer: str) -> None:
        """Seal the head when the deleted snapshot's layer lies right below it.

        Then the two can be merged like any others, without touching the layer being written.
        """
        manifest = self._manifests.volumes[volume]
        if manifest.parents.get(manifest.head) != layer:
            return
        others = [found for found in self._manifests.uses(layer) if found is not manifest]
        if others or layer in manifest.tops() or list(manifest.parents.values()).count(layer) > 1:
            return
        try:
            if (await self._store.space()).free < LOW_WATER:
                await self._store.release_reserve()
            await self.seal([manifest], [None])
        except (OSError, StorageError) as error:
            _log.warning("space of a deleted snapshot of %s is kept: %s", manifest.name, error)


def _sealed(manifest: Manifest, head: str, snapshot: Snapshot | None) -> Manifest:
    """The next generation, with a new head on top of the old one."""
    taken = manifest.snapshots if snapshot is None else (*manifest.snapshots, snapshot)
    parents = {**manifest.parents, head: manifest.head}
    return manifest.changed(head=head, parents=parents, snapshots=taken)
