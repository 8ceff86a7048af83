"""Reading qcow2 images, versions 2 and 3, as qemu's docs/interop/qcow2.txt describes them.

An image may come from a stranger, so nothing in it is believed: every offset is checked against
the file, no L2 table may be used twice (a small file would else unfold to any size of list), and
what is not understood is refused with what to do. That is also what makes this safer than to let a
tool open it: an image that names another file (a backing or data file) is refused, not followed.

What is read is the active state; internal snapshots are passed over. Compressed clusters are zlib.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from backends.errors import CorruptError, InvalidError
from snapshots.images.blocks import read_at
from snapshots.names import MAX_VOLUME_SIZE

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # of version 2, and the beginning of version 3
_FEATURES = struct.Struct(">QQQII")  # what version 3 has behind it
_MAX_L1 = 32 << 20  # bytes, as in qemu
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_ZERO = 1 << 0
_COMPRESSED = 1 << 62
_CACHED = 16 << 20  # bytes of L2 tables that are kept

_CONVERT = "make one that stands by itself with 'qemu-img convert -O qcow2'"
_REFUSED = {
    1 << 1: "it is marked as corrupt: look at it with 'qemu-img check'",
    1 << 2: f"its data is in another file: {_CONVERT}",
    1 << 3: f"it is compressed with something other than zlib: {_CONVERT}",
    1 << 4: f"it has subclusters (extended_l2): {_CONVERT}",
}
_DIRTY = 1 << 0  # its refcounts are out of date, which reading does not need


class _Data(NamedTuple):
    """A cluster of the file; None in place of it: zeros."""

    offset: int
    compressed: int  # bytes, at most; 0: it is not


class Qcow2Image:
    """Reads an image file; its descriptor is the caller's. ``name`` is for messages."""

    def __init__(self, descriptor: int, name: str) -> None:
        """Read the header and the L1 table; InvalidError or CorruptError."""
        self._descriptor = descriptor
        self._name = name
        self._file_size = os.lseek(descriptor, 0, os.SEEK_END)
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        header = self._read(0, _HEADER.size)
        magic, version, backing, _, bits, self.size, crypt, l1_size, l1_offset, *_ = _HEADER.unpack(
            header
        )
        if magic != MAGIC:
            raise InvalidError(f"{name} is no qcow2 image")
        if version not in (2, 3):
            raise InvalidError(f"{name}: version {version} of qcow2 is not known")
        if version == 3:
            self._check_features()
        if backing:
            raise InvalidError(f"{name}: it is only what differs from a backing file: {_CONVERT}")
        if crypt:
            raise InvalidError(f"{name}: it is encrypted: {_CONVERT}")
        if not 9 <= bits <= 21:
            raise CorruptError(f"{name}: clusters of 2^{bits} bytes")
        if not 0 < self.size <= MAX_VOLUME_SIZE:
            raise InvalidError(f"{name}: its size of {self.size} bytes is not from 1 to 16 TiB")
        self._version = version
        self._bits = bits
        self._cluster = 1 << bits
        self._entries = self._cluster // 8
        tables = -(-self.size // (self._cluster * self._entries))
        if tables * 8 > _MAX_L1 or l1_size < tables:
            raise CorruptError(f"{name}: an L1 table of {l1_size} entries for {self.size} bytes")
        self._l1 = self._read_l1(l1_offset, tables)

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of each cluster that may not be zero, in order."""
        for number, table in enumerate(self._l1):
            if not table:
                continue
            first = number * self._entries
            for cluster, entry in enumerate(self._read_table(table), first):
                position = cluster << self._bits
                if position < self.size and self._locate(entry, position) is not None:
                    yield position, min(self._cluster, self.size - position)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; CorruptError, OSError. From any thread."""
        while buffer:
            inside = offset % self._cluster
            part = buffer[: self._cluster - inside]
            self._read_cluster(offset - inside, inside, part)
            buffer = buffer[len(part) :]
            offset += len(part)

    def _read_cluster(self, position: int, inside: int, part: memoryview) -> None:
        table = self._l1[position // (self._cluster * self._entries)]
        data = None
        if table:
            entry = self._table(table)[(position >> self._bits) % self._entries]
            data = self._locate(entry, position)
        if data is None:
            part[:] = bytes(len(part))
        elif not data.compressed:
            if read_at(self._descriptor, part, data.offset + inside) < len(part):
                raise self._corrupt(f"it ends before the data of offset {position}")
        else:
            part[:] = self._decompress(data, position)[inside : inside + len(part)]

    def _locate(self, entry: int, position: int) -> _Data | None:
        """Where the cluster of an L2 entry is; ``position`` in the volume is for messages."""
        if entry & _COMPRESSED:
            shift = 62 - (self._bits - 8)
            offset = entry & ((1 << shift) - 1)
            sectors = (entry >> shift & ((1 << (62 - shift)) - 1)) + 1
            length = sectors * 512 - offset % 512
            # The last sector of a file may be cut short; the data then says whether all is there.
            if not 0 < offset < self._file_size:
                raise self._corrupt(f"the data of offset {position} is not in the file")
            return _Data(offset, length)
        if self._version == 3 and entry & _ZERO:
            return None
        offset = entry & _OFFSET
        if not offset:
            return None
        needed = min(self._cluster, self.size - position)
        if offset % self._cluster or offset + needed > self._file_size:
            raise self._corrupt(f"the data of offset {position} is not in the file")
        return _Data(offset, 0)

    def _decompress(self, data: _Data, position: int) -> bytes:
        buffer = bytearray(data.compressed)
        there = read_at(self._descriptor, memoryview(buffer), data.offset)
        try:
            # Without a header; the window is what the compressor says, up to the largest.
            plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(buffer[:there], self._cluster)
        except zlib.error:
            raise self._corrupt(f"the data of offset {position} does not decompress") from None
        if len(plain) != self._cluster:
            raise self._corrupt(f"the data of offset {position} does not decompress to a cluster")
        return plain

    def _check_features(self) -> None:
        incompatible, _, _, _, length = _FEATURES.unpack(self._read(_HEADER.size, _FEATURES.size))
        if length < _HEADER.size + _FEATURES.size:
            raise self._corrupt(f"a header of {length} bytes")
        for bit, why in _REFUSED.items():
            if incompatible & bit:
                raise InvalidError(f"{self._name}: {why}")
        if incompatible & ~_DIRTY:
            raise InvalidError(f"{self._name}: it has features that are not known: {_CONVERT}")

    def _read_l1(self, offset: int, tables: int) -> list[int]:
        if offset % self._cluster:
            raise self._corrupt(f"its L1 table is at {offset}")
        packed = self._read(offset, 8 * tables)
        found = [entry & _OFFSET for (entry,) in struct.iter_unpack(">Q", packed)]
        used = [entry for entry in found if entry]
        if len(set(used)) != len(used):
            raise self._corrupt("an L2 table is used twice")
        return found

    def _table(self, offset: int) -> tuple[int, ...]:
        """An L2 table, from the cache if it is there."""
        with self._lock:
            table = self._tables.get(offset)
            if table is not None:
                self._tables.move_to_end(offset)
                return table
        table = self._read_table(offset)
        with self._lock:
            self._tables[offset] = table
            while len(self._tables) > max(4, _CACHED // self._cluster):
                self._tables.popitem(last=False)
        return table

    def _read_table(self, offset: int) -> tuple[int, ...]:
        if offset % self._cluster:
            raise self._corrupt(f"an L2 table is at {offset}")
        return struct.unpack(f">{self._entries}Q", self._read(offset, self._cluster))

    def _read(self, offset: int, length: int) -> bytes:
        """Metadata; a file that is cut short in it is damaged."""
        buffer = bytearray(length)
        if offset + length > self._file_size or (
            read_at(self._descriptor, memoryview(buffer), offset) < length
        ):
            what = "is no qcow2 image" if offset == 0 else f"ends before {offset + length}"
            raise CorruptError(f"{self._name} {what}: is it cut short?")
        return bytes(buffer)

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"{self._name}: {what}; look at it with 'qemu-img check'")
