"""Which directories become data directories, and which are left alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from backends.errors import InUseError, InvalidError
from backends.local_layers import LocalLayerStore


def test_a_directory_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InvalidError, match="not empty and not a data directory"):
        asyncio.run(LocalLayerStore(tmp_path).lock())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_an_empty_file_system_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()

    async def lock_twice() -> None:
        store = LocalLayerStore(tmp_path)
        await store.lock()
        with pytest.raises(InUseError):
            await LocalLayerStore(tmp_path).lock()
        await store.unlock()
        await LocalLayerStore(tmp_path).lock()

    asyncio.run(lock_twice())


def test_a_file_is_no_data_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidError, match="cannot be used"):
        asyncio.run(LocalLayerStore(tmp_path / "file").lock())
