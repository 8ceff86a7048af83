"""What a client holds of an open volume or snapshot: an export of its own, over a shared view.

A volume is one object however many connections use it; a handle is one connection's. It takes the
view's methods over as attributes, so the data path costs no extra call. ``size`` is the size when
it was opened: an NBD client learns of no other.
"""

from __future__ import annotations

from collections.abc import Callable

from snapshots.view import View


class Handle:
    """An open export (see the module's text); ``revoke`` asks its owner to let go of it."""

    def __init__(self, name: str, view: View, revoke: Callable[[], None]) -> None:
        self.name = name
        self.view = view
        self.revoke = revoke
        self.size = view.size
        self.read_only = view.read_only
        self.block_size = view.block_size
        self.try_read = view.try_read
        self.read = view.read
        self.extents = view.extents
        self.try_write = view.try_write
        self.write = view.write
        self.write_zeroes = view.write_zeroes
        self.trim = view.trim
        self.cache = view.cache
        self.flush = view.flush
