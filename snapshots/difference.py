"""What changed between two states of a volume.

The layers of two stacks are the same up to where they part; a block can differ only when a layer
that is in one stack but not in the other says something of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from backends.layers import LayerStore
from snapshots.layer import apply_layer
from snapshots.names import BLOCK_SHIFT
from snapshots.owner_map import OwnerMap


@dataclass(frozen=True)
class Extent:
    """A range in bytes that may differ; ``zero``: it reads as zeroes in the newer state."""

    offset: int
    length: int
    zero: bool


def layers_between(parents: Mapping[str, str], one: str, other: str) -> list[str]:
    """The layers that are in one of two stacks, named by their top layers, but not in both."""
    stacks = [list(_down(parents, top)) for top in (one, other)]
    common = set(stacks[0]) & set(stacks[1])
    return [layer for stack in stacks for layer in stack if layer not in common]


async def touched_by(store: LayerStore, layers: Iterable[str], blocks: int) -> OwnerMap:
    """A map of ``blocks`` with 1 where any of ``layers`` says something; the caller closes it."""
    touched = OwnerMap(blocks)
    try:
        for layer in layers:
            await apply_layer(store, layer, touched, 1, 1)
    except BaseException:
        touched.close()
        raise
    return touched


def changed_extents(touched: OwnerMap, newer: OwnerMap) -> list[Extent]:
    """What ``touched`` has, cut where ``newer``, a view's map, changes between data and zeroes."""
    found: list[Extent] = []

    def add(first: int, last: int, zero: bool) -> None:
        found.append(Extent(first << BLOCK_SHIFT, (last - first) << BLOCK_SHIFT, zero))

    for first, last in touched.owned_runs(0, newer.blocks):
        position = first
        for start, end in newer.owned_runs(first, last):
            if start > position:
                add(position, start, True)
            add(start, end, False)
            position = end
        if position < last:
            add(position, last, True)
    return found


def _down(parents: Mapping[str, str], top: str) -> Iterator[str]:
    while top:
        yield top
        top = parents[top]
