"""Examining one extent log, and whether the data that it lists is there, without keeping a map."""

from __future__ import annotations

import asyncio

from backends.layers import DataFile
from snapshots.extent_log import LogState, read_log
from snapshots.names import BLOCK_SHIFT


class Nothing:
    """Takes extents as an OwnerMap of ``blocks`` blocks does, and keeps none."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def set(self, first: int, last: int, value: int) -> None:
        """Blocks ``first`` to ``last`` (exclusive) became ``value``."""


def missing_from(data: DataFile, state: LogState) -> str | None:
    """What is not there of the data that a log lists, in words that name the file; OSError.

    None when all is.
    """
    return data.find_short([end << BLOCK_SHIFT for end in state.data_ends.values()])


async def examine_log(content: bytes, layer: str, log: str, blocks: int, where: str) -> LogState:
    """Read a log of a volume of ``blocks`` blocks in a thread; CorruptError."""
    return await asyncio.to_thread(read_log, content, layer, log, Nothing(blocks), where)
