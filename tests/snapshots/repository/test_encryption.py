"""Encrypted repositories: nothing is readable, nothing that was changed or moved is believed."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.errors import (
    CorruptError,
    ExistsError,
    InvalidError,
    NotFoundError,
    StorageError,
)
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import init_in_store, key_slots, open_in_store, sealed_objects
from snapshots.repository.envelope import Kind, seal, unseal
from snapshots.repository.records import Config
from snapshots.repository.sealed_objects import (
    FRAME,
    Sealer,
    frames_of,
    most_content,
    sealed_length,
)
from snapshots.repository.sealed_store import SealedObjectStore
from tests.snapshots.repository.encrypted import (
    OTHER,
    SECRET,
    TEXT,
    bucket,
    fill_repository,
    filled_bucket,
)
from tests.snapshots.repository.model import BLOCK, ModelSink, ModelVolume
from tests.snapshots.repository.test_repository import CHUNK, apply, change, restored
from tests.snapshots.repository.twin_reader import TwinReader

MASTER = bytes(range(32))
ID = "00112233445566778899aabbccddeeff"


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_slots, "SCRYPT_N", 16)


def copy_of(objects: dict[str, bytes]) -> MemoryObjectStore:
    store = MemoryObjectStore()
    for key, data in objects.items():
        store.put(key, data)
    return store


def damage_is_found(objects: dict[str, bytes], volume: ModelVolume, changed: set[str]) -> None:
    """What was ``changed`` is named, and what can be restored is right."""
    store = copy_of(objects)
    try:
        repository = open_in_store(store, SECRET)
    except StorageError as error:
        assert any(key.startswith(("config", "keys/")) for key in changed), error
        assert "\n" not in str(error)
        return
    assert isinstance(repository.store, SealedObjectStore)
    # In messages a pointer has its plain name.
    damaged = {
        repository.store._stored_key(damage.key) for damage in repository.verify(deep=True).damaged
    }
    # What a damaged outcome or page refers to is not looked at.
    hiding = [key for key in changed & damaged if key.startswith(("outcomes/", "pages/"))]
    assert changed <= damaged or hiding
    for source in volume.taken:
        sink = ModelSink(source.size)
        try:
            repository.restore("disk", source.snapshot, sink)
        except StorageError:
            for at in range(0, source.size, BLOCK):
                if sink.written[at]:
                    assert sink.data[at : at + BLOCK] == source.content[at : at + BLOCK]
        else:
            assert sink.data == source.content


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 3000), st.lists(st.lists(change, max_size=4), min_size=1, max_size=5))
def test_what_comes_back_is_what_went_in(blocks: int, pushes: list[list[tuple]]) -> None:
    store = MemoryObjectStore()
    init_in_store(store, CHUNK, SECRET)
    volume = ModelVolume("disk", blocks * BLOCK)
    for number, changes in enumerate(pushes):
        for one in changes:
            apply(volume.data, *one)
        repository = open_in_store(store, SECRET)
        source = volume.snapshot(f"s{number}")
        report = repository.push(source)
        assert report.parent == (f"s{number - 1}" if number else None)
        assert report.read == source.bytes_read
    if len(pushes) > 2:
        repository.delete("disk", "s1")
    live = [source for source in volume.taken if len(pushes) <= 2 or source.snapshot != "s1"]
    repository = open_in_store(store, SECRET)
    assert [item.snapshot for item in repository.list()] == [s.snapshot for s in live]
    for source in live:
        assert restored(repository, source) == source.content
    assert repository.verify(deep=True).damaged == []


def test_another_program_reads_it_from_the_documents_alone() -> None:
    store = MemoryObjectStore()
    repository = init_in_store(store, CHUNK, SECRET)
    volume = ModelVolume("disk", 5 * CHUNK + BLOCK)
    volume.data[: 3 * CHUNK] = random.Random(1).randbytes(3 * CHUNK)
    volume.data[-BLOCK:] = b"0123456789abcdef" * (BLOCK // 16)
    repository.push(volume.snapshot("one"))
    volume.data[CHUNK] ^= 1
    long_name = "a.name-that-is_longer.than-32-bytes"
    repository.push(volume.snapshot(long_name))
    twin = TwinReader(bucket(store), passphrase=TEXT)
    assert twin.config["chunk_size"] == CHUNK
    pushes = {item.snapshot: item.push for item in repository.list()}
    assert [name[:2] for name in twin.names()] == [("disk", long_name), ("disk", "one")]
    for source in volume.taken:
        assert twin.restore(pushes[source.snapshot]) == source.content
    with pytest.raises(AssertionError, match="no key"):
        TwinReader(bucket(store), passphrase="another")


def test_the_format_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derived keys are those of `openssl kdf`; the twin above reads what is sealed."""
    monkeypatch.setattr(os, "urandom", lambda length: b"nonce" * (length // 5) + bytes(length % 5))
    sealer = Sealer(MASTER, ID)
    key = "segments/00112233445566778899aabbccddeeff/00000000"
    assert sealer.derive(b"nbdserve object " + key.encode(), 32).hex() == (
        "15842c3fccbe87d1940af4afb443527f8076853f4476d3f4c7d76576cf47ba95"
    )
    sealed = sealer.seal(key, b"0123456789abcdef" * 2000)
    assert len(sealed) == 8 + 32000 + 2 * 28
    assert hashlib.sha256(sealed).hexdigest() == (
        "7977281747cda22145fb04065eefe08e71c0dfde28d62ef515b106a62dc102e9"
    )
    assert hashlib.sha256(sealer.seal("outcomes/" + ID, b"x")).hexdigest() == (
        "1ed76568515c7436231b59860b63d1cde2e49e89b0e46b807aa902b940726ade"
    )
    assert sealer.seal_name("web", "volume") == (
        "evg6wtamj5qnbyy4y2kpa7skecravkef63ycxzvrzebighvunuafltxn6viakqmq22znuxpawx3o4"
    )
    assert sealer.seal_name("monday", "snapshot", "web") == (
        "dpvkvcsynwndth6heqitwkfgh6zef6eqmhjv3kjfxbahn35uqdnum5qq35vgynzv6opm24l5lj2am"
    )


LENGTHS = sorted(
    edge + step
    for edge in (0, 988, 2012, 4060, 8156, 16348, 32704, 49060)
    for step in (-1, 0, 1)
    if edge + step >= 0
)


@pytest.mark.parametrize("kind", ["segments/x/0", "outcomes/x"])
def test_lengths_at_every_border(kind: str) -> None:
    sealer = Sealer(MASTER, ID)
    for length in LENGTHS:
        content = random.Random(length).randbytes(length)
        sealed = bytes(sealer.seal(kind, content))
        assert len(sealed) == sealed_length(kind, length)
        if kind.startswith("segments"):
            assert most_content(len(sealed)) == length
        else:
            assert len(sealed) % FRAME == 0 or (len(sealed) in (1024, 2048, 4096, 8192))
            assert most_content(len(sealed)) >= length
            assert len(sealed) <= FRAME or most_content(len(sealed) - FRAME) < length
        assert sealer.unseal(kind, sealed, "here") == content
        for cut in (0, 1, FRAME, len(sealed) - FRAME, len(sealed) - 1):
            if cut < len(sealed):
                with pytest.raises(CorruptError, match="here"):
                    sealer.unseal(kind, sealed[:cut], "here")
        with pytest.raises(CorruptError, match="here"):
            sealer.unseal(kind, sealed + sealed[-FRAME:], "here")
        with pytest.raises(CorruptError, match="here"):
            sealer.unseal(kind + "1", sealed, "here")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_part_of_a_segment_can_be_read_alone(data: st.DataObject) -> None:
    length = data.draw(st.one_of(st.sampled_from(LENGTHS[3:]), st.integers(1, 4 * FRAME)))
    offset = data.draw(st.integers(0, length - 1))
    part = data.draw(st.integers(1, length - offset))
    inner = MemoryObjectStore()
    store = SealedObjectStore(inner, Sealer(MASTER, ID))
    content = random.Random(length).randbytes(length)
    store.put("segments/x/0", content)
    asked: list[tuple[int, int]] = []
    get_range = inner.get_range

    def count(key: str, start: int, size: int) -> bytes:
        asked.append((start, size))
        return get_range(key, start, size)

    inner.get_range = count  # type: ignore[method-assign]
    assert store.get_range("segments/x/0", offset, part) == content[offset : offset + part]
    ((start, size),) = asked
    assert size <= part + 2 * FRAME
    first, end = frames_of(offset, part)
    stored = sealed_length("segments/x/0", length)
    assert (start, size) == (first * FRAME, min(end * FRAME, stored) - first * FRAME)
    assert store.size("segments/x/0") == length
    assert list(store.list("segments/")) == [("segments/x/0", length)]
    for beyond in (offset, length):
        with pytest.raises(CorruptError, match="ends before"):
            store.get_range("segments/x/0", beyond, length - beyond + 1)
    with pytest.raises(NotFoundError):
        store.get_range("segments/x/1", 0, 1)


def test_the_store_is_one_like_any_other() -> None:
    inner = MemoryObjectStore()
    store = SealedObjectStore(inner, Sealer(MASTER, ID))
    pushes = ["0" * 32, "1" * 32]
    keys = [
        f"snapshots/{volume}/{snapshot}/{push}"
        for volume in ("a", "a.b", "web")
        for snapshot in ("one", "x" * 127)
        for push in pushes
    ]
    for key in keys:
        assert store.put_if_absent(key, b"this is " + key.encode())
        assert not store.put_if_absent(key, b"another")
        assert store.size(key) is not None
    store.put("intents/x", b"an intent")
    for prefix in ("", "snap", "snapshots/", "snapshots/a", "snapshots/a/", "snapshots/a/o",
                   "snapshots/a/one/", "snapshots/a/one/0", "snapshots/none/"):  # fmt: skip
        expected = [key for key in sorted(["intents/x", *keys]) if key.startswith(prefix)]
        assert [key for key, _ in store.list(prefix)] == expected
    for key in keys:
        assert store.get(key, 200) == b"this is " + key.encode()
        assert store.get_range(key, 5, 3) == b"is "
        store.delete(key)
        assert store.size(key) is None
    assert [key for key, _ in inner.list("")] == ["intents/x"]
    # What is no name of this repository is not listed, nor the same name written in another way.
    store.put(keys[0], b"good")
    (name,) = [key for key, _ in inner.list("snapshots/")]
    for foreign in (
        "snapshots/a/b/c",
        "snapshots/x",
        name.upper().replace("SNAPSHOTS", "snapshots"),
    ):
        inner.put(foreign, inner.get(name, 1024))
    parts = name.split("/")
    last = parts[1][-1]
    for letter in "abcdefghijklmnopqrstuvwxyz234567":
        if letter != last:
            inner.put("/".join([parts[0], parts[1][:-1] + letter, *parts[2:]]), b"x" * 1024)
    assert [key for key, _ in store.list("snapshots/")] == [keys[0]]
    with pytest.raises(CorruptError):
        store.get(keys[0], 3)


def test_nothing_in_the_bucket_is_readable() -> None:
    store = MemoryObjectStore()
    repository = init_in_store(store, CHUNK, SECRET)
    volume = ModelVolume("payroll", 40 * CHUNK)
    volume.data[: 20 * CHUNK] = (b"TOP-SECRET salary" * CHUNK * 2)[: 20 * CHUNK]
    incompressible = random.Random(3).randbytes(3 * CHUNK)
    volume.data[20 * CHUNK : 23 * CHUNK] = incompressible
    for name in ("before-the-merger", "after"):
        repository.push(volume.snapshot(name))
        volume.data[0] ^= 1
    repository.delete("payroll", "after")
    digests = [
        hashlib.sha256(volume.taken[0].content[at : at + CHUNK]).digest()
        for at in range(0, volume.taken[0].size, CHUNK)
    ]
    words = [b"payroll", b"merger", b"after", b"SECRET", b"salary", TEXT.encode()[:8],
             b"NBDSEGMT", b"chunk_size", b"volume"]  # fmt: skip
    pieces = [*words, *digests, *(incompressible[at : at + 16] for at in (0, 5000, 20000))]
    objects = bucket(store)
    assert len(objects) > 10
    for key, data in objects.items():
        whole = key.encode() + data
        for piece in pieces:
            assert piece not in whole, (key, piece)
        if key.startswith(("config", "keys/")):
            continue
        # Nor is anything else but noise there.
        assert len(zlib.compress(data)) >= len(data)
    # The sizes tell little.
    for kind in ("intents/", "tombstones/", "snapshots/"):
        assert {len(data) for key, data in objects.items() if key.startswith(kind)} == {1024}


def test_the_same_content_is_never_stored_alike() -> None:
    stores = [MemoryObjectStore(), MemoryObjectStore()]
    for store in stores:
        fill_repository(store)
    one, two = (bucket(store) for store in stores)
    frames = [
        data[at : at + 64]
        for objects in (one, two)
        for key, data in objects.items()
        if not key.startswith("config")
        for at in range(0, len(data), FRAME)
    ]
    assert len(set(frames)) == len(frames)
    assert not {key for key in one if "/" in key} & two.keys()


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_in_every_object(seed: int) -> None:
    store, volume = filled_bucket()
    open_in_store(store, SECRET).keyring.add(OTHER)  # type: ignore[union-attr]
    objects = bucket(store)
    rng = random.Random(seed)
    dead = {key.split("/")[1] for key in objects if key.startswith("tombstones/")}
    assert len(objects) > 20
    for key, good in objects.items():
        if key.startswith("outcomes/") and key.split("/")[1] in dead:
            continue
        # The beginning with the first nonce, anywhere, and what only fills up.
        place = [rng.randrange(64), rng.randrange(len(good)), len(good) - 17]
        bad = bytearray(good)
        bad[place[seed]] ^= 1 << rng.randrange(8)
        damage_is_found({**objects, key: bytes(bad)}, volume, {key})


def test_any_two_objects_exchanged() -> None:
    store, volume = filled_bucket()
    objects = bucket(store)
    dead = {key.split("/")[1] for key in objects if key.startswith("tombstones/")}
    keys = [
        key for key in objects if not (key.startswith("outcomes/") and key.split("/")[1] in dead)
    ]
    pairs = list(itertools.combinations(keys, 2))
    alike = [pair for pair in pairs if len({key.split("/")[0] for key in pair}) == 1]
    rng = random.Random(5)
    for one, two in [*rng.sample(alike, 12), *rng.sample(pairs, 18)]:
        swapped = {**objects, one: objects[two], two: objects[one]}
        damage_is_found(swapped, volume, {one, two})


def test_frames_exchanged_within_an_object() -> None:
    store, volume = filled_bucket()
    objects = bucket(store)
    found = 0
    for key, data in objects.items():
        if len(data) > FRAME:
            found += 1
            moved = data[FRAME : 2 * FRAME] + data[:FRAME] + data[2 * FRAME :]
            damage_is_found({**objects, key: moved}, volume, {key})
            damage_is_found({**objects, key: data[:-FRAME]}, volume, {key})
    assert found


def test_objects_of_another_repository_with_the_same_passphrase() -> None:
    store, volume = filled_bucket()
    objects = bucket(store)
    # The other repository has the same keys: somebody made a copy of everything but the secret.
    repository = open_in_store(store, SECRET)
    foreign = MemoryObjectStore()
    other = init_in_store(foreign, CHUNK, SECRET)
    for key in objects:
        if key.startswith(("segments/", "pages/", "outcomes/")):
            other.store.put(key, repository.store.get(key, 1 << 20))
            damage_is_found(
                {**objects, key: foreign.get(key, 1 << 20)}, volume, {key}
            ) if not is_dead(objects, key) else None
    for name in ("config", next(key for key in bucket(foreign) if key.startswith("keys/"))):
        mixed = {**objects, name: foreign.get(name, 4096)}
        if name == "config":
            with pytest.raises(StorageError):
                open_in_store(copy_of(mixed), SECRET)
        else:
            damage_is_found(mixed, volume, {name})


def is_dead(objects: dict[str, bytes], key: str) -> bool:
    return f"tombstones/{key.split('/')[1]}" in objects


def test_an_older_writing_of_a_segment_or_page_is_found() -> None:
    """As a push that goes on may leave it: sealed by one who may, under the right key."""
    store, volume = filled_bucket()
    objects = bucket(store)
    repository = open_in_store(store, SECRET)
    for key in objects:
        if key.startswith(("segments/", "pages/")) and not is_dead(objects, key):
            content = bytearray(repository.store.get(key, 1 << 20))
            content[40:80] = bytes(40)
            repository.store.put(key, bytes(content))
            older = store.get(key, 1 << 20)
            damage_is_found({**objects, key: older}, volume, {key})
            # Its last frames with the first of the newer one.
            if len(older) > FRAME:
                mixed = older[:FRAME] + objects[key][FRAME:]
                damage_is_found({**objects, key: mixed}, volume, {key})


PLAIN = Config(ID, CHUNK, True, 1.0)


def test_an_unencrypted_config_in_its_place_is_refused() -> None:
    store, _ = filled_bucket()
    repository_id = open_in_store(store, SECRET).config.repository_id
    store.put("config", Config(repository_id, CHUNK, True, 1.0).encode())
    with pytest.raises(InvalidError, match=r"not encrypted.*exchanged"):
        open_in_store(store, SECRET)


def test_a_config_with_other_parameters_is_refused() -> None:
    store, _ = filled_bucket()
    fields = unseal(Kind.CONFIG, store.get("config", 4096), "here")._fields
    calls = []

    def ask() -> object:
        calls.append(1)
        return SECRET

    for name, value in (
        ("cipher", "none"),
        ("cipher", "rot13"),
        ("repository", bytes(16)),
        ("sealed", seal(Kind.CONFIG, fields)),
        ("sealed", PLAIN.encode()),
        ("sealed", b""),
        ("sealed", fields["sealed"][:-1]),
        ("sealed", Sealer(MASTER, ID).seal("config", PLAIN.encode())),
        ("features", ["what comes later"]),
    ):
        store.put("config", seal(Kind.CONFIG, {**fields, name: value}))
        for key in (SECRET, ask):
            with pytest.raises((InvalidError, CorruptError)) as caught:
                open_in_store(store, key)  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)
    # Other parameters, outside of what is sealed, are not looked at.
    store.put("config", seal(Kind.CONFIG, {**fields, "chunk_size": 4096, "conditional_put": False}))
    config = open_in_store(store, SECRET).config
    assert (config.chunk_size, config.conditional_put) == (CHUNK, True)


def test_a_reader_that_knows_no_encryption_says_so() -> None:
    store, _ = filled_bucket()
    with pytest.raises(InvalidError, match="encryption"):
        Config.decode(store.get("config", 4096), "here")


def test_without_a_key_it_says_how_to_give_one() -> None:
    store, _ = filled_bucket()
    for word in ("encrypted", "--passphrase-file", "NBDSERVE_REPO_KEY_FILE"):
        with pytest.raises(InvalidError, match=word):
            open_in_store(store)


def test_an_unencrypted_repository_stays_what_it_was() -> None:
    store = MemoryObjectStore()
    repository, volume = fill_repository(store, None)
    assert repository.keyring is None
    assert not [key for key in bucket(store) if key.startswith(("keys/", "removals/"))]
    assert any(b"disk" in data for data in bucket(store).values())
    asked: list[int] = []
    again = open_in_store(store, lambda: asked.append(1))  # type: ignore[arg-type, return-value]
    assert not asked
    for source in volume.taken:
        assert restored(again, source) == source.content
    with pytest.raises(ExistsError):
        init_in_store(store, CHUNK, SECRET)


def test_init_that_loses_a_race_leaves_no_key() -> None:
    store = MemoryObjectStore()

    def put_if_absent(
        key: str, data: bytes, put: Callable[..., bool] = store.put_if_absent
    ) -> bool:
        if key == "config":
            store.put(key, PLAIN.encode())
        return put(key, data)

    store.put_if_absent = put_if_absent  # type: ignore[assignment, method-assign]
    with pytest.raises(ExistsError):
        init_in_store(store, CHUNK, SECRET)
    assert list(bucket(store)) == ["config"]


def test_a_crash_during_init_can_be_followed_by_another_init() -> None:
    store = MemoryObjectStore()
    init_in_store(store, CHUNK, SECRET)
    store.delete("config")  # as if it had been killed before
    assert len(bucket(store)) == 1
    init_in_store(store, CHUNK, SECRET)
    repository = open_in_store(store, SECRET)
    volume = ModelVolume("disk", CHUNK)
    source = volume.snapshot("one")
    repository.push(source)
    assert restored(repository, source) == source.content
    assert [info.problem is None for info in repository.keyring.list_keys()] == [True, False]  # type: ignore[union-attr]


def test_cryptography_is_only_imported_when_it_is_needed() -> None:
    script = (
        "import sys, nbdserve.cli.repositories, nbdserve.cli.backup, nbdserve.cli.keys;"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'cryptography']"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_random_bytes_are_no_sealed_object() -> None:
    sealer = Sealer(MASTER, ID)
    for length in (0, 1, 27, 28, 1023, 1024, 1025, FRAME - 1, FRAME, FRAME + 1024, 2 * FRAME):
        for key in ("segments/x/0", "outcomes/x"):
            with pytest.raises(CorruptError, match="here"):
                sealer.unseal(key, random.Random(length).randbytes(length), "here")
    assert sealed_objects.most_content(0) == 0


@given(st.text(max_size=80))
def test_no_text_but_its_own_is_a_name(text: str) -> None:
    assert Sealer(MASTER, ID).unseal_name(text, "volume") is None


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,126}", fullmatch=True))
def test_names_come_back(name: str) -> None:
    sealer = Sealer(MASTER, ID)
    text = sealer.seal_name(name, "volume")
    assert len(text) <= 255
    assert sealer.unseal_name(text, "volume") == name
    assert sealer.unseal_name(text, "snapshot", name) is None
    assert sealer.seal_name(name, "snapshot", "a") != sealer.seal_name(name, "snapshot", "b")
