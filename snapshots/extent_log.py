"""The extent log: which blocks a layer holds, on disk. Journal, index, merge log and the log of
what was fetched (lazy.py) are all one.

A log is a row of 512-byte **sectors**, the unit that a disk writes whole or not at all::

    4 bytes   CRC-32 of bytes 4 to 512, begun with the CRC-32 of the layer's name
    2 bytes   length of the payload
    n bytes   payload, msgpack
    …         zeroes

Sector 0 is the header: ``[format, layer, log]``. Every other sector is
``[sequence, durable, data, zero]``: ``sequence`` counts 1, 2, 3…; ``durable`` is the sequence up to
which the log was known to be on stable storage when this sector was written; ``data`` and ``zero``
list the extents that the layer took with data and those that it says are zero, each as
``[gap, blocks, gap, blocks…]``, a gap being counted from the end of the extent before. Later
sectors override earlier ones. A **sealed** log (an index) ends in ``[sequence, durable, [], [],
extents]``, ``extents`` being how many it holds in all.

Behind the last sector of every other log lies reserved space: zeroes, so that recording what
was written never fails for want of space. At least one sector of it is always there and durable
before anything is appended.

**Marks.** A sector that lists nothing, ``[sequence, durable, [], []]``, is there for what its
``durable`` says: without a later sector nobody could tell a lost last one from one that never was.
A log that is written whole ends in a mark, and so does one to which nothing was appended for some
seconds, or whose writer has gone in good order.

**Reading back.** A sector is a valid one, or all zeroes (never written, or lost in a power cut
before it was synced). Anything else is damage, since sectors are never overwritten: CorruptError
names the file and the offset. The first zero sector ends the log; a file that ends without one was
cut short. When a later sector claims that a missing one was durable, that is damage too. Valid
sectors behind a gap were never synced: they are ignored, and the reader is told (``ragged``) to
rewrite the log before it appends.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack

from backends.errors import CorruptError
from backends.local_data import ROW_SHIFT
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import DATA, ZERO

SECTOR = 512
FORMAT = 1
JOURNAL = "journal"
INDEX = "index"
MERGE = "merge"
FETCHED = "fetched"

_HEAD = struct.Struct("<IH")
_PAYLOAD = SECTOR - _HEAD.size
_EMPTY = bytes(SECTOR)
# [sequence, durable, data, zero] with 9-byte integers and 3-byte array headers, and to spare.
_FIXED = 32
# The fewest extents that fit a sector: two 5-byte numbers each (a block number is below 2**32).
EXTENTS_PER_SECTOR = (_PAYLOAD - _FIXED) // 10
_ROW_BLOCKS_SHIFT = ROW_SHIFT - BLOCK_SHIFT
# What a killed process has left to be punched are its last TRIMs.
_ZEROED = 4096

Run = tuple[int, int, int]
"""(first block, end block, DATA or ZERO)"""


def encode_header(layer: str, log: str) -> bytes:
    """Sector 0 of a new log."""
    return _sector(layer, [FORMAT, layer, log])


def encode_mark(layer: str, sequence: int) -> bytes:
    """A mark numbered ``sequence`` + 1; ``sequence`` must be durable already."""
    return _sector(layer, [sequence + 1, sequence, [], []])


def encode_extents(
    layer: str, runs: Iterable[Run], sequence: int, durable: int | None = None
) -> Iterator[bytes]:
    """Sectors for ``runs`` (ascending, disjoint), the first numbered ``sequence`` + 1.

    ``durable`` is the last sequence that is durable already, ``sequence`` unless given.
    """
    if durable is None:
        durable = sequence
    lists: dict[int, list[int]] = {DATA: [], ZERO: []}
    ends = {DATA: 0, ZERO: 0}
    room = _PAYLOAD - _FIXED
    for first, end, kind in runs:
        gap = first - ends[kind]
        cost = _integer_size(gap) + _integer_size(end - first)
        if cost > room:
            sequence += 1
            yield _sector(layer, [sequence, durable, lists[DATA], lists[ZERO]])
            lists = {DATA: [], ZERO: []}
            ends = {DATA: 0, ZERO: 0}
            gap = first
            room = _PAYLOAD - _FIXED
            cost = _integer_size(gap) + _integer_size(end - first)
        lists[kind] += (gap, end - first)
        ends[kind] = end
        room -= cost
    if lists[DATA] or lists[ZERO]:
        sequence += 1
        yield _sector(layer, [sequence, durable, lists[DATA], lists[ZERO]])


def encode_log(layer: str, log: str, runs: Iterable[Run], *, sealed: bool) -> tuple[bytes, int]:
    """A whole log and the sequence of its last sector; a ``sealed`` one has the end mark.

    Another one needs a sector of zeroes at least behind it.
    """
    count = 0

    def counted() -> Iterator[Run]:
        nonlocal count
        for run in runs:
            count += 1
            yield run

    content = bytearray(encode_header(layer, log))
    for sector in encode_extents(layer, counted(), 0):
        content += sector
    sequence = len(content) // SECTOR - 1
    if sealed:
        sequence += 1
        content += _sector(layer, [sequence, 0, [], [], count])
    elif sequence:
        content += encode_mark(layer, sequence)
        sequence += 1
    return bytes(content), sequence


class Extents(Protocol):
    """What a log is read into: an OwnerMap, or less."""

    blocks: int

    def set(self, first: int, last: int, value: int) -> None:
        """Store ``value`` for blocks ``first`` to ``last`` (exclusive)."""


@dataclass
class LogState:
    """What reading a log found: its last sequence, its end and size in bytes, and whether it must
    be rewritten before anything is appended.

    ``zeroed`` are the last extents (first block, end block) that it says became zero: data may
    have come there since. ``data_ends`` are the blocks at which the data that it lists ends, one
    for each TiB of the volume: a store may cut data there. What became zero later still counts, for
    a layer's data never gets shorter. ``marked``: nothing but a mark could be lost from its end
    unseen.
    """

    sequence: int
    end: int
    ragged: bool
    size: int
    zeroed: deque[tuple[int, int]] = field(compare=False, default_factory=deque)
    data_ends: dict[int, int] = field(compare=False, default_factory=dict)
    marked: bool = field(compare=False, default=True)


def read_log(
    content: bytes,
    layer: str,
    log: str,
    into: Extents,
    where: str,
    data: int = DATA,
    zero: int = ZERO,
) -> LogState:
    """Apply a log to ``into``, storing ``data`` and ``zero`` for the two kinds of extent.

    An INDEX must end in its end mark; any other log ends at its first zero sector.
    CorruptError when a byte of it is not right.
    """
    if len(content) < SECTOR:
        raise CorruptError(f"{where}: cut short at offset {len(content)}")
    seed = zlib.crc32(layer.encode())
    header = _payload(content, 0, seed, where)
    if header == [FORMAT + 1, layer, log]:
        newer = f"format {header[0]} is newer than this nbdserve understands"
        raise CorruptError(f"{where}: {newer}, at offset 0")
    if header != [FORMAT, layer, log]:
        raise CorruptError(f"{where}: offset 0 is not the header of this {log}")
    sequence = 0
    extents = 0
    data_ends: dict[int, int] = {}
    zeroed: deque[tuple[int, int]] = deque(maxlen=_ZEROED)
    offset = SECTOR
    sealed = False
    marked = True
    try:
        while offset + SECTOR <= len(content) and not sealed:
            payload = _payload(content, offset, seed, where)
            if payload is None:
                break
            if payload[0] != sequence + 1:
                raise CorruptError(
                    f"{where}: sector {payload[0]} at offset {offset}, {sequence + 1} expected"
                )
            sequence += 1
            marked = not payload[2] and not payload[3]
            extents += _apply(payload[2], data, into)
            extents += _apply(payload[3], zero, into, zeroed)
            _note_ends(payload[2], data_ends)
            if len(payload) == 5:
                sealed = True
                if payload[4] != extents:
                    raise CorruptError(
                        f"{where}: {extents} extents up to offset {offset}, {payload[4]} expected"
                    )
            offset += SECTOR
    except (TypeError, IndexError, ValueError) as error:
        raise CorruptError(f"{where}: malformed sector at offset {offset}") from error
    if log == INDEX:
        if not sealed or len(content) != offset:
            raise CorruptError(f"{where}: the end mark is missing at offset {offset}")
        return LogState(sequence, offset, False, len(content), data_ends=data_ends)
    if offset + SECTOR > len(content):
        raise CorruptError(f"{where}: cut short at offset {len(content)}")
    ragged = _check_tail(content, offset, seed, sequence, where)
    return LogState(sequence, offset, ragged, len(content), zeroed, data_ends, marked)


def _check_tail(content: bytes, offset: int, seed: int, sequence: int, where: str) -> bool:
    """Whether unsynced sectors lie behind the end; CorruptError when a synced one is missing."""
    if not content[offset:].strip(b"\0"):
        return False
    gap = offset
    while offset < len(content):
        payload = _payload(content, offset, seed, where)
        if payload is None:
            offset += SECTOR
            continue
        if len(payload) < 2 or not isinstance(payload[1], int):
            raise CorruptError(f"{where}: malformed sector at offset {offset}")
        if payload[1] > sequence:
            raise CorruptError(f"{where}: the sector at offset {gap} is lost")
        offset += SECTOR
    return True


def _apply(
    numbers: list[int],
    value: int,
    into: Extents,
    noted: deque[tuple[int, int]] | None = None,
) -> int:
    """Apply a list of extents; how many they are."""
    position = 0
    if not isinstance(numbers, list) or len(numbers) % 2:
        raise ValueError("not a list of pairs")
    pairs = iter(numbers)
    blocks = into.blocks
    for gap, length in zip(pairs, pairs, strict=True):
        first = position + gap
        position = first + length
        if gap < 0 or position <= first or position > blocks:
            raise ValueError("extent outside the volume")
        into.set(first, position, value)
        if noted is not None:
            noted.append((first, position))
    return len(numbers) // 2


def _note_ends(numbers: list[int], ends: dict[int, int]) -> None:
    """Note where the extents of a list, which are ascending, end in each TiB."""
    if not numbers:
        return
    last = sum(numbers)
    if numbers[0] >> _ROW_BLOCKS_SHIFT == (last - 1) >> _ROW_BLOCKS_SHIFT:
        row = (last - 1) >> _ROW_BLOCKS_SHIFT
        ends[row] = max(ends.get(row, 0), last)
        return
    position = 0
    pairs = iter(numbers)
    for gap, length in zip(pairs, pairs, strict=True):
        first = position + gap
        position = first + length
        for row in range(first >> _ROW_BLOCKS_SHIFT, ((position - 1) >> _ROW_BLOCKS_SHIFT) + 1):
            end = min(position, (row + 1) << _ROW_BLOCKS_SHIFT)
            ends[row] = max(ends.get(row, 0), end)


def _sector(layer: str, payload: list[Any]) -> bytes:
    body: bytes = msgpack.packb(payload)
    tail = struct.pack("<H", len(body)) + body + bytes(_PAYLOAD - len(body))
    return struct.pack("<I", zlib.crc32(tail, zlib.crc32(layer.encode()))) + tail


def _payload(content: bytes, offset: int, seed: int, where: str) -> list[Any] | None:
    """The payload of one sector; None when it is all zeroes."""
    sector = content[offset : offset + SECTOR]
    if not sector.strip(b"\0"):
        return None
    if len(sector) == SECTOR:
        check, length = _HEAD.unpack_from(sector)
        if check == zlib.crc32(sector[4:], seed) and length <= _PAYLOAD:
            try:
                payload = msgpack.unpackb(sector[_HEAD.size : _HEAD.size + length])
            except ValueError:
                payload = None
            if isinstance(payload, list):
                return payload
    raise CorruptError(f"{where}: damaged sector at offset {offset}")


def _integer_size(number: int) -> int:
    """Bytes that msgpack takes for a non-negative integer."""
    if number < 0x80:
        return 1
    if number < 0x100:
        return 2
    if number < 0x10000:
        return 3
    return 5 if number < 0x100000000 else 9
