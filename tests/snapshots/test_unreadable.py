"""Volumes that cannot be read: refused one by one, and nothing that may be theirs is lost."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.errors import CorruptError, ExistsError, NotFoundError
from backends.local_layers import LocalLayerStore
from snapshots import merge as merge_module
from snapshots.catalogue import Catalogue
from snapshots.manifest import salvage_name
from tests.snapshots.stores import BLOCK

SIZE = 16 * BLOCK


async def fill(catalogue: Catalogue, name: str, byte: int, first: int = 0) -> None:
    handle = await catalogue.open_volume(name, lambda: None)
    await handle.write(first * BLOCK, bytes([byte]) * (SIZE - first * BLOCK))
    await handle.flush()
    await catalogue.close_export(handle)


async def content(catalogue: Catalogue, name: str, snapshot: str | None = None) -> bytes:
    if snapshot is None:
        handle = await catalogue.open_volume(name, lambda: None)
    else:
        handle = await catalogue.open_snapshot(name, snapshot, lambda: None)
    buffer = bytearray(handle.size)
    await handle.read(0, memoryview(buffer))
    await catalogue.close_export(handle)
    return bytes(buffer)


def flip(path: Path, offset: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 0x10
    path.write_bytes(damaged)


async def make(data: Path) -> dict[str, Path]:
    """``web`` with three snapshots, its clone ``copy``, and ``other``; where their records are."""
    catalogue = await Catalogue.open(LocalLayerStore(data))
    await catalogue.create_volume("web", SIZE)
    for index, name in enumerate(("a", "b", "c")):
        await fill(catalogue, "web", index + 1, index)
        await catalogue.create_snapshots([("web", name)])
    await catalogue.clone_volume("copy", "web", "b")
    await catalogue.create_volume("other", SIZE)
    await fill(catalogue, "other", 9)
    found = {info.name: data / "volumes" / info.id for info in await catalogue.list_volumes()}
    await catalogue.close()
    return found


def damages() -> list[Callable[[Path], None]]:
    return [
        lambda path: flip(path, 20),
        lambda path: flip(path, 3),
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(b""),
    ]


@pytest.mark.parametrize("damage", damages())
def test_one_unreadable_manifest_stops_only_its_volume(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        record = (await make(tmp_path))["web"]
        whole = record.read_bytes()
        damage(record)
        layers = sorted((tmp_path / "layers").iterdir())
        with caplog.at_level(logging.ERROR):
            catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        assert str(record) in caplog.text
        assert catalogue.volume_names() == ["copy", "other"]
        found, (lost,) = await catalogue.survey_volumes()
        assert [info.name for info in found] == ["copy", "other"]
        assert (lost.id, lost.name) == (record.name, salvage_name(record.read_bytes()))
        assert str(record) in lost.problem
        assert "offset" in lost.problem
        for opening in (catalogue.show_volume("web"), catalogue.open_volume("web", lambda: None)):
            with pytest.raises((CorruptError, NotFoundError), match=str(record)):
                await opening
        if lost.name is not None:
            with pytest.raises(CorruptError, match=str(record)):
                await catalogue.create_volume("web", SIZE)

        # The clone shares layers with it: none may go with the clone, nor be merged.
        assert await content(catalogue, "copy") == bytes([1] * BLOCK + [2] * (SIZE - BLOCK))
        await catalogue.delete_volume("copy")
        await fill(catalogue, "other", 8)
        await catalogue.create_snapshots(
            [
                ("other", "s"),
            ]
        )
        await fill(catalogue, "other", 7)
        await catalogue.create_snapshots([("other", "t")])
        await catalogue.delete_snapshot("other", "s")
        assert await content(catalogue, "other") == b"\7" * SIZE
        await catalogue.close()
        assert set(layers) <= set((tmp_path / "layers").iterdir())
        assert not (tmp_path / "lost").exists()

        # With its manifest it is whole again, and what was put off is done.
        record.write_bytes(whole)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue._merging.merge_now()
        assert await content(catalogue, "web", "a") == b"\1" * SIZE
        assert await content(catalogue, "web") == bytes(
            [1] * BLOCK + [2] * BLOCK + [3] * (SIZE - 2 * BLOCK)
        )
        assert await content(catalogue, "other", "t") == b"\7" * SIZE
        assert len(await catalogue._store.list_layers()) == 4 + 2
        await catalogue.close()

    asyncio.run(scenario())


def test_an_interrupted_merge_of_an_unreadable_volume_goes_on_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        record = (await make(tmp_path))["web"]
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue.delete_volume("copy")
        # The merge is begun, and the process ends.
        catalogue._merging.stop = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
        merge_copy = "snapshots.merge._punch"
        with pytest.MonkeyPatch.context() as patch:

            def ends(*_: object) -> None:
                raise OSError(5, "ends here")

            patch.setattr(merge_copy, ends)
            with pytest.raises(OSError):
                await catalogue.delete_snapshot("web", "b")
        expected = await content(catalogue, "web", "c")
        await catalogue.close()
        (merge,) = (tmp_path / "merges").iterdir()
        whole = record.read_bytes()
        flip(record, 30)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue._merging.merge_now()
        await catalogue.close()
        assert merge.exists()
        assert (tmp_path / "layers" / merge.name / "merge").exists()
        record.write_bytes(whole)

        # Nothing says which blocks were moved: the volume is refused, and no other.
        record_of_merge = merge.read_bytes()
        flip(merge, 20)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        with pytest.raises(CorruptError, match=str(merge)):
            await catalogue.open_snapshot("web", "c", lambda: None)
        assert await content(catalogue, "other") == b"\t" * SIZE
        await catalogue.close()
        merge.write_bytes(record_of_merge)

        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        assert await content(catalogue, "web", "c") == expected
        await catalogue._merging.merge_now()
        assert await content(catalogue, "web", "c") == expected
        assert list((tmp_path / "merges").iterdir()) == []
        await catalogue.close()

    asyncio.run(scenario())


def test_of_two_volumes_of_one_name_the_later_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = await make(tmp_path)
        aside = tmp_path.parent / "aside"
        records["other"].rename(aside)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue.create_volume("other", SIZE)
        later = (await catalogue.show_volume("other")).id
        await catalogue.close()
        aside.rename(records["other"])
        for layer in (tmp_path / "lost").iterdir():
            layer.rename(tmp_path / "layers" / layer.name)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        assert await content(catalogue, "other") == b"\t" * SIZE
        _, (refused,) = await catalogue.survey_volumes()
        assert (refused.id, refused.name) == (later, "other")
        await catalogue.close()

    asyncio.run(scenario())


def test_damaged_layers_are_in_the_survey_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        await make(tmp_path)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        head = catalogue._manifests.get("other").head
        await catalogue.close()
        flip(tmp_path / "layers" / head / "journal", 512)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        found, (lost,) = await catalogue.survey_volumes()
        assert [info.name for info in found] == ["copy", "web"]
        assert lost.name == "other"
        assert lost.problem.endswith("journal: damaged sector at offset 512")
        with pytest.raises(ExistsError):
            await catalogue.create_volume("other", SIZE)
        await catalogue.close()

    asyncio.run(scenario())


def test_a_damaged_deletion_deletes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        await make(tmp_path)
        (tmp_path / "deletions" / "0011").write_bytes(b"nbdserve, more or less")
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        assert catalogue.volume_names() == ["copy", "other", "web"]
        await catalogue.close()
        assert (tmp_path / "deletions" / "0011").exists()

    asyncio.run(scenario())


@pytest.mark.parametrize("row", [0, 1])
def test_each_file_of_a_large_head_is_looked_at(tmp_path: Path, row: int) -> None:
    """A volume of more than 1 TiB has several; what is written behind a cut would hide it."""

    async def scenario() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue.create_volume("large", 3 << 40)
        handle = await catalogue.open_volume("large", lambda: None)
        for offset in (0, 1 << 40):
            await handle.write(offset, b"x" * 8 * BLOCK)
        await handle.flush()
        await catalogue.close_export(handle)
        head = catalogue._manifests.get("large").head
        data = tmp_path / "layers" / head / f"data-{row:05d}"
        os.truncate(data, 4 * BLOCK)
        handle = await catalogue.open_volume("large", lambda: None)
        for offset in (0, 1 << 40, 2 << 40):
            says = f"read-only: {data}: cut short at offset {4 * BLOCK}"
            with pytest.raises(OSError, match=says):
                await handle.write(offset + 6 * BLOCK, b"y" * BLOCK)
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def test_a_merge_whose_record_was_lost_is_not_served(tmp_path: Path) -> None:
    """Blocks that were moved are nowhere but where its log says."""

    async def scenario() -> None:
        await make(tmp_path)
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        await catalogue.delete_volume("copy")
        punch = merge_module._punch
        with pytest.MonkeyPatch.context() as patch:

            def punches_and_ends(*arguments: Any) -> None:
                punch(*arguments)
                raise OSError(5, "ends here")

            patch.setattr(merge_module, "_punch", punches_and_ends)
            with pytest.raises(OSError):
                await catalogue.delete_snapshot("web", "b")
        await catalogue.close()
        (merge,) = (tmp_path / "merges").iterdir()
        merge.unlink()
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path))
        log = str(tmp_path / "layers" / merge.name / "merge")
        for opening in (
            catalogue.open_snapshot("web", "c", lambda: None),
            catalogue.open_volume("web", lambda: None),
        ):
            with pytest.raises(CorruptError, match=log):
                await opening
        findings = (await catalogue.check_directory(None)).findings
        assert [found.file for found in findings] == [log]
        assert await content(catalogue, "web", "a") == b"\1" * SIZE
        await catalogue.close()

    asyncio.run(scenario())
