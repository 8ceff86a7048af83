"""Records and manifests: damage is refused, transactions are finished, generations only grow."""

from __future__ import annotations

import struct
import zlib
from dataclasses import asdict
from typing import Any

import msgpack
import pytest

from backends.errors import CorruptError, NotFoundError
from snapshots.catalogue import Catalogue
from snapshots.manifest import (
    Deletion,
    Manifest,
    Merge,
    Snapshot,
    pack_deletion,
    pack_transaction,
    unpack_deletion,
    unpack_manifest,
    unpack_merge,
    unpack_transaction,
)
from snapshots.manifest_store import ManifestStore
from snapshots.records import pack_record, unpack_record
from tests.snapshots.stores import BLOCK, Crash, FaultyStore, run

WHERE = "volumes/abc"
SIZE = 16 * BLOCK


def manifest(name: str = "v", **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "id": f"id-{name}",
        "name": name,
        "size": SIZE,
        "created": 1.5,
        "generation": 3,
        "head": "c",
        "parents": {"a": "", "b": "a", "c": "b"},
        "snapshots": (Snapshot("s", "id-s", SIZE, 2.5, "a", {"k": "v"}),),
    }
    return Manifest(**{**fields, **changes})


def packed(payload: Any, version: int = 1) -> bytes:
    """A record with a valid check around any payload."""
    body = payload if isinstance(payload, bytes) else msgpack.packb(payload)
    start = struct.pack(">8sHI", b"nbdserve", version, len(body))
    return start + struct.pack(">I", zlib.crc32(body, zlib.crc32(start))) + body


def refused(content: bytes) -> str:
    with pytest.raises(CorruptError) as caught:
        unpack_manifest(content, WHERE, manifest().id)
    assert str(caught.value).startswith(WHERE)
    return str(caught.value)


def test_round_trip() -> None:
    assert unpack_manifest(manifest().pack(), WHERE, manifest().id) == manifest()
    group = [manifest("v"), manifest("w", snapshots=())]
    assert unpack_transaction(pack_transaction(group), WHERE) == group
    merge = Merge("a", "b", "b")
    assert unpack_merge(merge.pack(), WHERE, "b") == merge
    assert (merge.source, Merge("a", "b", "a").source) == ("a", "b")
    assert packed(manifest().as_map()) == manifest().pack()


def test_every_flipped_byte_and_every_cut_is_refused() -> None:
    content = manifest().pack()
    for position in range(len(content)):
        for mask in (1, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= mask
            assert "offset" in refused(bytes(damaged))
        assert "offset" in refused(content[:position])
    refused(content + b"\0")


def test_versions_of_the_future_and_of_nowhere_are_refused() -> None:
    assert "version 2 is newer" in refused(pack_record(2, manifest().as_map()))
    assert "version 65535 is newer" in refused(pack_record(65535, manifest().as_map()))
    assert "version 0" in refused(pack_record(0, manifest().as_map()))
    assert unpack_record(pack_record(1, {"a": 1}), 2, WHERE) == {"a": 1}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x81",
        b"\x81\x80\x01",
        b"\x91" * 3000,
        b"\xdf\xff\xff\xff\xff",
        [],
        7,
        None,
        {},
        {"snapshots": []},
        {1: 2},
        {**manifest().as_map(), "more": 1},
        {**manifest().as_map(), "parents": None},
        {**manifest().as_map(), "parents": {}},
        {**manifest().as_map(), "parents": []},
        {**manifest().as_map(), "head": "x"},
        {**manifest().as_map(), "head": None},
        {**manifest().as_map(), "head": ""},
        {**manifest().as_map(), "snapshots": None},
        {**manifest().as_map(), "snapshots": [7]},
        {**manifest().as_map(), "snapshots": [{"name": "s"}]},
        {**manifest().as_map(), "parents": {"a": "x", "b": "a", "c": "b"}},
        {**manifest().as_map(), "parents": {"a": "c", "b": "a", "c": "b"}},
        {**manifest().as_map(), "parents": {"a": "a", "b": "a", "c": "b"}},
        {**manifest().as_map(), "parents": {"a": "", "c": "b"}},
    ],
)
def test_payloads_that_are_no_manifest_are_refused(payload: Any) -> None:
    refused(packed(payload))
    with pytest.raises(CorruptError, match=WHERE):
        unpack_transaction(packed({"manifests": [payload]}) if payload else b"", WHERE)
    with pytest.raises(CorruptError, match=WHERE):
        unpack_merge(packed(payload), WHERE, "b")


def test_a_merge_of_anything_but_its_own_layers_is_refused() -> None:
    for found in ({"target": "x"}, {"lower": "b"}, {"target": 7}):
        with pytest.raises(CorruptError, match=WHERE):
            unpack_merge(packed({**asdict(Merge("a", "b", "b")), **found}), WHERE, "b")


def test_a_record_under_the_name_of_another_is_refused() -> None:
    with pytest.raises(CorruptError, match=f"{WHERE}: is the manifest of another volume"):
        unpack_manifest(manifest().pack(), WHERE, "f" * 32)
    with pytest.raises(CorruptError, match=f"{WHERE}: is the record of another merge, b"):
        unpack_merge(Merge("a", "b", "b").pack(), WHERE, "a")


def test_layers_that_nothing_stands_on_are_left_out() -> None:
    parents = {"a": "", "b": "a", "c": "b", "d": "a", "e": "d"}
    changed = manifest(parents=parents).changed(head="e", snapshots=())
    assert changed.parents == {"a": "", "d": "a", "e": "d"}
    assert changed.generation == 4


