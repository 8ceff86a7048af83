"""Which layer holds which part of a volume, coarse enough to be drawn.

A volume is cut into **cells** of equal size, a power of two, at most as many as are asked for. Of
each cell that holds anything the map says how much, which layer holds most of it, and how much of
it is in layers above a snapshot: that was written after it. What was trimmed or zeroed since is
in no layer, and so not in the map; ``diff`` has it.

Counting may take seconds. So the commits are held only when it begins and when it ends: meanwhile
the volume may be closed, or its layers become others. Then it is done once more, while they are
held.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from backends.errors import InvalidError
from backends.layers import LayerStore
from snapshots.host import Cell, HostLostError, LayerCells
from snapshots.manifest import Manifest, Snapshot
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SHIFT
from snapshots.open_views import OpenView, OpenViews

MAX_CELLS = 4096
"""Most cells of a map, so that its size does not depend on the volume's."""


@dataclass(frozen=True)
class MappedLayer:
    """A layer of a volume; sizes in bytes.

    ``snapshots`` are those that end on it, oldest first. ``mapped`` is what the volume reads from
    it, ``disk`` the space that it takes, which includes what only snapshots read. ``changed``: it
    lies above the snapshot ``since``.
    """

    layer: str
    snapshots: tuple[str, ...]
    mapped: int
    disk: int
    changed: bool


@dataclass(frozen=True)
class VolumeMap:
    """A volume as it is now; sizes in bytes, but those of ``filled``, which are in blocks.

    ``layers`` are the oldest first, the last one is the head; a cell's ``layer`` is an index into
    them. Cells that hold nothing are left out of ``filled``. ``changed`` is None when there is no
    snapshot to compare with.
    """

    volume: str
    size: int
    cell_size: int
    cells: int
    mapped: int
    since: Snapshot | None
    changed: int | None
    layers: tuple[MappedLayer, ...]
    filled: tuple[Cell, ...]


@dataclass(frozen=True)
class _Question:
    """What a host is asked for."""

    blocks: int
    cell_blocks: int
    since: Snapshot | None

    async def ask(self, view: OpenView) -> LayerCells:
        layer = None if self.since is None else self.since.layer
        return await view.host.count_cells(view.key, self.blocks, self.cell_blocks, layer)


class Maps:
    """Makes maps (see the module's text); ``turn`` holds the catalogue's commits."""

    def __init__(
        self,
        store: LayerStore,
        manifests: ManifestStore,
        views: OpenViews,
        turn: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._views = views
        self._turn = turn

    async def map(self, name: str, cells: int, label: str) -> VolumeMap:
        """A volume in at most ``cells``, and what changed since its last snapshot with ``label``.

        NotFoundError, InvalidError; OSError, StorageError when it cannot be read.
        """
        if not 1 <= cells <= MAX_CELLS:
            raise InvalidError(f"a map has 1 to {MAX_CELLS} cells, not {cells}")
        async with self._turn():
            before = self._manifests.get(name)
            view = await self._views.acquire_to_look_on(before)
        counted: LayerCells | None = None
        try:
            counted = await _question(before, cells, label).ask(view)
        except HostLostError:
            pass  # closed meanwhile
        finally:
            await self._views.release_looked_on(view)
        async with self._turn():
            manifest = self._manifests.get(name)
            question = _question(manifest, cells, label)
            if counted is None or not _same(manifest, before):
                view = await self._views.acquire_volume(manifest)
                try:
                    counted = await question.ask(view)
                finally:
                    await self._views.release(view)
            return await self._describe(manifest, question, counted)

    async def _describe(
        self, manifest: Manifest, question: _Question, counted: LayerCells
    ) -> VolumeMap:
        totals, cells = counted
        stack = manifest.stack(manifest.head)
        numbers = {layer: number for number, layer in enumerate(stack)}
        # A head that could not be committed is the volume's until it is closed.
        found = [numbers.get(layer, len(stack) - 1) for layer, _ in totals]
        mapped = [0] * len(stack)
        for number, (_, blocks) in zip(found, totals, strict=True):
            mapped[number] += blocks
        since = question.since
        newer = len(stack) if since is None else numbers[since.layer] + 1
        layers = [
            MappedLayer(
                layer,
                tuple(each.name for each in manifest.snapshots if each.layer == layer),
                mapped[number] << BLOCK_SHIFT,
                await self._store.allocated(layer),
                number >= newer,
            )
            for number, layer in enumerate(stack)
        ]
        return VolumeMap(
            volume=manifest.name,
            size=manifest.size,
            cell_size=question.cell_blocks << BLOCK_SHIFT,
            cells=-(-question.blocks // question.cell_blocks),
            mapped=sum(mapped) << BLOCK_SHIFT,
            since=since,
            changed=None if since is None else sum(mapped[newer:]) << BLOCK_SHIFT,
            layers=tuple(layers),
            filled=tuple(cell._replace(layer=found[cell.layer]) for cell in cells),
        )


def _question(manifest: Manifest, cells: int, label: str) -> _Question:
    blocks = manifest.size >> BLOCK_SHIFT
    stack = set(manifest.stack(manifest.head))
    compared = [each for each in manifest.snapshots if label in each.labels and each.layer in stack]
    since = max(compared, key=lambda each: each.created, default=None)
    return _Question(blocks, cell_blocks_for(blocks, cells), since)


def _same(manifest: Manifest, before: Manifest) -> bool:
    return (manifest.id, manifest.generation) == (before.id, before.generation)


def cell_blocks_for(blocks: int, cells: int) -> int:
    """The size of a cell in blocks: the least power of two that makes at most ``cells``."""
    least = -(-blocks // cells)
    return 1 << (least - 1).bit_length()
