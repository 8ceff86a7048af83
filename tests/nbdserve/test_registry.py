"""Export names over a real catalogue."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from backends.errors import NotFoundError
from backends.local_layers import LocalLayerStore
from nbdserve.registry import CatalogueExports
from snapshots.catalogue import Catalogue

MIB = 1 << 20


def run(path: Path, work: Callable[[Catalogue, CatalogueExports], Awaitable[None]]) -> None:
    async def scene() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(path))
        try:
            for name in ("b", "a"):
                await catalogue.create_volume(name, MIB)
            await catalogue.create_snapshots([("a", "one")])
            await catalogue.resize_volume("a", 2 * MIB)
            await work(catalogue, CatalogueExports(catalogue))
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
        for description in described:
            export = await exports.open(description.name, lambda: None)
            assert (export.name, export.size) == (description.name, description.size)
            assert export.read_only is description.read_only
            assert export.block_size == description.block_size
            assert (await catalogue.show_volume("a")).clients == (0 if export.read_only else 1)
            await exports.close(export)
        assert (await catalogue.show_volume("a")).clients == 0

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
            for attempt in (exports.describe(name), exports.open(name, lambda: None)):
                with pytest.raises(NotFoundError):
                    await attempt

    run(tmp_path, work)
