"""Reading again what arrived damaged: it may have been damaged on its way only.

Over plain HTTP nothing but TCP's weak checksum protects a reply. What the store itself has damaged
is damaged each time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from backends.errors import CorruptError

Result = TypeVar("Result")

TRIES = 3


def insist(attempt: Callable[[], Result]) -> Result:
    """The result of ``attempt``, which reads and checks; tried again when it is a CorruptError."""
    for _ in range(TRIES - 1):
        with suppress(CorruptError):
            return attempt()
    return attempt()
