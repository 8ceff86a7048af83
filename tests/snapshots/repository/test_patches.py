"""Patches: of a chunk that changed a little only the changed blocks are stored.

The oracle is the content of each snapshot, and what the pages say is counted by hand.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backends.errors import CorruptError, InvalidError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store, packing, repacking
from snapshots.repository.chunk_reader import ChunkReader
from snapshots.repository.envelope import digest_of
from snapshots.repository.layout import PAGE_ENTRIES, segment_key
from snapshots.repository.pages import Entry, Page, PageRef, Patch, decode_page, encode_page
from snapshots.repository.reading import plan_ranges, read_page
from snapshots.repository.regions import ChangedBlocks
from snapshots.repository.roots import find_root
from snapshots.repository.segments import (
    PackedChunk,
    apply_patch,
    digest_chunk,
    digest_patch,
    pack_patch,
    patch_block,
    unpack_patch,
)
from tests.snapshots.repository.model import BLOCK, FaultyStore, ModelSource, ModelVolume
from tests.snapshots.repository.test_repository import restored

CHUNK = 16 * BLOCK


@pytest.fixture(autouse=True)
def larger_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SEGMENT_TARGET", 16 << 20)


@pytest.fixture
def disk() -> ModelVolume:
    """Forty chunks, all of them random."""
    disk = ModelVolume("disk", 40 * CHUNK)
    disk.data[:] = random.Random(1).randbytes(len(disk.data))
    return disk


def change(disk: ModelVolume, *blocks: int, seed: int = 7) -> None:
    dice = random.Random(seed)
    for block in blocks:
        disk.data[block * BLOCK : (block + 1) * BLOCK] = dice.randbytes(BLOCK)


def entries(repository: Repository, snapshot: str) -> Iterator[Entry]:
    """Those of all chunks that are no holes, in order."""
    push = repository.find("disk", snapshot).push
    for ref in find_root(repository.store, repository.config, push).table:
        for entry in read_page(repository.store, repository.config.chunk_size, ref):
            if entry is not None:
                yield entry


def by_chunk_reader(repository: Repository, source: ModelSource) -> bytes:
    """The content by the reader of lazy volumes, each chunk alone and in ranges."""
    chunk_size = repository.config.chunk_size
    root = find_root(
        repository.store, repository.config, repository.find("disk", source.snapshot).push
    )
    reader = ChunkReader(repository.store, repository.config, root)
    content = bytearray(source.size)
    wanted = []
    for chunk in range(-(-source.size // chunk_size)):
        entry = reader.page(chunk // PAGE_ENTRIES)[chunk % PAGE_ENTRIES]
        if entry is not None:
            wanted.append((chunk, entry))
    for planned in plan_ranges(wanted):
        fetched = reader.fetch(planned)
        for part in planned.parts:
            plain = reader.unpack(planned, fetched, part)
            assert reader.fetch_alone(part) == plain
            content[part.chunk * chunk_size : part.chunk * chunk_size + len(plain)] = plain
    return bytes(content)


def test_scattered_writes_cost_what_changed(disk: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.snapshot("one"))
    change(disk, *range(3, 640, 16))
    two = disk.snapshot("two")
    report = repository.push(two)
    assert report.changed == 40 * BLOCK
    assert report.uploaded < 1.1 * 40 * BLOCK + 20_000
    assert restored(repository, two) == two.content == by_chunk_reader(repository, two)
    summary = repository.find("disk", "two")
    assert summary.stored == sum(entry.stored for entry in entries(repository, "two"))
    assert repository.verify(deep=True).damaged == []


def test_there_is_one_patch_at_most_and_it_is_no_larger_than_half(disk: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.snapshot("s0"))
    original = [entry.base for entry in entries(repository, "s0")]
    for number in range(1, 10):
        # A new block of the first chunk, and always the same of the third.
        change(disk, 2 * number - 1 if number <= 8 else 0, 32, seed=number)
        source = disk.snapshot(f"s{number}")
        report = repository.push(source)
        found = list(entries(repository, source.snapshot))
        assert restored(repository, source) == source.content
        first, third = found[0], found[2]
        assert third.patch is not None
        assert third.patch.mask == 1
        if number <= 8:
            assert first.patch is not None
            assert first.patch.mask == sum(1 << 2 * block + 1 for block in range(number))
            assert first.base == original[0]
            assert report.changed == (number + 1) * BLOCK
        else:  # more than half of its blocks: it is whole again
            assert first.patch is None
            assert first.base != original[0]
    for source in disk.taken:
        assert restored(repository, source) == source.content


def test_what_goes_back_needs_nothing_new(disk: ModelVolume) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.snapshot("one"))
    before = bytes(disk.data)
    change(disk, 5)
    repository.push(disk.snapshot("two"))
    disk.data[:] = before
    report = repository.push(disk.snapshot("three"))
    assert (report.segments, report.pages) == (0, 1)
    assert list(entries(repository, "three")) == list(entries(repository, "one"))
    # Written again with what it had: nothing has changed.
    four = disk.snapshot("four")
    four.changed_extents = lambda since: [(0, 40 * CHUNK)]  # type: ignore[method-assign]
    assert repository.push(four).changed == 0


@pytest.mark.parametrize("size", [40 * CHUNK + 5 * BLOCK, 39 * CHUNK + BLOCK, 45 * CHUNK])
def test_a_volume_that_was_resized(disk: ModelVolume, size: int) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    disk.data = disk.data[: 39 * CHUNK + 3 * BLOCK]
    repository.push(disk.snapshot("one"))
    for number in range(3):
        disk.data = (disk.data + bytes(size))[: size + number * BLOCK]
        change(disk, 39 * 16, 38 * 16 + number, seed=number)
        disk.data = disk.data[: size + number * BLOCK]
        source = disk.snapshot(f"s{number}")
        repository.push(source)
        assert restored(repository, source) == source.content


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    chunk_size=st.sampled_from([BLOCK, 2 * BLOCK, CHUNK, 1 << 19, 1 << 20]),
    size=st.integers(1, 3 * 16 + 3).map(lambda blocks: blocks * BLOCK),
    writes=st.lists(
        st.lists(
            st.tuples(st.integers(0, 3 * CHUNK), st.integers(1, 9000), st.integers(0, 3)),
            max_size=6,
        ),
        min_size=1,
        max_size=6,
    ),
    deleted=st.sets(st.integers(0, 5)),
)
@example(CHUNK, CHUNK, [[(0, 1, 1)], [(4096, 1, 1)], [(0, 1, 2)]], {0, 1})
def test_any_writes(
    chunk_size: int, size: int, writes: list[list[tuple[int, int, int]]], deleted: set[int]
) -> None:
    repository = init_in_store(MemoryObjectStore(), chunk_size)
    disk = ModelVolume("disk", size)
    disk.data[: size // 2] = random.Random(size).randbytes(size // 2)
    for number, places in enumerate(writes):
        for offset, length, value in places:
            end = min(offset + length, size)
            if offset < end:
                disk.data[offset:end] = bytes([value]) * (end - offset)
        source = disk.snapshot(f"s{number}")
        repository.push(source)
        assert by_chunk_reader(repository, source) == source.content
    for number in deleted & set(range(len(writes) - 1)):
        repository.delete("disk", f"s{number}")
    repository.collect()
    repository.collect()
    assert repository.verify(deep=True).damaged == []
    left = [source for number, source in enumerate(disk.taken[:-1]) if number not in deleted]
    for source in [*left, disk.taken[-1]]:
        assert restored(repository, source) == source.content


def test_a_killed_push_of_patches_is_gone_on_with(
    disk: ModelVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SEGMENT_TARGET", 40_000)
    store = FaultyStore()
    repository = init_in_store(store, CHUNK)
    repository.push(disk.snapshot("one"))
    change(disk, *range(3, 640, 16))
    two = disk.snapshot("two")
    store.puts, store.fail_at = 0, 5
    with pytest.raises(Exception, match="forced"):
        repository.push(two)
    store.fail_at = None
    there = sum(
        size
        for key, size in store.list("segments/")
        if repository.find("disk", "one").push not in key
    )
    report = repository.push(two)
    assert 0 < report.resumed <= there
    assert report.resumed > there - 3000
    assert report.changed == 40 * BLOCK
    assert restored(repository, two) == two.content
    assert repository.verify(deep=True).damaged == []


def with_few_patches_left(disk: ModelVolume) -> tuple[Repository, ModelSource]:
    """Three snapshots; the last one needs little of the first's bases and the second's patches."""
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    repository.push(disk.snapshot("one"))
    change(disk, *range(3, 640, 16))
    repository.push(disk.snapshot("two"))
    disk.data[4 * CHUNK :] = random.Random(2).randbytes(36 * CHUNK)
    three = disk.snapshot("three")
    repository.push(three)
    return repository, three


def test_base_and_patch_are_repacked_each_by_itself(
    disk: ModelVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repacking, "SPARSE", 0.5)
    monkeypatch.setattr(repacking, "WORTH", 0.5)
    repository, three = with_few_patches_left(disk)
    pieces = {piece[:2] for entry in entries(repository, "three") for piece in entry.pieces()}
    assert len(pieces) == 3
    for name in ("one", "two"):
        repository.delete("disk", name)
    assert repository.collect().repacked == 2
    assert repository.collect().freed > 30 * CHUNK
    moved = {piece[:2] for entry in entries(repository, "three") for piece in entry.pieces()}
    assert len(moved & pieces) == 1
    for read in (restored, by_chunk_reader):
        assert read(repository, three) == three.content
    assert repository.verify(deep=True).damaged == []


def test_a_reader_in_the_middle_finds_a_patch_that_moved(
    disk: ModelVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the patch has moved: the base, where the reader looks first, is where it was."""
    monkeypatch.setattr(repacking, "WORTH", 0.1)
    repository, three = with_few_patches_left(disk)
    repository.delete("disk", "two")
    push = repository.find("disk", "three").push
    reader = ChunkReader(
        repository.store, repository.config, find_root(repository.store, repository.config, push)
    )
    entry = reader.page(0)[0]
    assert entry is not None
    assert repository.collect().repacked == 1
    repository.collect()
    (planned,) = plan_ranges([(0, entry)])
    with pytest.raises(CorruptError, match="patch is missing"):
        reader.unpack(planned, reader.fetch(planned), planned.parts[0])
    monkeypatch.setattr("snapshots.repository.chunk_reader._LOOK_AGAIN", 0.0)
    assert reader.fetch_alone(planned.parts[0]) == three.content[:CHUNK]


