"""The layer store contract, run over every store."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from backends.errors import InUseError, NotFoundError
from backends.layers import LayerStore
from backends.local_layers import LocalLayerStore
from backends.memory_layers import MemoryLayerStore

T = TypeVar("T")
BLOCK = 4096


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LayerStore:
    found: LayerStore
    found = LocalLayerStore(tmp_path / "data") if request.param == "local" else MemoryLayerStore()
    asyncio.run(found.lock())
    return found


def run(operation: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(operation)


def test_layers_come_and_go(store: LayerStore) -> None:
    async def scenario() -> None:
        assert await store.list_layers() == []
        for layer in ("b", "a"):
            await store.create_layer(layer)
        assert await store.list_layers() == ["a", "b"]
        await store.create_log("a", "journal", b"x" * 10_000)
        await store.delete_layer("a")
        await store.delete_layer("a")
        assert await store.list_layers() == ["b"]
        assert await store.read_log("a", "journal") is None
        assert not await store.has_log("a", "journal")
        await store.delete_log("a", "journal")
        with pytest.raises(NotFoundError):
            await store.open_data("a", writable=True)

    run(scenario())


def test_data_reads_as_it_was_written_and_zeroes_elsewhere(store: LayerStore) -> None:
    async def scenario() -> None:
        await store.create_layer("a")
        data = await store.open_data("a", writable=True)
        data.write(3 * BLOCK, b"\1" * (4 * BLOCK))
        data.write(5 * BLOCK + 100, b"\2" * 50)
        data.write_zeroes(4 * BLOCK, BLOCK)
        data.punch(6 * BLOCK, BLOCK)
        data.punch(100 * BLOCK, BLOCK)
        data.cache(0, 10 * BLOCK)
        data.sync()
        expected = bytearray(b"\1" * (4 * BLOCK))
        expected[2 * BLOCK + 100 : 2 * BLOCK + 150] = b"\2" * 50
        expected[BLOCK : 2 * BLOCK] = bytes(BLOCK)
        expected[3 * BLOCK :] = bytes(BLOCK)
        for _ in range(2):
            buffer = bytearray(4 * BLOCK)
            data.read(3 * BLOCK, memoryview(buffer))
            assert buffer == expected
            buffer = bytearray(b"\xff" * 100)
            data.read(5 * BLOCK + 75, memoryview(buffer))
            assert buffer == expected[2 * BLOCK + 75 : 2 * BLOCK + 175]
            # After a read of the same pages, nothing keeps it from being done at once.
            buffer = bytearray(4 * BLOCK)
            assert data.try_read(3 * BLOCK, memoryview(buffer))
            assert buffer == expected
            assert data.allocated() == 3 * BLOCK
            data.close()
            data = await store.open_data("a", writable=True)
        data.close()
        assert await store.allocated("a") >= 3 * BLOCK

    run(scenario())


def test_logs_grow_at_their_end_into_what_was_reserved(store: LayerStore) -> None:
    async def scenario() -> None:
        await store.create_layer("a")
        assert await store.read_log("a", "journal") is None
        await store.create_log("a", "journal", b"head")
        log = await store.open_log("a", "journal", 4)
        log.append(b"one")
        log.reserve(1000)
        log.reserve(10)
        log.append(b"two")
        log.sync()
        log.close()
        content = await store.read_log("a", "journal")
        assert content is not None and content.rstrip(b"\0") == b"headonetwo"
        assert len(content) >= 1007
        # A torn tail is left behind by opening where it begins.
        log = await store.open_log("a", "journal", 7)
        log.append(b"2")
        log.close()
        content = await store.read_log("a", "journal")
        assert content is not None and content[:10] == b"headone2wo"
        await store.create_log("a", "journal", b"new")
        assert await store.read_log("a", "journal") == b"new"
        assert await store.has_log("a", "journal")
        await store.delete_log("a", "journal")
        await store.delete_log("a", "journal")
        assert not await store.has_log("a", "journal")
        assert "a" in store.describe("a", "journal") and "journal" in store.describe("a", "journal")

    run(scenario())


def test_records_are_replaced_whole(store: LayerStore) -> None:
    async def scenario() -> None:
        assert await store.list_records("volumes") == []
        with pytest.raises(NotFoundError):
            await store.read_record("volumes", "x")
        await store.commit_record("volumes", "x", b"old")
        await store.commit_record("volumes", "x", b"newer")
        await store.commit_record("merges", "x", b"other")
        await store.commit_record("volumes", "w", b"")
        assert await store.read_record("volumes", "x") == b"newer"
        assert await store.list_records("volumes") == ["w", "x"]
        assert await store.list_records("merges") == ["x"]
        await store.delete_record("volumes", "x")
        await store.delete_record("volumes", "x")
        assert await store.list_records("volumes") == ["w"]
        assert await store.read_record("merges", "x") == b"other"

    run(scenario())


def test_the_lock_has_one_holder(store: LayerStore) -> None:
    async def scenario() -> None:
        other = LocalLayerStore(store.path) if isinstance(store, LocalLayerStore) else store
        with pytest.raises(InUseError):
            await other.lock()
        await store.unlock()
        await store.unlock()
        await other.lock()
        await other.unlock()
        await store.lock()
        space = await store.space()
        assert 0 < space.free <= space.total
        await store.keep_reserve()
        await store.release_reserve()
        assert not await store.release_reserve()

    run(scenario())


def test_claims(tmp_path: Path) -> None:
    async def scenario() -> None:
        store, other = LocalLayerStore(tmp_path), LocalLayerStore(tmp_path)
        await store.lock()
        await store.create_layer("a")
        first, second = await store.pin_layer("a"), await other.pin_layer("a")
        assert await store.claim_layer("a") is None
        first.release()
        first.release()
        assert await store.claim_layer("a") is None
        second.release()
        claim = await store.claim_layer("a")
        assert claim is not None
        with pytest.raises(InUseError, match="is being merged"):
            await other.pin_layer("a")
        claim.release()
        (await other.pin_layer("a")).release()
        for operation in (store.pin_layer, store.claim_layer):
            with pytest.raises(NotFoundError):
                await operation("gone")

    run(scenario())


def test_leftovers_of_a_crash_are_no_layers_and_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = LocalLayerStore(tmp_path)
        await store.lock()
        await store.create_layer("a")
        (tmp_path / "layers" / ".new-b").mkdir()
        (tmp_path / "layers" / ".new-b" / "data-00000").write_bytes(b"x")
        (tmp_path / "layers" / "a" / ".new-journal-1").write_bytes(b"x")
        (tmp_path / "volumes" / ".new-v-1").write_bytes(b"x")
        assert await store.list_layers() == ["a"]
        assert await store.list_records("volumes") == []
        await store.unlock()
        await store.lock()
        assert not list(tmp_path.rglob(".new-*"))
        assert await store.list_layers() == ["a"]

    run(scenario())


def test_a_layer_can_be_measured_while_its_logs_are_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = LocalLayerStore(tmp_path)
        await store.lock()
        await store.create_layer("a")

        async def replace() -> None:
            for _ in range(60):
                await store.create_log("a", "journal", b"x" * BLOCK)
                await store.delete_log("a", "journal")

        replacing = asyncio.create_task(replace())
        while not replacing.done():
            assert await store.allocated("a") >= 0
        await replacing

    run(scenario())


def test_what_uses_space_is_found(store: LayerStore) -> None:
    async def scenario() -> None:
        await store.create_layer("a")
        data = await store.open_data("a", writable=True)
        assert data.allocated_ranges(0, 1 << 50, 10) == []
        tebibyte = 1 << 40
        places = [16 * BLOCK, 64 * BLOCK, tebibyte - 16 * BLOCK, tebibyte + 64 * BLOCK]
        for place in places:
            data.write(place, b"\1" * (16 * BLOCK))
        data.write_zeroes(32 * BLOCK, 16 * BLOCK)
        data.sync()

        def find(offset: int, length: int, limit: int) -> set[int]:
            ranges = data.allocated_ranges(offset, length, limit)
            assert len(ranges) <= limit
            position = offset
            for start, size in ranges:
                assert position <= start < start + size <= offset + length
                position = start + size
            return {
                block
                for start, size in ranges
                for block in range(start // BLOCK, (start + size) // BLOCK)
            }

        def blocks(place: int) -> set[int]:
            return set(range(place // BLOCK, place // BLOCK + 16))

        everything = blocks(32 * BLOCK).union(*map(blocks, places))
        assert find(0, 2 * tebibyte, 100) == everything
        assert find(0, 2 * tebibyte, 1) <= blocks(16 * BLOCK) | blocks(32 * BLOCK)
        assert find(20 * BLOCK, 14 * BLOCK, 100) == set(range(20, 34)) & everything
        assert find(48 * BLOCK, 16 * BLOCK, 100) == set()
        assert find(tebibyte - BLOCK, 128 * BLOCK, 100) == {
            block for block in everything if block >= tebibyte // BLOCK - 1
        }
        data.punch(0, 2 * tebibyte)
        assert find(0, 2 * tebibyte, 100) == set()
        data.close()

    run(scenario())
