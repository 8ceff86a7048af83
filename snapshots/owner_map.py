"""One byte a block: the flat map that answers "who owns block b" in O(1).

Two uses. In a **view** of a volume the value is the slot of the layer that holds the block, 0 when
the block reads as zeroes. In the map of a single **layer** the value is DATA or ZERO, 0 when the
layer says nothing of the block.

The bytes live in an anonymous mapping that costs memory only where it was written: 16 TiB of
volume are 4 GiB of addresses and no memory. Beside it one byte for each *region* of 32,768 blocks
(128 MiB of volume) says whether anything but 0 was ever stored there, so scans skip what is empty.
Huge pages are refused: with them one block would cost 2 MiB.

Scans use ``re`` and ``find`` on the mapping itself: both run in C and copy nothing. A region takes
one of them up to 0.1 ms, so whoever scans on the event loop goes no further than ``reach``.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterator

DATA = 1
ZERO = 2

REGION_SHIFT = 15
REGION = 1 << REGION_SHIFT
_MAP_NORESERVE = 0x4000

REACH = 16
"""Most touched regions that are scanned at a time: 2 GiB of volume, some milliseconds at worst."""

_PEELED = 16
_EMPTY = bytes(REGION)
_IS_OTHER = bytes((0,)) + bytes((1,)) * 255

# Five times as fast as a search for what is not ``value``.
_RUN_OF = [re.compile(re.escape(bytes([value])) + b"*", re.DOTALL).match for value in range(256)]


class OwnerMap:
    """``blocks`` bytes, all 0 at first; ``raw`` is the mapping itself, for loops that only read."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.raw = mmap.mmap(
            -1, max(blocks, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        )
        self.raw.madvise(mmap.MADV_NOHUGEPAGE)
        self._touched = bytearray((blocks + REGION - 1) >> REGION_SHIFT)

    def close(self) -> None:
        """Give the memory back; no other call may follow."""
        self.raw.close()

    def set(self, first: int, last: int, value: int) -> None:
        """Store ``value`` for blocks ``first`` to ``last`` (exclusive)."""
        raw = self.raw
        if last - first == 1:
            raw[first] = value
            if value:
                self._touched[first >> REGION_SHIFT] = 1
            return
        touched = self._touched
        if value == 0:
            self._clear(first, last)
            return
        pattern = bytes((value,))
        while first < last:
            region = first >> REGION_SHIFT
            end = min(last, (region + 1) << REGION_SHIFT)
            raw[first:end] = pattern * (end - first)
            touched[region] = 1
            first = end

    def _clear(self, first: int, last: int) -> None:
        """Store 0; of whole regions, the memory is given back."""
        raw, touched = self.raw, self._touched
        unit = max(REGION, mmap.PAGESIZE)
        begin = (first + unit - 1) // unit * unit
        end = last if last == self.blocks else last // unit * unit
        if begin < end:
            regions = slice(begin >> REGION_SHIFT, (end + REGION - 1) >> REGION_SHIFT)
            if 1 in touched[regions]:
                raw.madvise(mmap.MADV_DONTNEED, begin, end - begin)
                touched[regions] = bytes(len(touched[regions]))
        for start, stop in self.touched_regions(first, last):
            raw[start:stop] = bytes(stop - start)

    def replace(self, first: int, last: int, old: int, new: int) -> None:
        """Turn every ``old`` between ``first`` and ``last`` (exclusive) into ``new``."""
        table = bytearray(range(256))
        table[old] = new
        for start, end in self.touched_regions(first, last):
            self.raw[start:end] = self.raw[start:end].translate(table)

    def count_owned(self) -> int:
        """How many blocks are not 0."""
        return sum(
            end - start - self.raw[start:end].count(0)
            for start, end in self.touched_regions(0, self.blocks)
        )

    def count_values(self, first: int, last: int) -> dict[int, int]:
        """How many blocks between ``first`` and ``last`` have each value; 0 is left out.

        A region takes 10 µs when it has one value, about 2 ms at worst.
        """
        found: Counter[int] = Counter()
        for start, end in self.touched_regions(first, last):
            rest = self.raw[start:end]
            # Value by value, which is the quicker way unless there are many of them.
            for _ in range(_PEELED):
                if not rest:
                    break
                value, before = rest[:1], len(rest)
                rest = rest.translate(None, value)
                found[value[0]] += before - len(rest)
            found.update(rest)
        del found[0]
        return found

    def owned_runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(start, end) of every run between ``first`` and ``last`` that is not 0, merged."""
        raw = self.raw
        touched = self._touched
        position = first
        last = min(last, self.blocks)
        while position < last:
            region = position >> REGION_SHIFT
            if not touched[region]:
                region = touched.find(1, region)
                if region < 0:
                    return
                position = region << REGION_SHIFT
                continue
            region_end = min(last, (region + 1) << REGION_SHIFT)
            if region_end - position == REGION and raw[position:region_end] == _EMPTY:
                position = region_end  # what was trimmed, a hundred times faster
                continue
            start = _end_of_run(raw, 0, position, region_end)
            if start == region_end:
                position = region_end
                continue
            end = raw.find(b"\0", start, last)
            if end < 0:
                end = last
            yield start, end
            position = end

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, value) of every run of one non-zero value between ``first`` and ``last``."""
        raw = self.raw
        for start, end in self.owned_runs(first, last):
            position = start
            while position < end:
                value = raw[position]
                stop = _end_of_run(raw, value, position, end)
                yield position, stop, value
                position = stop

    def reach(self, first: int, last: int) -> int:
        """``last``, or a block before it where a scan from ``first`` on is to stop for now.

        It is behind ``first``, and no more than REACH regions between them were ever touched.
        """
        if last - first <= REACH << REGION_SHIFT:
            return last
        region = (first >> REGION_SHIFT) - 1
        for _ in range(REACH + 1):
            region = self._touched.find(1, region + 1)
            if region < 0:
                return last
        return min(last, region << REGION_SHIFT)

    def differences(
        self, other: OwnerMap, names: bytes | None, first: int, last: int
    ) -> Iterator[tuple[int, int]]:
        """(start, end) of every run between ``first`` and ``last`` that ``other`` has otherwise.

        ``names`` has 256 bytes: for each value of ``other`` what it is called here, 0 only for 0;
        None says that both mean the same. Behind its end, ``other`` is 0.
        """
        return _joined(self._different(other, names, first, last))

    def _different(
        self, other: OwnerMap, names: bytes | None, first: int, last: int
    ) -> Iterator[tuple[int, int]]:
        """``differences``, cut where regions end."""
        for start, end in self._touched_by_either(other, first, last):
            theirs = other.raw[start:end]
            if names is not None:
                theirs = theirs.translate(names)
            theirs = theirs.ljust(end - start, b"\0")
            ours = self.raw[start:end]
            if ours == theirs:
                continue
            bits = int.from_bytes(ours, "little") ^ int.from_bytes(theirs, "little")
            marks = bits.to_bytes(end - start, "little").translate(_IS_OTHER)
            stop = 0
            while (begin := marks.find(1, stop)) >= 0:
                stop = marks.find(0, begin)
                if stop < 0:
                    stop = end - start
                yield start + begin, start + stop

    def touched_regions(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The regions between ``first`` and ``last`` that may hold anything, cut to them."""
        touched = self._touched
        region = first >> REGION_SHIFT
        while first < last:
            region = touched.find(1, region)
            if region < 0:
                return
            start = max(first, region << REGION_SHIFT)
            end = min(last, (region + 1) << REGION_SHIFT)
            if start >= last:
                return
            yield start, end
            region += 1

    def touched_spans(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(start, end) of what may not be 0 between ``first`` and ``last``, region by region."""
        span: tuple[int, int] | None = None
        for start, end in self.touched_regions(first, last):
            if span is not None and span[1] == start:
                span = (span[0], end)
                continue
            if span is not None:
                yield span
            span = (start, end)
        if span is not None:
            yield span

    def grown(self, blocks: int) -> OwnerMap:
        """A larger map with the same content."""
        larger = OwnerMap(blocks)
        for start, end in self.touched_regions(0, self.blocks):
            larger.raw[start:end] = self.raw[start:end]
        larger._touched[: len(self._touched)] = self._touched
        return larger

    def _touched_by_either(
        self, other: OwnerMap, first: int, last: int
    ) -> Iterator[tuple[int, int]]:
        """The regions between ``first`` and ``last`` where one of two maps may hold anything."""
        region = first >> REGION_SHIFT
        while first < last:
            found = (self._touched.find(1, region), other._touched.find(1, region))
            region = min((at for at in found if at >= 0), default=-1)
            start = max(first, region << REGION_SHIFT)
            if region < 0 or start >= last:
                return
            yield start, min(last, (region + 1) << REGION_SHIFT)
            region += 1


class Regions:
    """Only the regions that something is stored for; of a volume of any size."""

    blocks = 1 << 32

    def __init__(self) -> None:
        self.found: set[int] = set()

    def set(self, first: int, last: int, value: int) -> None:
        """Note the regions of blocks ``first`` to ``last`` (exclusive)."""
        self.found.update(range(first >> REGION_SHIFT, ((last - 1) >> REGION_SHIFT) + 1))


def _end_of_run(raw: mmap.mmap, value: int, first: int, last: int) -> int:
    """The first block between ``first`` and ``last`` that is not ``value``, or ``last``."""
    match = _RUN_OF[value](raw, first, last)
    assert match is not None
    return match.end()


def _joined(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs in order, those that touch as one."""
    start = end = -1
    for first, last in runs:
        if first != end:
            if start >= 0:
                yield start, end
            start = first
        end = last
    if start >= 0:
        yield start, end
