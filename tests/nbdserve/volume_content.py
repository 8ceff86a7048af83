"""Write and read a volume of a data directory that no process serves."""

import asyncio
from pathlib import Path

from backends.local_layers import LocalLayerStore
from snapshots.catalogue import Catalogue


def write(data: Path, volume: str, offset: int, content: bytes) -> None:
    """Write ``content`` at ``offset`` and make it durable."""

    async def work() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(data))
        try:
            handle = await catalogue.open_volume(volume, lambda: None)
            await handle.write(offset, content)
            await handle.flush()
            await catalogue.close_export(handle)
        finally:
            await catalogue.close()

    asyncio.run(work())


def read(data: Path, export: str) -> bytes:
    """All of a volume, or of VOL@SNAP."""

    async def work() -> bytes:
        catalogue = await Catalogue.open(LocalLayerStore(data))
        volume, at, snapshot = export.partition("@")
        try:
            if at:
                handle = await catalogue.open_snapshot(volume, snapshot, lambda: None)
            else:
                handle = await catalogue.open_volume(volume, lambda: None)
            content = bytearray(handle.size)
            await handle.read(0, memoryview(content))
            await catalogue.close_export(handle)
            return bytes(content)
        finally:
            await catalogue.close()

    return asyncio.run(work())