@pytest.mark.parametrize("which", ["base", "patch"])
@pytest.mark.parametrize("how", ["flipped", "removed"])
def test_a_damaged_piece_harms_who_needs_it(disk: ModelVolume, which: str, how: str) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    one = disk.snapshot("one")
    repository.push(one)
    change(disk, 3)
    two = disk.snapshot("two")
    repository.push(two)
    base, patch = next(entries(repository, "two")).pieces()
    piece = base if which == "base" else patch
    key = segment_key(*piece[:2])
    if how == "removed":
        repository.store.delete(key)
    else:
        data = bytearray(repository.store.get(key, 1 << 30))
        data[piece.offset + 10] ^= 1
        repository.store.put(key, data)
    (damage,) = repository.verify(deep=True).damaged
    assert damage.key == key
    assert damage.snapshots == (["disk@one", "disk@two"] if which == "base" else ["disk@two"])
    with pytest.raises(CorruptError, match=key):
        restored(repository, two)
    if which == "patch":
        assert restored(repository, one) == one.content
    # It is noted: the next push stores the chunk anew, whole.
    change(disk, 600)
    three = disk.snapshot("three")
    assert repository.push(three).repaired == (
        40 * CHUNK if (which, how) == ("base", "removed") else CHUNK
    )
    assert restored(repository, three) == three.content


