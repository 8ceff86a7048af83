"""Export names over a real catalogue."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from backends.errors import NotFoundError
from backends.local_layers import LocalLayerStore
from nbdserve.protocol.constants import BASE_ALLOCATION
from nbdserve.registry import CatalogueExports
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle

MIB = 1 << 20


def run(path: Path, work: Callable[[Catalogue, CatalogueExports], Awaitable[None]]) -> None:
    async def scene() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(path))
        try:
            for name in ("b", "a"):
                await catalogue.create_volume(name, MIB)
            await catalogue.create_snapshots([("a", "one")])
            await catalogue.resize_volume("a", 2 * MIB)
            await work(catalogue, CatalogueExports(catalogue, True))
        finally:
            await catalogue.close()

    asyncio.run(scene())


def test_exports_are_volumes_and_snapshots(tmp_path: Path) -> None:
    async def work(catalogue: Catalogue, exports: CatalogueExports) -> None:
        assert exports.list_names() == ["a", "b"]
        described = [await exports.describe(name) for name in ("a", "a@one")]
        assert [(d.name, d.size, d.read_only, d.block_size) for d in described] == [
            ("a", 2 * MIB, False, 4096),
            ("a@one", MIB, True, 4096),
        ]
        assert all(description.rotational for description in described)
        for description in described:
            export = await exports.open(description.name, (), lambda: None)
            assert (export.name, export.size) == (description.name, description.size)
            assert export.read_only is description.read_only
            assert export.block_size == description.block_size
            assert (await catalogue.show_volume("a")).clients == (0 if export.read_only else 1)
            await exports.close(export)
        assert (await catalogue.show_volume("a")).clients == 0

    run(tmp_path, work)


def test_volumes_and_snapshots_have_the_contexts_of_all_snapshots(tmp_path: Path) -> None:
    async def work(catalogue: Catalogue, exports: CatalogueExports) -> None:
        for name in ("two", "again"):
            await catalogue.create_snapshots([("a", name)])
        await catalogue.delete_snapshot("a", "two")
        depth = "qemu:allocation-depth"
        bitmaps = ("qemu:dirty-bitmap:one", "qemu:dirty-bitmap:again")
        for name in ("a", "a@one", "a@again"):
            assert (await exports.describe(name)).contexts == (BASE_ALLOCATION, depth, *bitmaps)
        assert (await exports.describe("b")).contexts == (BASE_ALLOCATION, depth)
        for name in ("a", "a@one"):
            export = await exports.open(name, (BASE_ALLOCATION, depth, *bitmaps), lambda: None)
            assert isinstance(export, Handle)
            for context in (depth, *bitmaps):
                assert export.status(context, 0, export.size, 9) == [(export.size, 0)]
            await exports.close(export)
        for name in ("a", "a@one", "b"):
            # Deleted since the client chose it.
            with pytest.raises(NotFoundError, match=f"snapshot {name[0]}@two does not exist"):
                await exports.open(name, ("qemu:dirty-bitmap:two",), lambda: None)
        assert not any(info.clients for info in await catalogue.list_volumes())

    run(tmp_path, work)


def test_names_that_are_no_export(tmp_path: Path) -> None:
    async def work(catalogue: Catalogue, exports: CatalogueExports) -> None:
        names = [
            "",
            "c",
            "a@",
            "@one",
            "a@two",
            "b@one",
            "a@one@one",
            "..",
            "a/b",
            "a\0",
            "x" * 4096,
        ]
        for name in names:
            for attempt in (exports.describe(name), exports.open(name, (), lambda: None)):
                with pytest.raises(NotFoundError):
                    await attempt

    run(tmp_path, work)
