"""What a client holds of an open volume or snapshot: an export of its own, over a shared view.

A volume is one object however many connections use it; a handle is one connection's. It takes the
view's methods over as attributes, so the data path costs no extra call. ``size`` is the size when
it was opened: an NBD client learns of no other.

A view may be open in another process: then what the catalogue gives out is a lease without a data
path, and the handle is made where the view is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from snapshots.view import View


class Lease(Protocol):
    """An open export, as the catalogue gives it out; ``revoke`` asks its owner to let go of it."""

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
    """A lease with its data path (see the module's text)."""

    def __init__(self, name: str, view: View, revoke: Callable[[], None]) -> None:
        self.name = name
        self.view = view
        self.revoke = revoke
        self.size = view.size
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
