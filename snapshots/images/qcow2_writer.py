"""Writing qcow2 images, version 3, as qemu's docs/interop/qcow2.txt describes them.

Offsets only grow, so the file is written from front to back but for the first clusters:

| cluster | |
|---|---|
| 0 | header |
| 1 … | L1 table: one entry for each L2 table, 512 MiB of the volume each |
| … | data clusters, in order; behind those of each 512 MiB their L2 table |
| … | refcount table, refcount blocks: every cluster up to the end is used once |

A cluster of nothing but zeros has no entry. Memory: one L2 table and the L1 table.
"""

from __future__ import annotations

import os
import struct

from snapshots.images.blocks import data_runs, write_at

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
MAGIC = 0x514649FB  # "QFI\xfb"
COPIED = 1 << 63  # the cluster's refcount is exactly 1
_ENTRIES = CLUSTER // 8  # of an L2 table
_REFCOUNT_ORDER = 4  # 16 bits
_REFCOUNTS = CLUSTER // 2  # in a refcount block
# magic, version, backing file (offset, size), cluster bits, size, encryption, L1 entries and
# offset, refcount table (offset, clusters), snapshots (number, offset), feature bits (incompatible,
# compatible, autoclear), refcount order, header length; then the end of the header's extensions
_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII8x")
_HEADER_LENGTH = 104


class Qcow2Writer:
    """Writes a new, empty file; ``size`` in bytes, a multiple of 512."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._l1 = [0] * -(-size // (CLUSTER * _ENTRIES))
        self._used = 1 + _clusters(8 * len(self._l1))
        self._region = 0  # what ``_l2`` is the table of
        self._l2 = [0] * _ENTRIES
        self._guest = -1  # the guest's cluster written last, and its offset in the file
        self._host = 0

    def write(self, offset: int, content: bytes) -> None:
        """Write ``content``; offsets only grow. OSError."""
        view = memoryview(content)
        for start, end in data_runs(view):
            position = start
            while position < end:
                guest = (offset + position) // CLUSTER
                stop = min(end, (guest + 1) * CLUSTER - offset)
                if guest != self._guest:
                    self._begin(guest)
                place = self._host + (offset + position) % CLUSTER
                write_at(self._descriptor, view[position:stop], place)
                position = stop

    def finish(self) -> None:
        """Write the tables; before that the file is no image."""
        self._end_region()
        table_offset = self._used * CLUSTER
        blocks, table = _count_refcounts(self._used)
        first_block = self._used + table
        total = first_block + blocks
        offsets = [(first_block + number) * CLUSTER for number in range(blocks)]
        write_at(self._descriptor, _table(offsets, table), table_offset)
        for number, offset in enumerate(offsets):
            counted = min(_REFCOUNTS, total - number * _REFCOUNTS)
            write_at(self._descriptor, struct.pack(">H", 1) * counted, offset)
        os.ftruncate(self._descriptor, total * CLUSTER)
        write_at(self._descriptor, _table(self._l1, _clusters(8 * len(self._l1))), CLUSTER)
        header = _HEADER.pack(
            MAGIC, 3, 0, 0, CLUSTER_BITS, self._size, 0, len(self._l1), CLUSTER,
            table_offset, table, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, _HEADER_LENGTH,
        )  # fmt: skip
        write_at(self._descriptor, header, 0)

    def _begin(self, guest: int) -> None:
        region = guest // _ENTRIES
        if region != self._region:
            self._end_region()
            self._region = region
        self._guest, self._host = guest, self._allocate()
        self._l2[guest % _ENTRIES] = self._host | COPIED

    def _end_region(self) -> None:
        if any(self._l2):
            offset = self._allocate()
            write_at(self._descriptor, _table(self._l2, 1), offset)
            self._l1[self._region] = offset | COPIED
            self._l2 = [0] * _ENTRIES

    def _allocate(self) -> int:
        self._used += 1
        return (self._used - 1) * CLUSTER


def _clusters(length: int) -> int:
    return -(-length // CLUSTER)


def _count_refcounts(used: int) -> tuple[int, int]:
    """How many refcount blocks, and clusters of their table, ``used`` clusters and these take."""
    blocks = table = 1
    while True:
        needed = -(-(used + blocks + table) // _REFCOUNTS)
        if needed <= blocks and _clusters(8 * blocks) <= table:
            return blocks, table
        blocks = max(blocks, needed)
        table = _clusters(8 * blocks)


def _table(entries: list[int], clusters: int) -> bytes:
    return struct.pack(f">{len(entries)}Q", *entries).ljust(clusters * CLUSTER, b"\0")
