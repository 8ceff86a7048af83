"""Lazy layers: what they hold is in a repository, and comes when it is read, or by and by.

A lazy layer lies at the bottom of the stack of a volume that was restored lazily. It has no index
yet, but

* ``lazy``, a record (records.py): where its content comes from, and which blocks it **claims**.
  Those are whole regions of which some chunk holds data: which chunks are holes is found out later;
* ``fetched``, an extent log (extent_log.py) of the claimed blocks that are here: *data* where the
  layer's data files have them, *zero* where the snapshot has zeroes. It is written after the data
  was synced, so what it lists is on the disk; what is lost of it is fetched again.

::

    lazy, fetched          blocks are claimed; what is here is read, the rest is fetched (fetching)
      |  everything that is claimed is in ``fetched``, durably
      v
    index, lazy, fetched   the index, made whole in one step, has what ``fetched`` says is data:
      |                    from here on it is an ordinary layer, whatever else is there
      v
    index                  the repository may forget that somebody needed the snapshot

So a layer that is not whole can never be taken for one that is: without an index, only who knows
of ``lazy`` reads it. The data files are as long as the claims from the beginning: a hole in
them is what is not here, or zeroes, and only ``fetched`` tells which.

A **chunk** is the unit of the repository; it is here as a whole or not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from backends.errors import CorruptError
from backends.layers import DataFile, LayerStore
from backends.local_data import ROW_SHIFT
from snapshots.extent_log import FETCHED, INDEX, SECTOR, encode_header
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.records import pack_record, unpack_record

LAZY = "lazy"
_VERSION = 1


@dataclass(frozen=True)
class LazyLayer:
    """What a lazy layer's record says; sizes in bytes.

    ``repository`` and ``push`` identify the snapshot ``volume@snapshot`` in the repository at
    ``url``, ``pin`` is what keeps it alive there ('': nothing does). ``data`` is what its chunks
    hold, in whole chunks; ``claims`` are runs of blocks (first, end). ``rate`` bounds what is
    fetched in a second that nobody waits for: None is no bound, 0 fetches no such thing.
    """

    url: str
    repository: str
    volume: str
    snapshot: str
    push: str
    pin: str
    size: int
    chunk_size: int
    data: int
    claims: tuple[tuple[int, int], ...]
    rate: int | None

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return f"{self.volume}@{self.snapshot} in {self.url}"

    @property
    def blocks(self) -> int:
        """The volume's blocks."""
        return self.size >> BLOCK_SHIFT

    @property
    def chunks(self) -> int:
        """The volume's chunks; the last may be shorter than the others."""
        return -(-self.size // self.chunk_size)

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk."""
        return self.chunk_size >> BLOCK_SHIFT

    def chunk_runs(self) -> Iterator[tuple[int, int]]:
        """Runs of claimed chunks (first, end)."""
        for first, end in self.claims:
            yield first // self.chunk_blocks, -(-end // self.chunk_blocks)

    def ends(self) -> list[int]:
        """Where the claims end in each TiB, in bytes: a store may cut data there."""
        ends: dict[int, int] = {}
        for first, end in self.claims:
            start, stop = first << BLOCK_SHIFT, end << BLOCK_SHIFT
            for row in range(start >> ROW_SHIFT, ((stop - 1) >> ROW_SHIFT) + 1):
                ends[row] = min(stop, (row + 1) << ROW_SHIFT)
        return list(ends.values())

    def changed(self, **changes: Any) -> LazyLayer:
        """The same with ``changes``."""
        return replace(self, **changes)

    def pack(self) -> bytes:
        """As a record."""
        return pack_record(_VERSION, asdict(self))


def lazy_from_map(found: dict[str, Any]) -> LazyLayer:
    """Inverse of ``dataclasses.asdict``; TypeError, KeyError or ValueError."""
    claims = tuple((int(first), int(end)) for first, end in found["claims"])
    return LazyLayer(**{**found, "claims": claims})


def unpack_lazy(content: bytes, where: str) -> LazyLayer:
    """Read a lazy layer's record; CorruptError when it is not a sound one."""
    try:
        layer = lazy_from_map(unpack_record(content, _VERSION, where))
        ends = [0, *(place for claim in layer.claims for place in claim)]
        chunk_size = layer.chunk_size
        if ends != sorted(ends) or ends[-1] > layer.blocks or layer.size % BLOCK_SIZE:
            raise ValueError("claims outside the volume")
        if chunk_size < BLOCK_SIZE or chunk_size & (chunk_size - 1):
            raise ValueError(f"chunks of {chunk_size} bytes")
        if any(first % layer.chunk_blocks for first, _ in layer.claims):
            raise ValueError("a claim begins within a chunk")
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptError(f"{where}: not what it should be: {error!r}") from error
    return layer


async def read_lazy(store: LayerStore, layer: str) -> LazyLayer | None:
    """What a layer that is not whole says of itself; None: it is an ordinary one. CorruptError."""
    content = await store.read_log(layer, LAZY)
    if content is None or await store.has_log(layer, INDEX):
        return None
    return unpack_lazy(content, store.describe(layer, LAZY))


async def create_lazy(store: LayerStore, layer: str, lazy: LazyLayer) -> None:
    """Make a layer of which nothing is here yet; durable on return. OSError, NoSpaceError."""
    await store.create_layer(layer)
    data = await store.open_data(layer, writable=True)
    try:
        await asyncio.to_thread(_make_long, data, lazy)
    finally:
        data.close()
    await store.create_log(layer, FETCHED, encode_header(layer, FETCHED) + bytes(SECTOR))
    await store.create_log(layer, LAZY, lazy.pack())


def _make_long(data: DataFile, lazy: LazyLayer) -> None:
    """Let the data reach as far as the claims: one block at the end of each file does it."""
    for end in lazy.ends():
        data.write_zeroes(end - BLOCK_SIZE, BLOCK_SIZE)
    data.sync()
