"""Layers that no manifest lists: condemned or empty ones go, the others are kept."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path

import pytest

from backends.errors import CorruptError
from backends.local_layers import LocalLayerStore
from backends.memory_layers import MemoryDataFile, MemoryLayerStore
from snapshots.catalogue import Catalogue
from snapshots.head import create_head
from snapshots.sink import open_sink

BLOCK = 4096
SIZE = 64 * BLOCK


async def fill(catalogue: Catalogue, name: str, byte: int) -> None:
    handle = await catalogue.open_volume(name, lambda: None)
    await handle.write(0, bytes([byte]) * SIZE)
    await handle.flush()
    await catalogue.close_export(handle)


async def first_byte(catalogue: Catalogue, name: str) -> int:
    handle = await catalogue.open_volume(name, lambda: None)
    buffer = bytearray(1)
    await handle.read(0, memoryview(buffer))
    await catalogue.close_export(handle)
    return buffer[0]


def test_data_of_a_volume_whose_manifest_was_lost_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue.create_volume("lost", SIZE)
        await fill(catalogue, "lost", 7)
        await catalogue.create_volume("kept", SIZE)
        await fill(catalogue, "kept", 8)
        manifest = tmp_path / "volumes" / (await catalogue.show_volume("lost")).id
        await catalogue.close()
        record = manifest.read_bytes()
        manifest.unlink()

        with caplog.at_level(logging.WARNING):
            catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        assert catalogue.volume_names() == ["kept"]
        assert await first_byte(catalogue, "kept") == 8
        await catalogue.close()
        (layer,) = (tmp_path / "lost").iterdir()
        assert str(layer) in caplog.text

        # Put back what was lost, and everything is there again.
        layer.rename(tmp_path / "layers" / layer.name)
        manifest.write_bytes(record)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        assert await first_byte(catalogue, "lost") == 7
        await catalogue.close()

    asyncio.run(scenario())


def test_the_head_of_a_snapshot_that_was_not_committed_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The process is killed behind the gate: the next head has data, but no log lists it."""

    async def scenario() -> None:
        store = LocalLayerStore(tmp_path)
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        await fill(catalogue, "v", 7)
        await create_head(store, "00000000000000aa")
        head = tmp_path / "layers" / "00000000000000aa"
        (head / "data-00000").write_bytes(b"x" * BLOCK)
        await store.unlock()

        with caplog.at_level(logging.WARNING):
            catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        assert not head.exists()
        assert not (tmp_path / "lost").exists()
        assert caplog.text == ""
        assert await first_byte(catalogue, "v") == 7
        await catalogue.close()

    asyncio.run(scenario())


def test_layers_without_a_directory_of_manifests_are_not_touched(tmp_path: Path) -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue.create_volume("v", SIZE)
        await fill(catalogue, "v", 7)
        await catalogue.close()
        (tmp_path / "volumes").rename(tmp_path.parent / "moved")
        with pytest.raises(CorruptError, match="volumes is missing"):
            await Catalogue.open(LocalLayerStore(tmp_path))
        (tmp_path.parent / "moved").rename(tmp_path / "volumes")
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        assert await first_byte(catalogue, "v") == 7
        await catalogue.close()

    asyncio.run(scenario())


def test_what_a_deletion_condemned_goes_at_the_next_start() -> None:
    """The process dies between the commit of a deletion and the removal of the layers."""

    async def scenario() -> None:
        store = MemoryLayerStore()
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        await fill(catalogue, "v", 7)

        async def dies(layer: str) -> None:
            raise OSError(errno.EIO, "gone")

        store.delete_layer = dies  # type: ignore[method-assign]
        await catalogue.delete_volume("v")
        assert catalogue.volume_names() == []
        await catalogue.close()
        del store.delete_layer  # type: ignore[method-assign]
        assert len(await store.list_layers()) == 1

        catalogue = await Catalogue.open(store)
        assert await store.list_layers() == []
        assert await store.list_records("deletions") == []
        assert store.lost == {}
        await catalogue.close()

    asyncio.run(scenario())


def test_an_import_that_nobody_finished_goes_at_the_next_start() -> None:
    """The daemon and the process that restores die together."""

    async def scenario() -> None:
        store = MemoryLayerStore()
        catalogue = await Catalogue.open(store)
        imported = await catalogue.begin_import("v", SIZE)
        sink = await open_sink(store, imported.sink)
        sink.write(0, b"\7" * SIZE)
        await store.unlock()

        again = await Catalogue.open(store)
        assert await store.list_layers() == []
        assert store.lost == {}
        assert again.volume_names() == []
        imported = await again.begin_import("v", SIZE)
        sink = await open_sink(store, imported.sink)
        sink.write(0, b"\7" * SIZE)
        await sink.finish()
        await again.commit_import(imported)
        await again.close()

        again = await Catalogue.open(store)
        assert await first_byte(again, "v") == 7
        assert await store.list_records("deletions") == []
        await again.close()

    asyncio.run(scenario())


def test_no_deletion_outlives_what_it_condemned() -> None:
    async def scenario() -> None:
        store = MemoryLayerStore()
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        for name in ("s1", "s2", "s3"):
            await fill(catalogue, "v", 7)
            await catalogue.create_snapshots([("v", name)])
        await catalogue.rollback("v", "s1")
        for name in ("s2", "s3", "s1"):
            await catalogue.delete_snapshot("v", name)
        assert await store.list_records("deletions") == []
        assert len(await store.list_layers()) == 2
        await catalogue.delete_volume("v")
        assert await store.list_records("deletions") == []
        assert await store.list_layers() == []
        await catalogue.close()

    asyncio.run(scenario())


def test_a_failed_volume_stays_read_only_until_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        store = MemoryLayerStore()
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", SIZE)
        handle = await catalogue.open_volume("v", lambda: None)
        await handle.write(0, b"\7" * SIZE)

        def fails(self: MemoryDataFile) -> None:
            raise OSError(errno.EIO, "sync")

        with monkeypatch.context() as patch:
            patch.setattr(MemoryDataFile, "sync", fails)
            with pytest.raises(OSError):
                await handle.flush()
        await catalogue.close_export(handle)

        handle = await catalogue.open_volume("v", lambda: None)
        with pytest.raises(OSError) as refused:
            await handle.write(0, b"\7" * SIZE)
        assert refused.value.errno == errno.EIO
        await catalogue.close_export(handle)
        await catalogue.close()

        catalogue = await Catalogue.open(store)
        await fill(catalogue, "v", 9)
        assert await first_byte(catalogue, "v") == 9
        await catalogue.close()

    asyncio.run(scenario())


def test_trim_of_a_huge_volume_notes_only_what_was_touched() -> None:
    """Or turning the journal into an index would cost a byte for each block of 16 TiB."""

    async def scenario() -> None:
        store = MemoryLayerStore()
        catalogue = await Catalogue.open(store)
        size = 16 << 40
        await catalogue.create_volume("v", size)
        handle = await catalogue.open_volume("v", lambda: None)
        for offset in (0, 1 << 40, size - BLOCK):
            await handle.write(offset, b"\7" * BLOCK)
        await handle.trim(0, size)
        pending = handle.view.head.pending  # type: ignore[attr-defined]
        assert sum(last - first for first, last, _ in pending) <= 3 << 15
        assert handle.extents(0, size, 10) == [(size, False)]
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())
