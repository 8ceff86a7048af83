"""What a FLUSH costs on real files: how many syncs, of which (docs/performance.md)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backends.local_layers import LocalLayerStore
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from tests.snapshots.stores import BLOCK, run

MIB = 1 << 20


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were synced, by the first part of their name."""
    names: list[str] = []

    def noting(name: str) -> None:
        call = getattr(os, name)

        def sync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            kind = path.name.partition("-")[0]
            if kind in ("data", "journal"):  # other files are not the FLUSH's
                names.append(kind)
            call(descriptor)

        monkeypatch.setattr(os, name, sync)

    noting("fdatasync")
    noting("fsync")
    return names


def test_one_sync_for_old_blocks_and_two_for_new_ones(syncs: list[str], tmp_path: Path) -> None:
    async def flushed(handle: Handle, first: int) -> list[str]:
        syncs.clear()
        await handle.write(first * BLOCK, bytes([7]) * (2 * BLOCK))
        await handle.flush()
        return list(syncs)

    async def scenario() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(tmp_path / "data"))
        await catalogue.create_volume("v", 64 * MIB)
        handle = await catalogue.open_volume("v", lambda: None)
        # The first write makes the data file, whose name is synced as well.
        await flushed(handle, 0)
        assert await flushed(handle, 0) == ["data"]
        costs = [await flushed(handle, block) for block in range(2, 1200, 4)]
        new = ["data", "journal"]
        # Room for more of the journal is made rarely, and is durable before it is written to.
        assert costs.count(new) >= len(costs) - 5
        assert all(cost in (new, [*new, "journal"]) for cost in costs)
        await catalogue.create_snapshots([("v", "one")])
        assert await flushed(handle, 2) == new
        assert await flushed(handle, 2) == ["data"]
        syncs.clear()
        await handle.flush()
        assert syncs == []
        await catalogue.close_export(handle)
        await catalogue.close()

    run(scenario())
