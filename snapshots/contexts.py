"""Metadata contexts beside ``base:allocation``: their names, and what they say of a view.

The names and their meaning are qemu's (docs/interop/nbd.rst of its sources), so its tools and the
backup programs that know it read them:

- ``qemu:allocation-depth``: which layer of the stack a block's data is in, 1 the top one, 2 the one
  below, and so on; 0 where no layer has any, so that it reads as zeroes.
- ``qemu:dirty-bitmap:SNAP``: bit 0 where blocks may differ from the snapshot SNAP of the same
  volume. For that SNAP's own view, the **base**, is open in the same process.

**Why no change is missed.** What a block reads as is decided by its owner: a layer, or nobody.
A layer that a snapshot stands on is sealed, what it holds never changes. So where view and base
name the same layer, or both nobody, a block is the same in both; elsewhere it counts as changed,
behind the end of a smaller base too. A volume's head stands under no snapshot, so what was written
since is always seen. A merge moves blocks from one layer to another: it tells all views of a
process in one step, and joins only layers of which every snapshot has both or neither. That is so
only while the snapshot exists: when it is deleted, the base is closed before any of its layers is
merged, and whoever asks then gets an error.

The work of one call is bounded (``OwnerMap.reach``): the answer may be about less than was asked
for, and is never empty.
"""

from __future__ import annotations

from collections.abc import Iterable

from snapshots.names import BLOCK_SHIFT
from snapshots.runs import blocks_of, runs_in_bytes
from snapshots.view import View

ALLOCATION_DEPTH = "qemu:allocation-depth"
_DIRTY_BITMAP = "qemu:dirty-bitmap:"
_DIRTY = 1


def context_names(snapshots: Iterable[str]) -> tuple[str, ...]:
    """The contexts of every export of a volume that has these snapshots."""
    return ALLOCATION_DEPTH, *(_DIRTY_BITMAP + snapshot for snapshot in snapshots)


def base_of(context: str) -> str | None:
    """The snapshot that a context compares with; None when it compares with none."""
    return context.removeprefix(_DIRTY_BITMAP) if context.startswith(_DIRTY_BITMAP) else None


def allocation_depths(view: View, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """``qemu:allocation-depth`` of a range: up to ``limit`` runs (length in bytes, depth)."""
    depths = [0] * 256
    for depth, slot in enumerate(view.slots_by_depth(), start=1):
        depths[slot] = depth
    owners = view.owners
    first, last = blocks_of(offset, length)
    last = owners.reach(first, last)
    runs = ((start, end, depths[slot]) for start, end, slot in owners.runs(first, last))
    return runs_in_bytes(runs, offset, min(offset + length, last << BLOCK_SHIFT), limit, 0)


def changed_blocks(
    view: View, base: View, offset: int, length: int, limit: int
) -> list[tuple[int, int]]:
    """``qemu:dirty-bitmap`` of a range: up to ``limit`` runs (length in bytes, status)."""
    ours, theirs = view.owners, base.owners
    first, last = blocks_of(offset, length)
    last = min(ours.reach(first, last), theirs.reach(first, last))
    differences = ours.differences(theirs, _slots_in(view, base), first, last)
    runs = ((start, end, _DIRTY) for start, end in differences)
    return runs_in_bytes(runs, offset, min(offset + length, last << BLOCK_SHIFT), limit, 0)


def _slots_in(view: View, base: View) -> bytes | None:
    """For each slot of ``base`` the one that ``view`` gives the same layer; None: the same."""
    slots = {layer.name: slot for slot, layer in view.stack}
    if all(slots.get(layer.name) == slot for slot, layer in base.stack):
        return None
    stranger = view.free_slot()
    found = bytearray((0, *(stranger,) * 255))
    for slot, layer in base.stack:
        found[slot] = slots.get(layer.name, stranger)
    return bytes(found)
