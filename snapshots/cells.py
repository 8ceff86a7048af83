"""Counts which layer of an open view holds which part of it (mapping.py has what for).

Counting goes by the owner map, so untouched regions cost nothing, and it is one region in a turn
of the event loop. Writes, snapshots and merges go on meanwhile: each block is counted once, in the
layer that holds it when it is looked at.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

from snapshots.host import Cell, HostLostError, LayerCells
from snapshots.view import View


class _Count:
    """What was counted so far, by the layers' names: slots are given away again meanwhile."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.cells: list[Cell] = []
        self._numbers: dict[str, int] = {}
        self._cell = -1
        self._held: Counter[str] = Counter()
        self._changed = 0

    def add(self, cell: int, held: dict[str, int], changed: int) -> None:
        """Blocks of a cell; cells come in order."""
        if cell != self._cell:
            self._end_cell()
            self._cell = cell
        self._held.update(held)
        self._changed += changed

    def result(self) -> LayerCells:
        self._end_cell()
        return [(name, self.totals[name]) for name in self._numbers], self.cells

    def _end_cell(self) -> None:
        if self._held:
            name, most = max(self._held.items(), key=lambda item: item[1])
            for each in self._held:
                self._numbers.setdefault(each, len(self._numbers))
            mapped, number = self._held.total(), self._numbers[name]
            self.cells.append(Cell(self._cell, mapped, number, most, self._changed))
            self.totals.update(self._held)
        self._held = Counter()
        self._changed = 0


async def count_cells(view: View, blocks: int, cell_blocks: int, since: str | None) -> LayerCells:
    """Count the first ``blocks`` of an open view (host.py has what comes back)."""
    count = _Count()
    position = 0
    while position < blocks:
        if view.closed:
            raise HostLostError(f"{view.name} was closed meanwhile; try again")
        region = next(view.owners.touched_regions(position, min(blocks, view.owners.blocks)), None)
        if region is None:
            break
        names = {slot: layer.name for slot, layer in view.stack}
        newer = _slots_above(view, since)
        first, position = region
        for cell, start, end in _pieces(first, position, cell_blocks):
            found = view.owners.count_values(start, end)
            held = {names[slot]: number for slot, number in found.items()}
            count.add(cell, held, sum(found[slot] for slot in newer & found.keys()))
        await asyncio.sleep(0)
    return count.result()


def _slots_above(view: View, since: str | None) -> set[int]:
    names = [layer.name for _, layer in view.stack]
    if since not in names:
        return set()
    return {slot for slot, _ in view.stack[names.index(since) + 1 :]}


def _pieces(first: int, last: int, cell_blocks: int) -> Iterator[tuple[int, int, int]]:
    """(cell, start, end): a range cut where cells end."""
    while first < last:
        cell = first // cell_blocks
        end = min(last, (cell + 1) * cell_blocks)
        yield cell, first, end
        first = end
