"""Volumes that another process fills before they exist: restores.

An import's layer is condemned from the beginning, so when daemon and filler both die the next start
removes it; the commit makes a manifest list it, which saves it. The volume's name is taken
meanwhile.

An import with an **origin** can be gone on with, since the same push always restores the same. Its
layer has two logs more:

* ``restore``, a record (records.py): the name of the volume to be, its size, and the origin;
* ``fetched``, an extent log (extent_log.py) of the blocks that the filler has made durable before
  it listed them (sink.py).

When it is given up, for whatever reason, and ``fetched`` lists anything, it is **kept**: still
condemned, but spared as long as the record is there and nobody discards it. The next import of that
name and origin goes on with it; one of another origin is refused. A start finds what is kept among
the condemned layers. The commit comes before the logs go, and the next start removes those
that a crash leaves.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import asdict, dataclass

from backends.errors import CorruptError, ExistsError, NotFoundError
from backends.layers import LayerStore
from snapshots.extent_log import FETCHED, SECTOR, encode_header, read_log
from snapshots.layer import apply_layer
from snapshots.manifest import Manifest
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import OwnerMap
from snapshots.records import pack_record, unpack_record
from snapshots.transfer import Import, Origin, SinkDescription

RESTORE = "restore"
_VERSION = 1


@dataclass(frozen=True)
class KeptRestore:
    """A restore that did not come to its end; ``size`` in bytes."""

    volume: str
    size: int
    layer: str
    origin: Origin


class Imports:
    """The imports under way and those kept, by the name of the volume; the caller holds the
    commits.
    """

    def __init__(self, store: LayerStore, manifests: ManifestStore) -> None:
        self._store = store
        self._manifests = manifests
        self._under_way: dict[str, Import] = {}
        self.kept: dict[str, KeptRestore] = {}

    def __contains__(self, volume: str) -> bool:
        return volume in self._under_way

    def size(self) -> int:
        """Bytes of all volumes that are being restored, or can be gone on with."""
        under_way = sum(imported.sink.size for imported in self._under_way.values())
        return under_way + sum(kept.size for kept in self.kept.values())

    async def start(self) -> None:
        """Find what is kept; the manifests have been read, nothing condemned is deleted yet."""
        condemned = {layer for layers in self._manifests.condemned.values() for layer in layers}
        live = self._manifests.live_layers()
        for layer in await self._store.list_layers():
            if layer not in condemned or not await self._store.has_log(layer, RESTORE):
                continue
            if layer in live:
                await self._forget_logs(layer)
                continue
            try:
                found = await self._read(layer)
            except (CorruptError, OSError):
                continue  # it goes as any other
            if await self._has_begun(layer, found.size):
                self._keep(found)

    async def _read(self, layer: str) -> KeptRestore:
        where = self._store.describe(layer, RESTORE)
        content = await self._store.read_log(layer, RESTORE)
        try:
            fields = unpack_record(content or b"", _VERSION, where)
            origin = Origin(**fields["origin"])
            return KeptRestore(str(fields["volume"]), int(fields["size"]), layer, origin)
        except (TypeError, KeyError, ValueError) as error:
            raise CorruptError(f"{where}: not what it should be: {error!r}") from error

    def _keep(self, found: KeptRestore) -> None:
        if found.volume not in self.kept and self._manifests.find(found.volume) is None:
            self._manifests.provisional.add(found.layer)
            self.kept[found.volume] = found

    def check_free(self, volume: str) -> None:
        """ExistsError when the name is taken by a restore."""
        if volume in self._under_way:
            raise ExistsError(f"volume {volume} is being restored")
        kept = self.kept.get(volume)
        if kept is not None:
            raise ExistsError(
                f"volume {volume} is half restored from {kept.origin.source}: the same command goes"
                f" on with that, 'nbdserve volume delete {volume}' discards it"
            )

    async def begin(self, volume: str, size: int, origin: Origin | None = None) -> Import:
        """Make an empty layer to be filled for a volume of ``size`` bytes.

        Or go on with one of that ``origin``. ExistsError when the name is taken by a restore.
        """
        kept = self.kept.get(volume)
        if kept is not None and (kept.origin, kept.size) == (origin, size):
            del self.kept[volume]
            layer = kept.layer
        else:
            self.check_free(volume)
            layer = secrets.token_hex(8)
            await self._manifests.condemn_unless_committed(layer)
            await self._store.create_layer(layer)
            if origin is not None:
                empty = encode_header(layer, FETCHED) + bytes(SECTOR)
                await self._store.create_log(layer, FETCHED, empty)
                fields = {"volume": volume, "size": size, "origin": asdict(origin)}
                await self._store.create_log(layer, RESTORE, pack_record(_VERSION, fields))
        sink = SinkDescription(volume, size, layer, origin is not None)
        imported = Import(sink, time.time(), secrets.token_hex(16), origin)
        self._under_way[volume] = imported
        return imported

    async def commit(self, imported: Import) -> Manifest:
        """Check that the layer can be read, and make it the volume."""
        sink = imported.sink
        if self._under_way.get(sink.volume) is not imported:
            raise NotFoundError(f"the import of volume {sink.volume} was given up already")
        holds = OwnerMap(sink.size >> BLOCK_SHIFT)
        try:
            await apply_layer(self._store, sink.layer, holds)
        finally:
            holds.close()
        manifest = Manifest(
            id=imported.id,
            name=sink.volume,
            size=sink.size,
            created=imported.created,
            generation=1,
            head=sink.layer,
            parents={sink.layer: ""},
        )
        await self._manifests.commit([manifest])
        del self._under_way[sink.volume]
        if imported.origin is not None:
            await self._forget_logs(sink.layer)
        self._manifests.provisional.discard(sink.layer)
        return manifest

    async def _forget_logs(self, layer: str) -> None:
        """Of a volume that is whole; they mean nothing any more, so a failure does not matter."""
        with contextlib.suppress(OSError):
            await self._store.delete_log(layer, FETCHED)
            await self._store.delete_log(layer, RESTORE)

    async def leave(self, imported: Import) -> None:
        """Give up an import, unless it was committed; it is kept when it can be gone on with.

        Otherwise its layer goes with the condemned ones.
        """
        sink, origin = imported.sink, imported.origin
        if self._under_way.get(sink.volume) is not imported:
            return
        del self._under_way[sink.volume]
        if origin is not None and await self._has_begun(sink.layer, sink.size):
            self._keep(KeptRestore(sink.volume, sink.size, sink.layer, origin))
        else:
            self._manifests.provisional.discard(sink.layer)

    async def _has_begun(self, layer: str, size: int) -> bool:
        """Whether anything of a layer is noted as durable."""
        holds = OwnerMap(size >> BLOCK_SHIFT)
        try:
            content = await self._store.read_log(layer, FETCHED)
            if content is None:
                return False
            read_log(content, layer, FETCHED, holds, self._store.describe(layer, FETCHED))
            return next(iter(holds.runs(0, holds.blocks)), None) is not None
        except (CorruptError, OSError):
            return False
        finally:
            holds.close()

    async def leave_all(self) -> None:
        """Give up every import."""
        for imported in list(self._under_way.values()):
            await self.leave(imported)

    def discard(self, volume: str) -> bool:
        """Let a kept restore go with the condemned layers; whether there was one."""
        kept = self.kept.pop(volume, None)
        if kept is None:
            return False
        self._manifests.provisional.discard(kept.layer)
        return True
