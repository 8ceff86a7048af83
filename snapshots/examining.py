"""Examining one extent log, and whether the data that it lists is there, without keeping a map."""

from __future__ import annotations

import asyncio

from backends.errors import CorruptError, NotFoundError
from backends.layers import DataFile, LayerStore
from backends.local_data import ROW_SHIFT
from snapshots.extent_log import LogState, read_log
from snapshots.layer import apply_layer, apply_merge
from snapshots.names import BLOCK_SHIFT, MAX_VOLUME_SIZE
from snapshots.owner_map import DATA

_ROW_BLOCKS_SHIFT = ROW_SHIFT - BLOCK_SHIFT


class Reach:
    """How far a log says that data goes, in each TiB of the volume: a store may cut it there.

    Takes extents as an OwnerMap of ``blocks`` blocks does. What became zero later still counts: a
    layer's data never gets shorter.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._ends: dict[int, int] = {}

    def set(self, first: int, last: int, value: int) -> None:
        """Blocks ``first`` to ``last`` (exclusive) became ``value``."""
        if value != DATA:
            return
        for row in range(first >> _ROW_BLOCKS_SHIFT, ((last - 1) >> _ROW_BLOCKS_SHIFT) + 1):
            end = min(last, (row + 1) << _ROW_BLOCKS_SHIFT)
            self._ends[row] = max(self._ends.get(row, 0), end)

    @property
    def nowhere(self) -> bool:
        """Whether the log lists no data at all."""
        return not self._ends

    def missing_from(self, data: DataFile) -> str | None:
        """What is not there of the data, in words that name the file; None when all is. OSError."""
        return data.find_short([end << BLOCK_SHIFT for end in self._ends.values()])


async def examine_log(
    content: bytes, layer: str, log: str, blocks: int, where: str
) -> tuple[LogState, Reach]:
    """Read a log of a volume of ``blocks`` blocks in a thread; CorruptError."""
    reach = Reach(blocks)
    return await asyncio.to_thread(read_log, content, layer, log, reach, where), reach


async def holds_listed_data(store: LayerStore, layer: str) -> bool:
    """Whether a layer that no volume lists may be all that is left of one. OSError.

    So if it has data, and a log that lists some or cannot be read. Data that no log lists could
    not be read again, whatever else came back: the next head of a snapshot that was not committed
    has it, when the process is killed behind the gate.
    """
    if not await store.holds_data(layer):
        return False
    reach = Reach(MAX_VOLUME_SIZE >> BLOCK_SHIFT)
    try:
        await apply_layer(store, layer, reach)
        await apply_merge(store, layer, reach)
    except (CorruptError, NotFoundError):
        return True
    return not reach.nowhere