def test_a_merged_layer_stands_for_both() -> None:
    parents = {"a": "", "b": "a", "c": "b", "d": "c", "e": "c"}
    snapshots = (Snapshot("s", "i", SIZE, 0, "c", {}), Snapshot("t", "j", SIZE, 0, "d", {}))
    before = manifest(head="e", parents=parents, snapshots=snapshots)
    down = before.merged(Merge("b", "c", "b"))
    assert down.parents == {"a": "", "b": "a", "d": "b", "e": "b"}
    assert [snapshot.layer for snapshot in down.snapshots] == ["b", "d"]
    up = before.merged(Merge("b", "c", "c"))
    assert up.parents == {"a": "", "c": "a", "d": "c", "e": "c"}
    assert [snapshot.layer for snapshot in up.snapshots] == ["c", "d"]
    bottom = before.merged(Merge("a", "b", "b"))
    assert bottom.parents == {"b": "", "c": "b", "d": "c", "e": "c"}


# The store


def group_of(count: int) -> list[Manifest]:
    return [manifest(f"v{index}", snapshots=()) for index in range(count)]


@pytest.mark.parametrize("steps", range(6))
def test_a_group_is_committed_whole_or_not_at_all_wherever_it_crashes(steps: int) -> None:
    async def scenario() -> None:
        store = FaultyStore()
        manifests = ManifestStore(store)
        for each in group_of(3):
            await manifests.commit([each])
        count = 0

        def crash(*_: Any) -> None:
            nonlocal count
            count += 1
            if count > steps:
                raise Crash

        store.hook = crash
        newer = [each.changed(size=2 * SIZE) for each in group_of(3)]
        try:
            await manifests.commit(newer)
        except Crash:
            assert steps < 5
        found = store.after_crash("cut")
        for _ in range(2):
            loaded = ManifestStore(found)
            await loaded.load()
            expected = newer if steps else group_of(3)
            assert sorted(loaded.volumes.values(), key=lambda each: each.name) == expected
            assert await found.list_records("transactions") == []

    run(scenario())


def test_a_transaction_that_was_left_over_undoes_nothing_later() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        manifests = ManifestStore(store)
        old = group_of(3)
        for each in old:
            await manifests.commit([each])

        def fails(kind: str, layer: str, detail: Any) -> None:
            if kind == "delete_record" or (kind == "commit" and detail == "id-v1"):
                raise OSError(5, "no")

        store.hook = fails
        newer = [each.changed(size=2 * SIZE) for each in old]
        # Committed, although not everything could be written yet.
        await manifests.commit(newer)
        assert manifests.get("v1") == newer[1]
        store.hook = lambda *_: None
        assert len(await store.list_records("transactions")) == 1
        latest = newer[0].changed(name="other")
        await manifests.commit([latest])
        await manifests.remove(newer[2])
        loaded = ManifestStore(store)
        await loaded.load()
        assert loaded.volumes == {"id-v0": latest, "id-v1": newer[1]}
        assert loaded.find("v0") is None
        assert loaded.find("v2") is None
        with pytest.raises(NotFoundError):
            loaded.get("v0")

    run(scenario())


def test_damage_to_any_record_keeps_the_directory_as_it_is() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        manifests = ManifestStore(store)
        for each in group_of(2):
            await manifests.commit([each])
        for key, content, left in (
            (("transactions", "0"), b"garbage of some length", None),
            (("merges", "b"), packed({}), []),
            (("merges", "b"), Merge("b", "c", "c").pack(), []),
            (("volumes", "id-v0"), manifest("v9").pack(), ["v1"]),
            (("volumes", "id-v0"), manifest("v1", id="id-v0").pack(), ["v1"]),
            (("volumes", "id-v0"), b"", ["v1"]),
        ):
            found = store.after_crash("kill")
            await found.create_layer("orphan")
            found._records[key] = content
            records = dict(found._records)
            if left is None:
                with pytest.raises(CorruptError):
                    await Catalogue.open(found)
            else:
                catalogue = await Catalogue.open(found)
                assert len(catalogue.volume_names()) == len(left)
                await catalogue.close()
            assert found._records == records
            assert await found.list_layers() == ["orphan"]
            # The lock is given back.
            await found.lock()

    run(scenario())


def test_a_missing_layer_is_named_and_harms_no_other_volume() -> None:
    async def scenario() -> None:
        store = FaultyStore()
        catalogue = await Catalogue.open(store)
        for name in ("v", "w"):
            await catalogue.create_volume(name, SIZE)
        head = catalogue._manifests.get("v").head
        await catalogue.close()
        await store.delete_layer(head)
        catalogue = await Catalogue.open(store)
        with pytest.raises(NotFoundError, match=head):
            await catalogue.open_volume("v", lambda: None)
        handle = await catalogue.open_volume("w", lambda: None)
        await handle.write(0, b"x" * BLOCK)
        await catalogue.close_export(handle)
        await catalogue.close()

    run(scenario())


def test_deletions_with_and_without_wiping() -> None:
    layers = frozenset(("a", "b"))
    assert unpack_deletion(pack_deletion(layers), WHERE) == Deletion(layers)
    assert unpack_deletion(pack_deletion(layers, "v"), WHERE) == Deletion(layers, "v")
    # One of a program that knows of no wiping.
    assert unpack_deletion(pack_record(1, {"layers": ["a"]}), WHERE).wipe is None
    for wipe in ("../v", 7, ["v"], b"v"):
        with pytest.raises(CorruptError, match=WHERE):
            unpack_deletion(pack_record(1, {"layers": ["a"], "wipe": wipe}), WHERE)
    for reserve in (-1, "many", 1.5):
        content = pack_record(1, {**manifest().as_map(), "reserve": reserve})
        with pytest.raises(CorruptError, match="reserved"):
            unpack_manifest(content, WHERE, manifest().id)
