"""The exports of a catalogue: ``VOL`` read-write, ``VOL@SNAP`` read-only.

Both have the same metadata contexts: base:allocation, and those of snapshots/contexts.py. An open
export holds what the contexts that its client chose need.
"""

from collections.abc import Callable, Sequence

from backends.errors import InvalidError, NotFoundError
from nbdserve.protocol.constants import BASE_ALLOCATION
from nbdserve.server.exports import Export, ExportDescription, RemoteExport
from nbdserve.workers.export import WorkerExport
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.names import BLOCK_SIZE, check_name, parse_snapshot_name


class CatalogueExports:
    """An ``ExportRegistry``. A name that could never be one is simply not found."""

    def __init__(self, catalogue: Catalogue, rotational: bool = False) -> None:
        self._catalogue = catalogue
        self._rotational = rotational

    def list_names(self) -> list[str]:
        return self._catalogue.volume_names()

    async def describe(self, name: str) -> ExportDescription:
        volume, snapshot = _parse(name)
        contexts = (BASE_ALLOCATION, *self._catalogue.volume_contexts(volume))
        if snapshot is None:
            size = self._catalogue.volume_size(volume)
            return self._description(name, size, False, "volume", contexts)
        for taken in self._catalogue.list_snapshots(volume):
            if taken.name == snapshot:
                return self._description(name, taken.size, True, "snapshot", contexts)
        raise NotFoundError(f"there is no snapshot {name}")

    def _description(
        self, name: str, size: int, read_only: bool, kind: str, contexts: tuple[str, ...]
    ) -> ExportDescription:
        return ExportDescription(
            name, size, read_only, BLOCK_SIZE, kind, contexts, self._rotational
        )

    async def open(
        self, name: str, contexts: Sequence[str], revoke: Callable[[], None]
    ) -> Export | RemoteExport:
        volume, snapshot = _parse(name)
        if snapshot is None:
            lease = await self._catalogue.open_volume(volume, revoke, contexts)
        else:
            lease = await self._catalogue.open_snapshot(volume, snapshot, revoke, contexts)
        assert isinstance(lease, Handle | WorkerExport)
        return lease

    async def close(self, export: Export | RemoteExport) -> None:
        assert isinstance(export, Handle | WorkerExport)
        await self._catalogue.close_export(export)


def _parse(name: str) -> tuple[str, str | None]:
    try:
        if "@" in name:
            return parse_snapshot_name(name)
        return check_name("volume", name), None
    except InvalidError:
        raise NotFoundError(f"there is no export {name!r}") from None
