"""Reads that the page cache does not serve: the right bytes, and all in flight together."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from backends.local_data import LocalDataFile
from backends.local_layers import LocalLayerStore
from backends.memory_layers import MemoryDataFile, MemoryLayerStore
from snapshots.catalogue import Catalogue
from snapshots.cold_reads import ColdReads
from snapshots.handle import Handle
from tests.snapshots.stores import BLOCK, run

BLOCKS = 512


class SlowFile(MemoryDataFile):
    """Not cached: a read in a thread waits until as many were asked for as the test wants."""

    def __init__(self, together: int) -> None:
        super().__init__(MemoryLayerStore(), {})
        self.asked: list[tuple[int, int]] = []
        self.tried: list[tuple[int, str]] = []
        self.broken: set[int] = set()
        self._together = together
        self._all = threading.Event()

    def _begin(self) -> None:
        if len({offset for offset, _ in self.tried} | {offset for offset, _ in self.asked}) >= (
            self._together
        ):
            self._all.set()

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        self.tried.append((offset, threading.current_thread().name))
        self._begin()
        return False

    def cache(self, offset: int, length: int) -> None:
        self.asked.append((offset, length))
        self._begin()

    def read(self, offset: int, buffer: memoryview) -> None:
        assert self._all.wait(30), "not all are in flight"
        if offset in self.broken:
            raise OSError(errno.EIO, f"at {offset}")
        buffer[:] = (offset // BLOCK).to_bytes(4, "big") * (len(buffer) // 4)


def buffer_of(blocks: int = 1) -> memoryview:
    return memoryview(bytearray(blocks * BLOCK))


def test_all_reads_of_one_turn_are_in_flight_together() -> None:
    async def scenario() -> None:
        file = SlowFile(64)
        file.broken = {5 * BLOCK, 17 * BLOCK}
        with ThreadPoolExecutor(64) as pool:
            reads = ColdReads(pool.submit)
            buffers = [buffer_of() for _ in range(64)]
            done = [reads.read([(file, n * BLOCK, buffer)]) for n, buffer in enumerate(buffers)]
            results = await asyncio.gather(*done, return_exceptions=True)
        for n, (result, buffer) in enumerate(zip(results, buffers, strict=True)):
            if n * BLOCK in file.broken:
                assert isinstance(result, OSError)
                assert result.errno == errno.EIO
            else:
                assert result is None
                assert bytes(buffer) == n.to_bytes(4, "big") * (BLOCK // 4)

    run(scenario())


def test_the_parts_of_one_read_are_in_flight_together() -> None:
    async def scenario() -> None:
        file = SlowFile(32)
        with ThreadPoolExecutor(1) as pool:
            reads = ColdReads(pool.submit)
            whole = buffer_of(32)
            parts = [(file, 2 * n * BLOCK, whole[n * BLOCK : (n + 1) * BLOCK]) for n in range(32)]
            await reads.read(parts)
        assert sorted(file.asked) == [(2 * n * BLOCK, BLOCK) for n in range(32)]
        assert bytes(whole) == b"".join(
            (2 * n).to_bytes(4, "big") * (BLOCK // 4) for n in range(32)
        )

    run(scenario())


def test_long_reads_are_not_tried_again_on_the_loop() -> None:
    async def scenario() -> None:
        for blocks in (1, 17):
            file = SlowFile(0)
            file._all.set()
            with ThreadPoolExecutor(1) as pool:
                await ColdReads(pool.submit).read([(file, 0, buffer_of(blocks))])
            names = {name for _, name in file.tried}
            assert (threading.current_thread().name in names) is (blocks == 1)

    run(scenario())


def evict(data: Path) -> None:
    """Out of the page cache; what is dirty must be synced before."""
    for path in data.glob("layers/*/data-*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


async def read_all(handle: Handle, offsets: list[int], length: int) -> list[bytes]:
    async def one(offset: int) -> bytes:
        buffer = memoryview(bytearray(length))
        if not handle.try_read(offset, buffer):
            await handle.read(offset, buffer)
        return bytes(buffer)

    return await asyncio.gather(*map(one, offsets))


def test_cold_files_are_read_right_with_many_in_flight(tmp_path: Path) -> None:
    async def scenario() -> None:
        content = bytearray(BLOCKS * BLOCK)
        choice = random.Random(1)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue.create_volume("v", BLOCKS * BLOCK)
        handle = await catalogue.open_volume("v", lambda: None)
        for layer in range(4):
            for block in range(BLOCKS):
                if choice.random() < 0.3:
                    data = choice.randbytes(BLOCK)
                    await handle.write(block * BLOCK, data)
                    content[block * BLOCK : (block + 1) * BLOCK] = data
            await handle.flush()
            await catalogue.create_snapshots([("v", f"s{layer}")])
        for _ in range(4):
            evict(tmp_path)
            for length in (512, BLOCK, 5 * BLOCK, 64 * BLOCK):
                offsets = [choice.randrange(0, BLOCKS * BLOCK - length, 512) for _ in range(100)]
                for offset, found in zip(
                    offsets, await read_all(handle, offsets, length), strict=True
                ):
                    assert found == content[offset : offset + length]
        await catalogue.close_export(handle)
        await catalogue.close()

    run(scenario())


def test_a_file_that_is_cut_short_fails_only_the_reads_behind_its_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        data = LocalDataFile(tmp_path, writable=True)
        data.write(0, os.urandom(8 * BLOCK))
        with ThreadPoolExecutor(2) as pool:
            reads = ColdReads(pool.submit)
            results = await asyncio.gather(
                *(reads.read([(data, n * BLOCK, buffer_of())]) for n in range(12)),
                return_exceptions=True,
            )
        assert [isinstance(result, OSError) for result in results] == [False] * 8 + [True] * 4
        data.close()

    run(scenario())
