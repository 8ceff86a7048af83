"""What must go on when the disk is full may use the space that the store keeps back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from backends.errors import NoSpaceError
from backends.layers import LayerStore

T = TypeVar("T")


async def with_reserve(store: LayerStore, operation: Callable[[], Awaitable[T]]) -> T:
    """Do ``operation``; when there is no space for it, free the reserve and do it again."""
    try:
        return await operation()
    except NoSpaceError:
        if not await store.release_reserve():
            raise
        return await operation()
