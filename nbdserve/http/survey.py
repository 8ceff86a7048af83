"""What is known of all volumes, looked up seldom enough.

Looking at every volume takes a moment of the catalogue and of the disk, longer the more there are.
So it is done at most once a second and for at most a tenth of the time, however many ask; who
comes in between, and who has waited for PATIENCE seconds, gets what was seen last.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from backends.errors import StorageError
from snapshots.catalogue import Catalogue
from snapshots.listings import VolumeInfo
from snapshots.manifest_store import UnreadableVolume
from snapshots.space import Room

PATIENCE: Final = 2.0
"""Seconds that somebody who asks waits for a new look."""

_LEAST_SECONDS: Final = 1.0
_SHARE: Final = 10  # of the time between two looks, one part is looking


@dataclass(frozen=True)
class Seen:
    """The volumes, the room for them, and when that was looked at (``time.monotonic``)."""

    volumes: Sequence[VolumeInfo]
    unreadable: Sequence[UnreadableVolume]
    room: Room | None
    at: float


class Survey:
    """See the module's text."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._last = Seen((), (), None, float("-inf"))
        self._next = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    async def look(self) -> Seen | None:
        """The last look; None while there was none."""
        if self._looking is None and time.monotonic() >= self._next:
            self._looking = asyncio.create_task(self._look())
        if self._looking is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await asyncio.shield(self._looking)
        return None if self._last.at == float("-inf") else self._last

    async def _look(self) -> None:
        begun = time.monotonic()
        try:
            volumes, unreadable = await self._catalogue.survey_volumes()
            room = await self._catalogue.space.measure()
            self._last = Seen(volumes, unreadable, room, time.monotonic())
        except (OSError, StorageError):
            pass  # the daemon is stopping; what is known stays
        finally:
            ended = time.monotonic()
            self._next = ended + max(_LEAST_SECONDS, _SHARE * (ended - begun))
            self._looking = None


SURVEY = web.AppKey("survey", Survey)
