"""What a client holds of an open volume or snapshot: an export of its own, over a shared view.

A volume is one object however many connections use it; a handle is one connection's. It takes the
view's methods over as attributes, so the data path costs no extra call. ``size`` is the size when
it was opened: an NBD client learns of no other.

A view may be open in another process: then what the catalogue gives out is a lease without a data
path, and the handle is made where the view is.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Protocol

from snapshots.contexts import ALLOCATION_DEPTH, allocation_depths, base_of, changed_blocks
from snapshots.view import View


class Lease(Protocol):
    """An open export, as the catalogue gives it out; ``revoke`` asks its owner to let go of it."""

    @property
    def key(self) -> str:
        """The id of the volume or snapshot."""

    @property
    def name(self) -> str:
        """As clients know it."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def read_only(self) -> bool:
        """Whether it is a snapshot."""

    @property
    def block_size(self) -> int:
        """Bytes of a block."""

    @property
    def revoke(self) -> Callable[[], None]:
        """Asks the owner to let go."""


class Handle:
    """A lease with its data path (see the module's text).

    ``bases`` are the views that metadata contexts compare with, by the context's name; None, or
    closed: the snapshot was deleted.
    """

    def __init__(
        self,
        key: str,
        name: str,
        view: View,
        revoke: Callable[[], None],
        bases: Mapping[str, View | None],
    ) -> None:
        self.key = key
        self.name = name
        self.view = view
        self.bases = bases
        self.revoke = revoke
        self.read_only = view.read_only
        self.block_size = view.block_size
        self.try_read = view.try_read
        self.read = view.read
        self.is_data = view.is_data
        self.try_lend = view.try_lend
        self.borrowers = view.borrowers
        self.extents = view.extents
        self.try_write = view.try_write
        self.write = view.write
        self.write_zeroes = view.write_zeroes
        self.trim = view.trim
        self.cache = view.cache
        self.flush = view.flush
        self.note = view.note

    @property
    def size(self) -> int:
        """Bytes that it has now: who has it open may use what a volume has grown by."""
        return self.view.size

    def status(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """Up to ``limit`` runs (length in bytes, status) of a metadata context (contexts.py).

        At least one; they may end before the range does. OSError when its snapshot was deleted.
        """
        if context == ALLOCATION_DEPTH:
            return allocation_depths(self.view, offset, length, limit)
        base = self.bases[context]
        if base is None or base.closed:
            raise OSError(
                errno.EIO,
                f"snapshot {base_of(context)} was deleted: what changed since is not known",
            )
        return changed_blocks(self.view, base, offset, length, limit)