def page_of(*patched: tuple[int, Patch]) -> Page:
    page: Page = [None] * PAGE_ENTRIES
    for number, patch in patched:
        page[number] = Entry("ab" * 16, 0, 32, 100, 1, bytes(32), patch)
    return page


GOOD = Patch("cd" * 16, 1, 32, 50, 2, bytes(32), 5, bytes(32))


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        (GOOD._replace(mask=0), CorruptError),
        (GOOD._replace(mask=1 << 16), CorruptError),
        (GOOD._replace(offset=31), CorruptError),
        (GOOD._replace(length=0), CorruptError),
        (GOOD._replace(length=CHUNK + 1), CorruptError),
        (GOOD._replace(offset=2**32 - 1), CorruptError),
        (GOOD._replace(codec=7), InvalidError),
    ],
)
def test_a_page_whose_patch_cannot_be(patch: Patch, error: type[Exception]) -> None:
    def decode(page: Page) -> Page:
        record = encode_page(3, page)
        ref = PageRef(3, "ab" * 16, 0, 0, len(record), 1, 1, digest_of(record))
        return decode_page(record, ref, CHUNK, "here")

    good = page_of((0, GOOD), (1023, GOOD._replace(mask=0xFFFF)))
    assert decode(good) == good
    with pytest.raises(error, match=r"here: .*patch of entry 9"):
        decode(page_of((9, patch)))


