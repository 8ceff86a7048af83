"""What a kill leaves behind the gate of a snapshot whose commit did not come.

From the gate on clients write into the next head, and no manifest names it before the commit. When
the process is killed in between there is no snapshot, and the volume's head is the one before. But
clients were answered, and those that stay rely on it. So what the next head has is moved down: its
blocks are copied into the head below, which then has all that was answered. It needs the space of
those blocks. It can be interrupted anywhere, and is begun anew; nobody serves the volume meanwhile.

The next head's recent files say which head they follow (recent.py). After a power cut they say
nothing, and the next head is a layer of nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from backends.layers import DataFile, LayerStore
from snapshots.head import Head, open_head
from snapshots.layer import OpenLayer, apply_layer
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import DATA, OwnerMap
from snapshots.recent import read_recent

_PIECE = 256  # blocks
_RUNS = 512


async def move_down(store: LayerStore, layer: str, head: str, blocks: int) -> bool:
    """Copy what ``layer`` has into ``head``, a volume's of ``blocks``, if it follows that.

    Neither is open. Whether it did: then ``layer`` is not needed any more. OSError, CorruptError.
    """
    found = await read_recent(store, layer)
    if found.follows != head:
        return False
    held = OwnerMap(blocks)
    try:
        await apply_layer(store, layer, held)
        for first, last, kind in found.runs:
            held.set(first, min(last, blocks), kind)
        source = await store.open_data(layer, writable=False)
        try:
            async with _opened(store, head, blocks) as below:
                await asyncio.to_thread(_copy, source, below, held)
        finally:
            source.close()
    finally:
        held.close()
    return True


async def adopt(store: LayerStore, head: str, blocks: int) -> None:
    """Give a head that is not open what a killed process had noted. OSError, CorruptError."""
    async with _opened(store, head, blocks):
        pass  # opening it does that


@asynccontextmanager
async def _opened(store: LayerStore, head: str, blocks: int) -> AsyncIterator[Head]:
    owners = OwnerMap(blocks)
    try:
        data = await store.open_data(head, writable=True)
        try:
            opened = await open_head(store, OpenLayer(head, data), 1, owners, blocks)
            try:
                yield opened
            finally:
                opened.close()
        finally:
            data.close()
    finally:
        owners.close()


def _copy(source: DataFile, head: Head, held: OwnerMap) -> None:
    """Copy the blocks, each piece durable before the journal has it."""
    for first, last, kind in held.runs(0, held.blocks):
        if kind == DATA:
            for start in range(first, last, _PIECE):
                buffer = bytearray((min(start + _PIECE, last) - start) << BLOCK_SHIFT)
                source.read(start << BLOCK_SHIFT, memoryview(buffer))
                head.data.write(start << BLOCK_SHIFT, buffer)
            head.take(first, last, DATA)
        else:
            head.take_zeroes(first, last)
        if len(head.pending) >= min(_RUNS, max(1, head.write_limit)):
            head.persist(head.capture())
    head.persist(head.capture())
