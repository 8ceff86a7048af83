"""The extent log: what goes in comes out, and no damage goes unseen."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import given, settings

from backends.errors import CorruptError
from snapshots.examining import Nothing
from snapshots.extent_log import (
    EXTENTS_PER_SECTOR,
    INDEX,
    JOURNAL,
    MERGE,
    SECTOR,
    LogState,
    Run,
    encode_extents,
    encode_header,
    encode_log,
    read_log,
)
from snapshots.owner_map import DATA, ZERO, OwnerMap

BLOCKS = 4000
LAYER = "0123456789abcdef"
WHERE = "layers/0123456789abcdef/journal"
steps = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 25), st.sampled_from([DATA, ZERO])), max_size=90
)


def runs_from(steps: list[tuple[int, int, int]]) -> list[Run]:
    runs: list[Run] = []
    position = 0
    for gap, length, kind in steps:
        first = position + gap
        if runs and runs[-1][1] == first and runs[-1][2] == kind:
            first += 1
        runs.append((first, first + length, kind))
        position = first + length
    return runs


def read(content: bytes, log: str, layer: str = LAYER) -> tuple[list[Run], LogState]:
    into = OwnerMap(BLOCKS)
    try:
        state = read_log(content, layer, log, into, WHERE)
        return list(into.runs(0, BLOCKS)), state
    finally:
        into.close()


def refused(content: bytes, log: str, offset: int | None = None) -> None:
    with pytest.raises(CorruptError) as caught:
        read(content, log)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert "offset" in str(caught.value)
    if offset is not None:
        assert f"offset {offset}" in str(caught.value)


def journal(batches: list[list[Run]], reserved: int = 0) -> bytes:
    """A journal to which each batch was appended and synced."""
    content = encode_header(LAYER, JOURNAL)
    for batch in batches:
        content += b"".join(encode_extents(LAYER, batch, len(content) // SECTOR - 1))
    return content + bytes(reserved)


def sector(payload: Any, layer: str = LAYER) -> bytes:
    """A sector with a valid check around any payload at all."""
    body = payload if isinstance(payload, bytes) else msgpack.packb(payload)
    tail = struct.pack("<H", len(body)) + body
    tail += bytes(SECTOR - 4 - len(tail))
    return struct.pack("<I", zlib.crc32(tail, zlib.crc32(layer.encode()))) + tail


def many(count: int) -> list[Run]:
    return [(7 * i, 7 * i + 3, DATA if i % 3 else ZERO) for i in range(count)]


@settings(max_examples=150, deadline=None)
@given(steps)
def test_an_index_says_what_was_put_into_it(steps: list[tuple[int, int, int]]) -> None:
    runs = runs_from(steps)
    content, sequence = encode_log(LAYER, INDEX, runs, sealed=True)
    found, state = read(content, INDEX)
    assert found == runs
    assert state == LogState(sequence, len(content), False, len(content))


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=5), st.integers(1, 3))
def test_a_journal_says_what_its_batches_say_the_later_over_the_earlier(
    batches: list[list[tuple[int, int, int]]], reserved: int
) -> None:
    model = bytearray(BLOCKS)
    for batch in batches:
        for first, last, kind in runs_from(batch):
            model[first:last] = bytes([kind]) * (last - first)
    content = journal([runs_from(batch) for batch in batches])
    into = OwnerMap(BLOCKS)
    state = read_log(content + bytes(reserved * SECTOR), LAYER, JOURNAL, into, WHERE)
    assert into.raw[:] == model
    assert (state.end, state.ragged) == (len(content), False)
    assert state.sequence == len(content) // SECTOR - 1
    into.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 2**32 // 400), min_size=1, max_size=190))
def test_a_sector_takes_the_extents_that_are_counted_on(gaps: list[int]) -> None:
    runs = []
    position = 0
    for gap in gaps:
        runs.append((position + gap, position + gap + gap, DATA))
        position += 2 * gap
    sectors = list(encode_extents(LAYER, runs, 2**40))
    assert all(len(found) == SECTOR for found in sectors)
    assert len(sectors) <= -(-len(runs) // EXTENTS_PER_SECTOR)


def test_the_largest_volume_whole() -> None:
    blocks = 1 << 32
    assert len(list(encode_extents(LAYER, [(0, blocks, ZERO)], 0))) == 1
    with pytest.raises(CorruptError, match="malformed sector at offset 512"):
        content, _ = encode_log(LAYER, JOURNAL, [(0, blocks, ZERO)], sealed=False)
        read(content, JOURNAL)


@pytest.mark.parametrize("log", [INDEX, JOURNAL, MERGE])
def test_every_flipped_byte_is_refused(log: str) -> None:
    content, _ = encode_log(LAYER, log, many(500), sealed=log == INDEX)
    assert len(content) > 3 * SECTOR
    if log != INDEX:
        content += bytes(3 * SECTOR)
    read(content, log)
    for position in range(len(content)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= mask
            at = 0 if position < SECTOR else position // SECTOR * SECTOR
            refused(bytes(damaged), log, at)


def test_an_index_cut_short_or_followed_by_anything_is_refused() -> None:
    content, _ = encode_log(LAYER, INDEX, many(500), sealed=True)
    for end in range(0, len(content), SECTOR):
        refused(content[:end], INDEX)
        if end:
            refused(content[: end + 100], INDEX)
    refused(content + bytes(SECTOR), INDEX)
    refused(content + content[SECTOR : 2 * SECTOR], INDEX)


@pytest.mark.parametrize("log", [JOURNAL, MERGE])
def test_a_journal_cut_short_is_refused_unless_only_reserved_zeroes_are_gone(log: str) -> None:
    content, sequence = encode_log(LAYER, log, many(500), sealed=False)
    end = len(content)
    assert end == (sequence + 1) * SECTOR > 4 * SECTOR
    content += bytes(3 * SECTOR)
    for cut in {*range(0, len(content), 100), *range(0, len(content), SECTOR), end + SECTOR - 1}:
        if cut < end + SECTOR:
            refused(content[:cut], log)
        else:
            assert read(content[:cut], log) == (many(500), LogState(sequence, end, False, cut))


@pytest.mark.parametrize("log", [JOURNAL, MERGE])
def test_a_log_that_ends_in_a_mark_loses_no_sector_unseen(log: str) -> None:
    for runs in (many(1), many(500)):
        content, sequence = encode_log(LAYER, log, runs, sealed=False)
        content += bytes(SECTOR)
        _, state = read(content, log)
        assert state.marked
        mark = sequence * SECTOR
        for offset in range(SECTOR, mark, SECTOR):
            damaged = content[:offset] + bytes(SECTOR) + content[offset + SECTOR :]
            refused(damaged, log, offset)
        # The mark itself says nothing of the layer.
        found, state = read(content[:mark] + bytes(2 * SECTOR), log)
        assert found == runs
        assert not state.marked
    content, sequence = encode_log(LAYER, log, [], sealed=False)
    assert (content, sequence) == (encode_header(LAYER, log), 0)


def test_a_lost_sector_that_was_synced_is_refused() -> None:
    content = journal([[run] for run in many(12)], 2 * SECTOR)
    last = 12 * SECTOR
    for offset in range(SECTOR, last, SECTOR):
        damaged = content[:offset] + bytes(SECTOR) + content[offset + SECTOR :]
        refused(damaged, JOURNAL, offset)
    # The last one may never have been synced: nothing says that it was.
    found, state = read(content[:last] + bytes(3 * SECTOR), JOURNAL)
    assert found == many(11)
    assert not state.ragged
    # The header is always there.
    refused(bytes(SECTOR) + content[SECTOR:], JOURNAL, 0)


def test_unsynced_sectors_behind_a_gap_are_ignored_and_reported() -> None:
    synced = many(5)
    content = journal([synced])
    batch = list(encode_extents(LAYER, [(2000 + 2 * i, 2001 + 2 * i, DATA) for i in range(800)], 1))
    assert len(batch) >= 3
    torn = content + bytes(SECTOR) + b"".join(batch[1:]) + bytes(SECTOR)
    found, state = read(torn, JOURNAL)
    assert found == synced
    assert state == LogState(1, len(content), True, len(torn))
    # A part of the batch in front of the gap was written whole: it counts.
    _, state = read(content + batch[0] + bytes(SECTOR) + batch[2], JOURNAL)
    assert (state.sequence, state.ragged, state.marked) == (2, True, False)
    # An index is written whole before it gets its name: nothing may be missing from it.
    index, _ = encode_log(LAYER, INDEX, many(500), sealed=True)
    refused(index[:SECTOR] + bytes(SECTOR) + index[2 * SECTOR :], INDEX, SECTOR)


def test_sectors_of_other_layers_and_logs_are_refused() -> None:
    other = "fedcba9876543210"
    content = journal([many(3)])
    (foreign,) = encode_extents(other, many(3), 1)
    refused(content + foreign, JOURNAL, 2 * SECTOR)
    refused(content + bytes(SECTOR) + foreign, JOURNAL, 3 * SECTOR)
    refused(content, MERGE, 0)
    refused(content, JOURNAL, len(content))
    refused(encode_header(other, JOURNAL), JOURNAL, 0)
    # A stale sector of the layer's own, with the wrong number.
    (stale,) = encode_extents(LAYER, many(3), 0)
    refused(content + stale, JOURNAL, 2 * SECTOR)
    (later,) = encode_extents(LAYER, many(3), 2)
    refused(content + later, JOURNAL, 2 * SECTOR)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x94\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xffabc",
        b"\x81" * 400,
        b"\x91" * 500,
        b"\x01\x02",
        [],
        {},
        None,
        [1],
        [1, 0],
        [1, 0, []],
        ["1", 0, [], []],
        [1, 0, [5], []],
        [1, 0, [0, 0], []],
        [1, 0, [0, -1], []],
        [1, 0, [-1, 5], []],
        [1, 0, [BLOCKS, 1], []],
        [1, 0, [0, BLOCKS + 1], []],
        [1, 0, [0, 2**64 - 1], []],
        [1, 0, [0.5, 1], []],
        [1, 0, ["a", "b"], []],
        [1, 0, [[], []], []],
        [1, 0, {"a": 1}, []],
        [1, 0, b"\x00\x05", []],
        [1, 0, "ab", []],
        [1, 0, None, []],
        [1, 0, [0, 5], [5]],
        [1, 0, [0, 5], [], 2],
        [1, 0, [0, 5], [], None],
        [2, 0, [0, 5], []],
        [0, 0, [0, 5], []],
    ],
)
def test_hostile_payloads_with_a_valid_check_are_refused(payload: Any) -> None:
    found = sector(payload)
    refused(encode_header(LAYER, JOURNAL) + found, JOURNAL, SECTOR)
    refused(encode_header(LAYER, INDEX) + found, INDEX)
    refused(found, JOURNAL, 0)


@pytest.mark.parametrize("payload", [b"\xc1", [], [9], [9, None], [9, "x", [], []], {}])
def test_hostile_payloads_behind_a_gap_are_refused(payload: Any) -> None:
    refused(journal([many(2)]) + bytes(SECTOR) + sector(payload), JOURNAL, 3 * SECTOR)


@pytest.mark.parametrize("header", [[2, LAYER, JOURNAL], [1, LAYER], [1], [], [1, JOURNAL, LAYER]])
def test_headers_of_other_formats_are_refused(header: list[Any]) -> None:
    refused(sector(header), JOURNAL, 0)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3 * SECTOR), st.sampled_from([INDEX, JOURNAL, MERGE]))
def test_no_bytes_at_all_raise_anything_else(content: bytes, log: str) -> None:
    header = encode_header(LAYER, log)
    for found in (content, header + content, header + sector(content[:400])):
        try:
            read(found, log)
        except CorruptError as error:
            assert str(error).startswith(WHERE)


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 3 << 28)), max_size=12),
        max_size=6,
    )
)
def test_where_data_ends_in_each_tib(batches: list[list[tuple[int, int]]]) -> None:
    blocks = 1 << 32
    content = encode_header(LAYER, JOURNAL)
    expected: dict[int, int] = {}
    for batch in batches:
        runs = []
        position = 0
        for number, (gap, length) in enumerate(batch):
            first, position = position + gap, position + gap + length
            if position <= blocks:
                runs.append((first, position, ZERO if number % 3 == 2 else DATA))
        for first, last, kind in runs:
            for row in range(first >> 28, ((last - 1) >> 28) + 1) if kind == DATA else ():
                expected[row] = max(expected.get(row, 0), min(last, (row + 1) << 28))
        sequence = len(content) // SECTOR - 1
        content += b"".join(encode_extents(LAYER, runs, sequence))
    state = read_log(content + bytes(SECTOR), LAYER, JOURNAL, Nothing(blocks), WHERE)
    assert state.data_ends == expected
