"""An export in memory whose every step can be refused, held up or made to fail."""

import asyncio

from backends.errors import NotFoundError
from nbdserve.server import ExportDescription

BLOCK = 4096


class MemoryExport:
    """A bytearray; blocks never written, or trimmed, are holes."""

    key = "of the disk"
    block_size = BLOCK
    contexts = ("base:allocation", "x-test:parity", "x-test:wide")

    def __init__(self, name="disk", size=1 << 20, *, read_only=False):
        self.name = name
        self.size = size
        self.read_only = read_only
        self.content = bytearray(size)
        self.held = set()  # numbers of the blocks that hold data
        self.refuse_reads = False
        self.refuse_writes = False
        self.gate = None  # an asyncio.Event that slow operations wait for
        self.gated = None  # offset of the only operation that waits; None: all of them
        self.error = None  # raised by every operation
        self.waiting = 0
        self.most_waiting = 0
        self.waiting_bytes = 0
        self.most_waiting_bytes = 0
        self.calls = []
        self.borrowers = set()

    async def _pass(self, what, offset, length):
        self.calls.append((what, offset, length))
        self.waiting += 1
        self.waiting_bytes += length
        self.most_waiting = max(self.waiting, self.most_waiting)
        self.most_waiting_bytes = max(self.waiting_bytes, self.most_waiting_bytes)
        try:
            if self.gate is not None and self.gated in (None, offset):
                await self.gate.wait()
            else:
                await asyncio.sleep(0)
        finally:
            self.waiting -= 1
            self.waiting_bytes -= length
        self._fail()

    def _fail(self):
        if self.error is not None:
            raise self.error

    def _read(self, offset, buffer):
        assert 0 < len(buffer) <= self.size - offset
        buffer[:] = self.content[offset : offset + len(buffer)]

    def _write(self, offset, data):
        self.noted = False
        assert not self.read_only
        assert 0 < len(data) <= self.size - offset
        self.content[offset : offset + len(data)] = data
        self.held.update(range(offset // BLOCK, (offset + len(data) - 1) // BLOCK + 1))

    def try_read(self, offset, buffer):
        if self.refuse_reads:
            buffer[:] = b"?" * len(buffer)
            return False
        self.calls.append(("try_read", offset, len(buffer)))
        self._fail()
        self._read(offset, buffer)
        return True

    async def read(self, offset, buffer):
        await self._pass("read", offset, len(buffer))
        self._read(offset, buffer)

    def is_data(self, offset, length):
        return all(
            block in self.held for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))
        )

    def try_lend(self, offset, length):
        return None

    def extents(self, offset, length, limit):
        self.calls.append(("extents", offset, length))
        self._fail()
        runs = []
        end = offset + length
        while offset < end:
            step = min(end, (offset // BLOCK + 1) * BLOCK) - offset
            data = offset // BLOCK in self.held
            if runs and runs[-1][1] == data:
                runs[-1] = (runs[-1][0] + step, data)
            elif len(runs) == limit:
                break
            else:
                runs.append((step, data))
            offset += step
        return runs

    def status(self, context, offset, length, limit):
        """Parity: of each block's number. Wide: everything is one run."""
        self._fail()
        if context == "x-test:wide":
            return [(length, 5)]
        runs = []
        end = offset + length
        while offset < end and len(runs) < limit:
            step = min(end, (offset // BLOCK + 1) * BLOCK) - offset
            runs.append((step, offset // BLOCK % 2))
            offset += step
        return runs

    def try_write(self, offset, data):
        if self.refuse_writes:
            return False
        self._fail()
        self._write(offset, data)
        return True

    async def write(self, offset, data):
        before = bytes(data)
        await self._pass("write", offset, len(data))
        assert bytes(data) == before
        self._write(offset, data)

    async def write_zeroes(self, offset, length, *, no_hole):
        await self._pass("write_zeroes no_hole" if no_hole else "write_zeroes", offset, length)
        self._write(offset, bytes(length))

    async def trim(self, offset, length):
        await self._pass("trim", offset, length)
        self.noted = False
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        for block in range(first, last):
            self.content[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
            self.held.discard(block)

    async def cache(self, offset, length):
        await self._pass("cache", offset, length)

    async def flush(self):
        await self._pass("flush", 0, 0)

    def note(self):
        self.noted = True


class MemoryRegistry:
    """Exports by name; remembers who has what open."""

    def __init__(self, *exports):
        self.exports = {export.name: export for export in exports}
        self.revokes = []
        self.opened = 0
        self.closed = 0
        self.gate = None

    def list_names(self):
        return list(self.exports)

    async def describe(self, name):
        if self.gate is not None:
            await self.gate.wait()
        export = self._find(name)
        return ExportDescription(
            export.name,
            export.size,
            export.read_only,
            export.block_size,
            "in memory",
            export.contexts,
        )

    async def open(self, name, contexts, revoke):
        export = self._find(name)
        assert set(contexts) <= set(export.contexts)
        self.revokes.append(revoke)
        self.opened += 1
        return export

    async def close(self, export):
        assert self.exports[export.name] is export
        self.closed += 1

    def _find(self, name):
        if name not in self.exports:
            raise NotFoundError(f"there is no export {name!r}")
        return self.exports[name]
