"""Maps of layers against what the layers' own logs say, block by block."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from backends.errors import InvalidError, NotFoundError
from backends.memory_layers import MemoryLayerStore
from snapshots import cells as cells_module
from snapshots.catalogue import Catalogue
from snapshots.host import Cell
from snapshots.layer import apply_layer
from snapshots.mapping import MAX_CELLS, VolumeMap, cell_blocks_for
from snapshots.owner_map import DATA, REGION, OwnerMap
from tests.snapshots.stores import BLOCK, run, until

LABEL = "kept"
BLOCKS = 40


async def owners_of(catalogue: Catalogue, name: str) -> tuple[list[str], list[str | None]]:
    """The layers of a volume, and for each block the one that holds it, by the layers' logs."""
    manifest = catalogue._manifests.get(name)
    blocks = manifest.size // BLOCK
    owners: list[str | None] = [None] * blocks
    stack = manifest.stack(manifest.head)
    for layer in stack:
        says = OwnerMap(manifest.largest() // BLOCK)
        await apply_layer(catalogue._store, layer, says)
        for block in range(blocks):
            if says.raw[block]:
                owners[block] = layer if says.raw[block] == DATA else None
        says.close()
    return stack, owners


async def settled(catalogue: Catalogue) -> None:
    """Wait until layers are no longer merged: the slow way takes several looks at them."""
    await until(lambda: not catalogue._merging._tasks and not catalogue._tasks)


async def slow_map(catalogue: Catalogue, name: str, cells: int) -> dict[str, Any]:
    stack, owners = await owners_of(catalogue, name)
    manifest = catalogue._manifests.get(name)
    kept = [each for each in manifest.snapshots if LABEL in each.labels and each.layer in stack]
    base = max(kept, key=lambda each: each.created, default=None)
    newer = set() if base is None else set(stack[stack.index(base.layer) + 1 :])
    blocks = 1
    while -(-len(owners) // blocks) > cells:
        blocks *= 2
    filled = []
    for start in range(0, len(owners), blocks):
        held = Counter(layer for layer in owners[start : start + blocks] if layer)
        if held:
            changed = sum(number for layer, number in held.items() if layer in newer)
            filled.append((start // blocks, held, changed))
    return {
        "stack": stack,
        "since": base,
        "newer": newer,
        "blocks": blocks,
        "cells": -(-len(owners) // blocks),
        "totals": Counter(layer for layer in owners if layer),
        "filled": filled,
    }


def check(found: VolumeMap, expected: dict[str, Any]) -> None:
    assert [layer.layer for layer in found.layers] == expected["stack"]
    assert {layer.layer for layer in found.layers if layer.changed} == expected["newer"]
    totals = expected["totals"]
    assert {layer.layer: layer.mapped // BLOCK for layer in found.layers if layer.mapped} == totals
    assert found.mapped == totals.total() * BLOCK
    assert found.since == expected["since"]
    changed = sum(number for layer, number in totals.items() if layer in expected["newer"])
    assert found.changed == (None if found.since is None else changed * BLOCK)
    assert (found.cell_size, found.cells) == (expected["blocks"] * BLOCK, expected["cells"])
    assert len(found.filled) == len(expected["filled"])
    for cell, (number, held, newer) in zip(found.filled, expected["filled"], strict=True):
        most = held[found.layers[cell.layer].layer]
        assert most == max(held.values())
        assert cell == Cell(number, held.total(), cell.layer, most, newer)


places = st.integers(0, BLOCKS - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), places, places),
        st.tuples(st.just("write"), places, places),
        st.tuples(st.just("trim"), places, places),
        st.tuples(st.just("snapshot"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("delete"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("rollback"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("grow"), st.integers(1, 9), st.just(0)),
        st.tuples(st.just("close"), st.just(0), st.just(0)),
    ),
    max_size=14,
)


async def play(catalogue: Catalogue, actions: list[tuple[str, int, int]]) -> None:
    """Do ``actions`` to a volume; at the end everything is in its layers' logs."""
    await catalogue.create_volume("a", BLOCKS * BLOCK)
    handle: Any = None

    async def close() -> None:
        nonlocal handle
        if handle is not None:
            await catalogue.close_export(handle)
            handle = None

    for kind, one, other in actions:
        names = [found.name for found in catalogue.list_snapshots("a")]
        if kind in ("write", "trim"):
            if handle is None:
                handle = await catalogue.open_volume("a", lambda: None)
            first, last = min(one, other), max(one, other) + 1
            first, last = min(first, handle.size // BLOCK - 1), min(last, handle.size // BLOCK)
            if kind == "trim":
                await handle.trim(first * BLOCK, (last - first) * BLOCK)
            else:
                await handle.write(first * BLOCK, b"x" * (last - first) * BLOCK)
        elif kind == "snapshot" and f"s{one}" not in names:
            await catalogue.create_snapshots([("a", f"s{one}")], {LABEL: "r"} if other else {})
        elif kind == "delete" and f"s{one}" in names:
            await catalogue.delete_snapshot("a", f"s{one}")
        elif kind == "rollback" and f"s{one}" in names:
            await close()
            await catalogue.rollback("a", f"s{one}")
        elif kind == "grow":
            await close()
            await catalogue.resize_volume("a", catalogue.volume_size("a") + one * BLOCK)
        elif kind == "close":
            await close()
    if handle is not None:
        await handle.flush()
        if len(actions) % 2:
            await close()


@settings(max_examples=80, deadline=None)
@given(steps, st.integers(1, 2 * BLOCKS))
def test_a_map_says_what_the_layers_say(actions: list[tuple[str, int, int]], cells: int) -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(MemoryLayerStore())
        await play(catalogue, actions)
        await settled(catalogue)
        for number in (cells, 1):
            found = await catalogue.map_volume("a", number, LABEL)
            check(found, await slow_map(catalogue, "a", number))
            snapshots = catalogue.list_snapshots("a")
            shown = [name for layer in found.layers for name in layer.snapshots]
            manifest = catalogue._manifests.get("a")
            stack = manifest.stack(manifest.head)
            assert sorted(shown) == sorted(
                each.name for each in manifest.snapshots if each.layer in stack
            )
            assert len(snapshots) >= len(shown)
        await catalogue.close()

    run(scenario())


def test_large_regions_are_counted_like_small_ones() -> None:
    blocks = 5 * REGION + 123

    async def scenario() -> None:
        catalogue = await Catalogue.open(MemoryLayerStore())
        await catalogue.create_volume("a", blocks * BLOCK)
        handle: Any = await catalogue.open_volume("a", lambda: None)
        source = random.Random(7)
        owners = catalogue._views.get(catalogue._manifests.get("a").id)
        assert owners is not None
        # The map alone is written: what is counted is no different for it.
        view: Any = catalogue._views.hosts[0].view(owners.key)  # type: ignore[attr-defined]
        for number in range(3):
            slot = view.head.slot
            for _ in range(400):
                first = source.randrange(blocks)
                view.owners.set(first, min(blocks, first + source.randrange(1, 60)), slot)
            view.owners.set(3 * REGION, 4 * REGION, slot)
            await catalogue.create_snapshots([("a", f"s{number}")], {LABEL: "r"})
        await handle.write(0, b"x" * BLOCK)
        for cells in (1, 7, 160, MAX_CELLS):
            found = await catalogue.map_volume("a", cells, LABEL)
            assert found.since is not None and found.since.name == "s2"
            assert found.changed == BLOCK
            names = {slot: layer.name for slot, layer in view.stack}
            per_cell = cell_blocks_for(blocks, cells)
            assert found.cells <= cells < 2 * found.cells + 2
            by_cell: dict[int, Counter[str]] = {}
            for block, slot in enumerate(view.owners.raw[:]):
                if slot:
                    by_cell.setdefault(block // per_cell, Counter())[names[slot]] += 1
            assert [cell.number for cell in found.filled] == sorted(by_cell)
            for cell in found.filled:
                held = by_cell[cell.number]
                assert cell.mapped == held.total()
                assert cell.most == max(held.values()) == held[found.layers[cell.layer].layer]
        view.owners.set(0, blocks, 0)
        await catalogue.close_export(handle)
        await catalogue.close()

    run(scenario())


def test_an_empty_volume_of_the_largest_size_costs_nothing() -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(MemoryLayerStore())
        await catalogue.create_volume("a", 16 << 40)
        found = await catalogue.map_volume("a", 1000, LABEL)
        assert (found.cell_size, found.cells) == (32 << 30, 512)
        assert (found.mapped, found.changed, found.filled) == (0, None, ())
        handle: Any = await catalogue.open_volume("a", lambda: None)
        await handle.write((16 << 40) - BLOCK, b"x" * BLOCK)
        turns = 0
        mapping = asyncio.ensure_future(catalogue.map_volume("a", MAX_CELLS, LABEL))
        while not mapping.done():
            await asyncio.sleep(0)
            turns += 1
        assert mapping.result().filled == (Cell(4095, 1, 0, 1, 0),)
        assert turns < 200
        await catalogue.close_export(handle)
        await catalogue.close()

    run(scenario())


def test_what_cannot_be_mapped_is_named() -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(MemoryLayerStore())
        await catalogue.create_volume("a", BLOCK)
        for cells in (0, -1, MAX_CELLS + 1):
            with pytest.raises(InvalidError, match=f"1 to {MAX_CELLS} cells, not {cells}"):
                await catalogue.map_volume("a", cells, LABEL)
        with pytest.raises(NotFoundError, match="volume b does not exist"):
            await catalogue.map_volume("b", 1, LABEL)
        await catalogue.close()

    run(scenario())


class Held:
    """Stops counting after the first region until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.counts = 0
        counting = cells_module.count_cells

        async def held(*arguments: Any) -> Any:
            self.counts += 1
            if self.counts == 1:
                self.begun.set()
                await self.go_on.wait()
            return await counting(*arguments)

        monkeypatch.setattr("snapshots.local_host.count_cells", held)


@pytest.mark.parametrize("change", ["rollback", "delete", "snapshot", "merge", "write"])
def test_nothing_waits_for_a_map(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(MemoryLayerStore())
        await catalogue.create_volume("a", 8 * BLOCK)
        handle: Any = await catalogue.open_volume("a", lambda: None)
        await handle.write(0, b"x" * BLOCK)
        await catalogue.create_snapshots([("a", "one")], {LABEL: "r"})
        await handle.write(BLOCK, b"y" * BLOCK)
        await catalogue.create_snapshots([("a", "two")])
        await handle.write(2 * BLOCK, b"z" * BLOCK)
        if change in ("rollback", "delete"):
            await catalogue.close_export(handle)
        held = Held(monkeypatch)
        mapping = asyncio.ensure_future(catalogue.map_volume("a", 8, LABEL))
        await held.begun.wait()
        async with asyncio.timeout(20):
            if change == "rollback":
                await catalogue.rollback("a", "one")
            elif change == "delete":
                await catalogue.delete_volume("a", with_snapshots=True)
            elif change == "snapshot":
                await catalogue.create_snapshots([("a", "three")], {LABEL: "r"})
            elif change == "merge":
                await catalogue.delete_snapshot("a", "two")
            else:
                await handle.write(3 * BLOCK, b"z" * BLOCK)
        if change == "rollback":
            # Whoever comes now finds the volume as it was rolled back, not what is being counted.
            handle = await catalogue.open_volume("a", lambda: None)
            content = bytearray(8 * BLOCK)
            await handle.read(0, memoryview(content))
            assert content == b"x" * BLOCK + bytes(7 * BLOCK)
        held.go_on.set()
        if change == "delete":
            with pytest.raises(NotFoundError, match="volume a does not exist"):
                await mapping
        else:
            found = await mapping
            await handle.flush()
            await settled(catalogue)
            check(found, await slow_map(catalogue, "a", 8))
            assert held.counts == (1 if change == "write" else 2)
        if change == "rollback":
            assert [cell.number for cell in found.filled] == [0]
        if change != "delete":
            await catalogue.close_export(handle)
        await until(lambda: not catalogue._views._open)
        await catalogue.close()

    run(scenario())


def test_many_maps_at_once_leave_the_view_closed() -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(MemoryLayerStore())
        await catalogue.create_volume("a", 4 * REGION * BLOCK)
        handle: Any = await catalogue.open_volume("a", lambda: None)
        for number in range(4):
            await handle.write(number * REGION * BLOCK, b"x" * BLOCK)
        await catalogue.close_export(handle)
        maps = [asyncio.ensure_future(catalogue.map_volume("a", 4, LABEL)) for _ in range(10)]
        await asyncio.sleep(0)
        maps[3].cancel()
        await asyncio.gather(*maps, return_exceptions=True)
        assert {len(task.result().filled) for task in maps if not task.cancelled()} == {4}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await until(lambda: not catalogue._views._open)
        assert not catalogue._views._open
        await catalogue.close()

    run(scenario())
