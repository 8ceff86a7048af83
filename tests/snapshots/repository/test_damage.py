"""Damaged and hostile objects: found, named, never served."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import CorruptError, InvalidError, NotFoundError, StorageError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store, open_in_store
from snapshots.repository.envelope import ENVELOPE_SIZE, Kind, digest_of, seal, unseal
from snapshots.repository.layout import PAGE_ENTRIES
from snapshots.repository.pages import Entry, PageRef, decode_page, encode_page
from snapshots.repository.records import Config, Intent, Outcome, Summary, Tombstone
from snapshots.repository.segments import PackedChunk, pack_chunk, unpack_chunk
from tests.snapshots.repository.model import ModelSink, ModelVolume
from tests.snapshots.repository.test_repository import CHUNK, PAGE, restored


@pytest.fixture
def volume() -> ModelVolume:
    volume = ModelVolume("disk", 2 * PAGE)
    rng = random.Random(1)
    volume.data[: 7 * CHUNK] = rng.randbytes(7 * CHUNK)
    # It is compressed, but nothing in it comes at regular distances: there a flipped bit of a
    # distance may decompress to the same.
    volume.data[PAGE : PAGE + 2 * CHUNK] = bytes(rng.choices(b"abcd", k=2 * CHUNK))
    volume.snapshot("one")
    volume.data[CHUNK : 3 * CHUNK] = rng.randbytes(2 * CHUNK)
    volume.snapshot("two")
    volume.data[PAGE + CHUNK : PAGE + CHUNK + 4096] = bytes(rng.choices(b"abcd", k=4096))
    volume.snapshot("three")
    return volume


@pytest.fixture
def repository(volume: ModelVolume) -> Repository:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    for source in volume.taken:
        repository.push(source)
    other = ModelVolume("other", PAGE)
    other.data[0] = 1
    repository.push(other.snapshot("gone"))
    repository.delete("other", "gone")
    return repository


def is_dead(repository: Repository, key: str) -> bool:
    """Whether only a deleted snapshot has a use for the object."""
    dead = {key.split("/")[1] for key, _ in repository.store.list("tombstones/")}
    return key.startswith(("segments/", "pages/", "outcomes/")) and key.split("/")[1] in dead


def damage_is_found_and_not_served(repository: Repository, volume: ModelVolume, key: str) -> None:
    try:
        again = open_in_store(repository.store)
        report = again.verify(deep=True)
    except CorruptError as error:
        assert key == "config"
        assert "config" in str(error)
        return
    except NotFoundError:
        assert key == "config"
        return
    assert [damage.key for damage in report.damaged] == [key]
    harmed = report.damaged[0].snapshots
    assert key in report.damaged[0].problem and "\n" not in report.damaged[0].problem
    for source in volume.taken:
        label = f"disk@{source.snapshot}"
        sink = ModelSink(source.size)
        if label in harmed:
            with pytest.raises(StorageError) as caught:
                again.restore("disk", source.snapshot, sink)
            assert key in str(caught.value) or source.snapshot in str(caught.value)
            # What was written before it failed is right.
            for at in range(0, source.size, 4096):
                if sink.written[at]:
                    assert sink.data[at : at + 4096] == source.content[at : at + 4096]
        else:
            again.restore("disk", source.snapshot, sink)
            assert sink.data == source.content


def change_every_object(
    repository: Repository, volume: ModelVolume, change: Callable[[bytes], bytes | None]
) -> None:
    store = repository.store
    for key, size in list(store.list("")):
        if is_dead(repository, key):
            continue
        good = store.get(key, size)
        bad = change(good)
        if bad is None:
            store.delete(key)
        else:
            store.put(key, bad)
        damage_is_found_and_not_served(repository, volume, key)
        store.put(key, good)
    assert repository.verify(deep=True).damaged == []


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_byte_in_every_object(
    repository: Repository, volume: ModelVolume, seed: int
) -> None:
    rng = random.Random(seed)

    def flip(good: bytes) -> bytes:
        bad = bytearray(good)
        # The first ones hit each part of the headers.
        place = rng.randrange(len(bad)) if seed > 2 else rng.randrange(min(64, len(bad)))
        bad[place] ^= 1 << rng.randrange(8)
        return bytes(bad)

    change_every_object(repository, volume, flip)


def test_every_byte_of_a_segments_header(repository: Repository, volume: ModelVolume) -> None:
    store = repository.store
    live = (pair for pair in store.list("segments/") if not is_dead(repository, pair[0]))
    key, size = next(live)
    good = store.get(key, size)
    for place in range(34):
        store.put(key, good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert [damage.key for damage in repository.verify(deep=True).damaged] == [key]


def test_every_object_cut_short(repository: Repository, volume: ModelVolume) -> None:
    change_every_object(repository, volume, lambda good: good[:-1])


def test_every_object_emptied(repository: Repository, volume: ModelVolume) -> None:
    change_every_object(repository, volume, lambda good: b"")


def test_every_object_that_data_needs_removed(repository: Repository, volume: ModelVolume) -> None:
    store = repository.store
    for kind in ("segments/", "pages/", "outcomes/"):
        for key, size in list(store.list(kind)):
            if is_dead(repository, key):
                continue
            good = store.get(key, size)
            store.delete(key)
            if kind == "outcomes/":
                report = repository.verify()
                assert [damage.key for damage in report.damaged] == [key]
                assert len(report.damaged[0].snapshots) == 1
            else:
                damage_is_found_and_not_served(repository, volume, key)
            store.put(key, good)


def test_what_a_shallow_verify_finds(repository: Repository) -> None:
    store = repository.store
    first = next(key for key, _ in store.list("segments/") if not is_dead(repository, key))
    good = store.get(first, 1 << 20)
    for bad in (None, good[:40]):
        if bad is None:
            store.delete(first)
        else:
            store.put(first, bad)
        report = repository.verify()
        assert [damage.key for damage in report.damaged] == [first]
        assert report.damaged[0].snapshots
        assert report.fetched == 0
    flipped = bytearray(good)
    flipped[-1] ^= 1
    store.put(first, bytes(flipped))
    assert repository.verify().damaged == []
    assert [damage.key for damage in repository.verify(deep=True).damaged] == [first]


def test_shared_damage_harms_all_that_share(repository: Repository, volume: ModelVolume) -> None:
    one = repository.find("disk", "one")
    key = f"segments/{one.push}/00000000"
    bad = bytearray(repository.store.get(key, 1 << 20))
    bad[40] ^= 1  # the first chunk: unchanged ever since
    repository.store.put(key, bytes(bad))
    report = repository.verify(deep=True)
    assert [damage.snapshots for damage in report.damaged] == [
        ["disk@one", "disk@three", "disk@two"]
    ]
    bad[40] ^= 1
    bad[32 + CHUNK] ^= 1  # the second chunk: written again before "two"
    repository.store.put(key, bytes(bad))
    report = repository.verify(deep=True)
    assert [damage.snapshots for damage in report.damaged] == [["disk@one"]]
    assert restored(repository, volume.taken[1]) == volume.taken[1].content
    assert repository.verify("disk", "two", deep=True).damaged == []
    assert len(repository.verify("disk", "one", deep=True).damaged) == 1


def test_deep_verify_reads_each_chunk_once(repository: Repository) -> None:
    report = repository.verify(deep=True)
    assert report.chunks == 9 + 2 + 1
    stored = sum(
        size for key, size in repository.store.list("segments/") if not is_dead(repository, key)
    )
    # One chunk is patched: its base is read with the patch, to see what they make together.
    assert report.fetched <= stored + CHUNK


def reseal(kind: Kind, fields: dict[str, object]) -> bytes:
    return seal(kind, fields)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_no_record(data: bytes) -> None:
    for kind in Kind:
        with pytest.raises(CorruptError, match="here"):
            unseal(kind, data, "here")


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "push",
                "volume",
                "snapshot",
                "snapshot_id",
                "pushes",
                "pages",
                "entries",
                "page",
                "roots",
                "state",
                "size",
                "created",
                "chunk_size",
                "repository",
                "parents",
                "why",
                "features",
                "codec",
                "cipher",
                "page_entries",
                "conditional_put",
            ]
        ),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**64 - 1)
            | st.floats()
            | st.text(max_size=8)
            | st.binary(max_size=200)
            | st.just(bytes(16))
            | st.just("committed")
            | st.just("none")
            | st.just("lz4"),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=4), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
)
def test_well_sealed_nonsense_is_refused_with_one_line(fields: dict[str, object]) -> None:
    push = "00" * 16
    ref = PageRef(0, push, 0, 0, 1, 1, 1, digest_of(reseal(Kind.PAGE, fields)))
    for decode in (
        lambda: Config.decode(reseal(Kind.CONFIG, fields), "here"),
        lambda: Intent.decode(reseal(Kind.INTENT, fields), "here"),
        lambda: Outcome.decode(reseal(Kind.OUTCOME, fields), push, CHUNK, "here"),
        lambda: Tombstone.decode(reseal(Kind.TOMBSTONE, fields), "here"),
        lambda: Summary.decode_pointer(reseal(Kind.POINTER, fields), "here"),
        lambda: decode_page(reseal(Kind.PAGE, fields), ref, CHUNK, "here"),
    ):
        try:
            decode()
        except (CorruptError, InvalidError) as error:
            assert "here" in str(error) and "\n" not in str(error)


def sealed(body: bytes, *, codec: int = 1, plain: int | None = None) -> bytes:
    """An envelope around any body, with a right digest."""
    length = len(body) if plain is None else plain
    fixed = struct.pack(">4sBBBBQQ", b"NBDR", Kind.INTENT, 1, codec, 0, len(body), length)
    return fixed + hashlib.sha256(fixed + body).digest() + body


@pytest.mark.parametrize(
    "record",
    [
        sealed(b"\x00", codec=2, plain=2**62),
        sealed(b"\x00" * 5000, codec=2, plain=60000),
        sealed(msgpack.packb({}), plain=5),
        sealed(b"\xdd\xff\xff\xff\xff"),  # an array of 4 G items
        sealed(b"\xdf\xff\xff\xff\xff"),
        sealed(b"\xc6\xff\xff\xff\xff"),
        sealed(b"\x91" * 5000 + b"\xc0"),  # nested deeply
        sealed(msgpack.packb([1, 2])),
        sealed(msgpack.packb({1: 2})),
        sealed(b""),
        b"\xff" * ENVELOPE_SIZE,
    ],
)
def test_hostile_envelopes(record: bytes) -> None:
    with pytest.raises(CorruptError, match="here"):
        unseal(Kind.INTENT, record, "here")


def test_a_newer_version_is_not_called_damage() -> None:
    body = msgpack.packb({})
    fixed = struct.pack(">4sBBBBQQ", b"NBDR", Kind.INTENT, 2, 1, 0, len(body), len(body))
    record = fixed + hashlib.sha256(fixed + body).digest() + body
    with pytest.raises(InvalidError, match="newer"):
        unseal(Kind.INTENT, record, "here")


@pytest.mark.parametrize(
    "entry",
    [
        Entry("00" * 16, 0, 31, 100, 1, bytes(32)),
        Entry("00" * 16, 0, 2**32 - 1, 100, 1, bytes(32)),
        Entry("00" * 16, 0, 32, CHUNK + 1, 1, bytes(32)),
        Entry("00" * 16, 0, 32, 2**32 - 1, 2, bytes(32)),
        Entry("00" * 16, 0, 32, 0, 1, bytes(32)),
        Entry("00" * 16, 0, 32, 100, 9, bytes(32)),
    ],
)
def test_entries_out_of_bounds(entry: Entry) -> None:
    record = encode_page(0, [entry] + [None] * (PAGE_ENTRIES - 1))
    ref = PageRef(0, "00" * 16, 0, 0, len(record), 1, 100, digest_of(record))
    with pytest.raises((CorruptError, InvalidError), match="here"):
        decode_page(record, ref, CHUNK, "here")


@given(st.binary(min_size=1, max_size=300), st.integers(0, 400), st.sampled_from([1, 2]))
def test_chunks_are_verified(data: bytes, length: int, codec: int) -> None:
    digest = hashlib.sha256(data).digest()
    packed = pack_chunk(data, digest)
    assert len(packed.data) <= len(data)
    assert unpack_chunk(packed, len(data), "here") == data
    with pytest.raises(CorruptError, match="here"):
        unpack_chunk(packed._replace(digest=bytes(32)), len(data), "here")
    if length != len(data):
        with pytest.raises(CorruptError, match="here"):
            unpack_chunk(packed, length, "here")
    hostile = PackedChunk(codec, bytes(reversed(packed.data)) + b"x", digest)
    with pytest.raises(CorruptError, match="here"):
        unpack_chunk(hostile, len(data), "here")