def test_a_program_that_knows_no_patches_refuses_the_page() -> None:
    """The codec says so, for fields that are not known are ignored."""
    record = encode_page(0, page_of((0, GOOD)))
    body = record[56:]
    assert b"\x81" in body


@given(
    mask=st.integers(1, (1 << 16) - 1),
    length=st.integers(1, CHUNK),
    seed=st.integers(0, 99),
)
def test_a_patch_is_applied_block_by_block(mask: int, length: int, seed: int) -> None:
    dice = random.Random(seed)
    base, plain = dice.randbytes(length), dice.randbytes(length)
    should = bytearray(base)
    for block in range(16):
        if mask >> block & 1:
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            should[place] = plain[place]
    packed = pack_patch(plain, mask, BLOCK)
    stored = packed._replace(codec=packed.codec & 127)
    runs = unpack_patch(stored, mask, BLOCK, length, "here")
    assert apply_patch(base, runs, digest_chunk(should), "here") == should
    with pytest.raises(CorruptError, match="does not belong"):
        apply_patch(base, runs, digest_chunk(b"other"), "here")
    blocks = b"".join(content for _, content in runs)
    expected = hashlib.sha256(mask.to_bytes(8, "big") + blocks).digest()
    assert packed.digest == digest_patch(mask, blocks) == expected
    with pytest.raises(CorruptError, match="does not match"):
        unpack_patch(PackedChunk(1, blocks + b"x", packed.digest), mask, BLOCK, length, "here")


@given(
    extents=st.lists(st.tuples(st.integers(0, 4 * CHUNK), st.integers(1, CHUNK)), max_size=5),
    chunk_size=st.sampled_from([BLOCK, CHUNK, 1 << 20]),
)
def test_changed_blocks(extents: list[tuple[int, int]], chunk_size: int) -> None:
    blocks = ChangedBlocks(extents, chunk_size)
    assert blocks.size == patch_block(chunk_size)
    touched = {
        byte // blocks.size
        for offset, length in extents
        for byte in (*range(offset, offset + length, BLOCK), offset + length - 1)
    }
    for chunk in range(-(-6 * CHUNK // chunk_size)):
        first = chunk * blocks.in_chunk
        mask = sum(1 << block for block in range(blocks.in_chunk) if first + block in touched)
        assert blocks.mask(chunk) == mask
