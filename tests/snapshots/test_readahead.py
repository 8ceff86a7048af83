"""What is asked for ahead of reads that miss the page cache."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from backends.memory_layers import MemoryDataFile, MemoryLayerStore
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.readahead import FIRST, LONGEST, STREAMS, Readahead

MIB = 1 << 20
BLOCK = 4096


def test_one_read_is_no_stream() -> None:
    assert Readahead().missed(0, MIB) is None


def test_a_stream_grows_and_every_byte_is_asked_for_once() -> None:
    ahead = Readahead()
    assert ahead.missed(0, MIB) is None
    asked = [ahead.missed(MIB, MIB)]
    assert asked[0] == (2 * MIB, FIRST)
    while len(asked) < 8:
        last = asked[-1]
        assert last is not None
        asked.append(ahead.missed(sum(last), 128 << 10))  # the first byte that was not asked for
    windows = [found[1] for found in asked if found]
    assert windows == [min(FIRST << n, LONGEST) for n in range(8)]
    for before, after in pairwise(asked):
        assert before is not None and after is not None
        assert after[0] >= sum(before)


def test_jumps_ask_for_nothing() -> None:
    ahead = Readahead()
    for turn in range(100):
        assert ahead.missed(turn * 64 * MIB, MIB) is None


def test_reads_of_a_stream_may_come_out_of_order_and_late() -> None:
    ahead = Readahead()
    ahead.missed(0, MIB)
    first = ahead.missed(MIB, MIB)
    assert first is not None
    second = ahead.missed(sum(first), MIB)
    assert second is not None
    assert ahead.missed(second[0], 4096) is None  # is on its way already
    assert ahead.missed(sum(second) - 4096, 4096) is not None  # soon over: go on


def test_several_streams_at_once_but_not_any_number() -> None:
    ahead = Readahead()
    starts = [n << 33 for n in range(STREAMS)]
    for start in starts:
        assert ahead.missed(start, MIB) is None
    for start in starts:
        assert ahead.missed(start + MIB, MIB) == (start + 2 * MIB, FIRST)
    for number in range(10 * STREAMS):
        ahead.missed((1 << 40) + (number << 33), 4096)
    assert len(ahead._streams) == STREAMS
    assert ahead.missed(starts[0] + 2 * MIB + FIRST, MIB) is None


def test_a_view_asks_the_layers_that_a_stream_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead: list[int] = []
    behind = 0  # where the read under way ends: its own parts are asked for as well
    monkeypatch.setattr(MemoryDataFile, "try_read", lambda self, offset, buffer: False)

    def cache(self: MemoryDataFile, offset: int, length: int) -> None:
        assert (offset % (64 << 10), length) == (0, 64 << 10)
        if offset >= behind:
            ahead.append(offset)

    monkeypatch.setattr(MemoryDataFile, "cache", cache)

    async def scenario() -> None:
        nonlocal behind
        catalogue = await Catalogue.open(MemoryLayerStore())
        await catalogue.create_volume("v", 16 * MIB)
        handle = await catalogue.open_volume("v", lambda: None)
        assert isinstance(handle, Handle)
        await handle.write(0, b"a" * (4 * MIB))
        await catalogue.create_snapshots([("v", "s")])
        for first in range(0, 4 * MIB, 128 << 10):  # every second 64 KiB in the upper layer
            await handle.write(first, b"b" * (64 << 10))
        expected = (b"b" * (64 << 10) + b"a" * (64 << 10)) * 32
        for start in range(0, 4 * MIB, 256 << 10):
            buffer = bytearray(256 << 10)
            behind = start + len(buffer)
            await handle.read(start, memoryview(buffer))
            assert buffer == expected[start : start + len(buffer)]
        await handle.view.reads_before_now()
        assert sorted(ahead) == list(range(512 << 10, 4 * MIB, 64 << 10))
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def test_within_one_layer_the_kernel_reads_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryDataFile, "try_read", lambda self, offset, buffer: False)
    asked: list[int] = []
    monkeypatch.setattr(MemoryDataFile, "cache", lambda self, offset, length: asked.append(offset))

    async def scenario() -> None:
        catalogue = await Catalogue.open(MemoryLayerStore())
        await catalogue.create_volume("v", 16 * MIB)
        handle = await catalogue.open_volume("v", lambda: None)
        await handle.write(0, b"a" * (4 * MIB))  # type: ignore[attr-defined]
        for start in range(0, 4 * MIB, 256 << 10):
            await handle.read(start, memoryview(bytearray(256 << 10)))  # type: ignore[attr-defined]
        assert not asked
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())
