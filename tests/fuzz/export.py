"""The export that transmission is fuzzed over: a file in memory, refusing and failing as told."""

import asyncio
import os
from dataclasses import dataclass

from .model import BLOCK, Model

_FILE = os.memfd_create("nbdserve-fuzz")
DEPTH = "qemu:allocation-depth"


@dataclass
class Behaviour:
    """What the export does beside what it should.

    Bits of ``slow_reads`` and ``slow_writes`` say which ``try_*`` refuse, in turn; what touches a
    block of which the lowest bits are ``broken`` fails (None: nothing does).
    """

    slow_reads: int = 0
    slow_writes: int = 0
    broken: int | None = None
    lends: bool = False
    read_only: bool = False


class FuzzExport:
    """An ``Export``. Which blocks hold data is in a Model, whose content is not used."""

    name = "disk"
    block_size = BLOCK

    def __init__(self, size, behaviour):
        os.ftruncate(_FILE, 0)
        os.ftruncate(_FILE, size)
        self.size = size
        self.read_only = behaviour.read_only
        self.borrowers = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = self.waiting_bytes = 0
        self.most_waiting = self.most_waiting_bytes = 0
        self.unflushed = []
        self._behaviour = behaviour
        self._map = Model(size)
        self._reads = self._writes = 0

    def _check(self, offset, length):
        assert offset >= 0 and 0 < length <= self.size - offset, (offset, length)

    def fails(self, offset, length):
        """Whether what touches this range fails."""
        broken = self._behaviour.broken
        if broken is None or not length:
            return False
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        return last - first >= 63 or any(block & 63 == broken for block in range(first, last + 1))

    def _fail(self, offset, length):
        if self.fails(offset, length):
            raise OSError(5, "Input/output error")

    async def _pass(self, offset, length, memory=0):
        self.waiting += 1
        self.waiting_bytes += memory
        self.most_waiting = max(self.most_waiting, self.waiting)
        self.most_waiting_bytes = max(self.most_waiting_bytes, self.waiting_bytes)
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
        finally:
            self.waiting -= 1
            self.waiting_bytes -= memory
        self._fail(offset, length)

    def _changed(self, offset, length):
        assert not self.read_only
        self.unflushed.append((offset, offset + length))

    def try_read(self, offset, buffer):
        self._check(offset, len(buffer))
        self._reads += 1
        if self._behaviour.slow_reads >> self._reads % 8 & 1:
            buffer[: min(512, len(buffer))] = b"?" * min(512, len(buffer))
            return False
        self._fail(offset, len(buffer))
        assert os.preadv(_FILE, [buffer], offset) == len(buffer)
        return True

    async def read(self, offset, buffer):
        self._check(offset, len(buffer))
        await self._pass(offset, len(buffer), len(buffer))
        assert os.preadv(_FILE, [buffer], offset) == len(buffer)

    def is_data(self, offset, length):
        return self._map.runs(offset, length) == [(length, True)]

    def try_lend(self, offset, length):
        self._check(offset, length)
        if (
            not self._behaviour.lends
            or self.fails(offset, length)
            or not self.is_data(offset, length)
        ):
            return None
        half = length // 2 // BLOCK * BLOCK
        pieces = [(_FILE, offset, half), (_FILE, offset + half, length - half)]
        return [piece for piece in pieces if piece[2]]

    def extents(self, offset, length, limit):
        self._check(offset, length)
        return self._map.runs(offset, length)[:limit]

    def status(self, context, offset, length, limit):
        self._check(offset, length)
        assert context == DEPTH
        return [(size, int(data)) for size, data in self.extents(offset, length, limit)]

    def try_write(self, offset, data):
        self._check(offset, len(data))
        self._writes += 1
        if self._behaviour.slow_writes >> self._writes % 8 & 1:
            return False
        self._fail(offset, len(data))
        self._write(offset, data)
        return True

    async def write(self, offset, data):
        self._check(offset, len(data))
        before = hash(bytes(data))
        await self._pass(offset, len(data), len(data))
        assert hash(bytes(data)) == before, "the memory of a write changed under it"
        self._write(offset, data)

    def _write(self, offset, data):
        self._changed(offset, len(data))
        os.pwrite(_FILE, data, offset)
        for block in range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1):
            self._map.blocks[block] = b""

    async def write_zeroes(self, offset, length, *, no_hole):
        self._check(offset, length)
        await self._pass(offset, length)
        end = offset + length
        if no_hole and length <= 1 << 20:
            self._write(offset, bytes(length))
            return
        self._changed(offset, length)
        first, last = -(-offset // BLOCK) * BLOCK, end // BLOCK * BLOCK
        for start, stop in ((offset, min(end, first)), (max(offset, last), end)):
            if start < stop:
                self._write(start, bytes(stop - start))
        self._punch(first, last)

    async def trim(self, offset, length):
        self._check(offset, length)
        await self._pass(offset, length)
        self._changed(offset, length)
        self._punch(-(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK)

    def _punch(self, start, stop):
        for block in self._map.held(start, max(0, stop - start)):
            os.pwrite(_FILE, bytes(BLOCK), block * BLOCK)
            del self._map.blocks[block]

    async def cache(self, offset, length):
        self._check(offset, length)
        await self._pass(offset, length)

    async def flush(self):
        durable = list(self.unflushed)
        await self._pass(0, 0)
        for change in durable:
            if change in self.unflushed:
                self.unflushed.remove(change)

    def note(self):
        pass

    def read_all(self, offset, length):
        return os.pread(_FILE, length, offset)
