"""Merges leave the disk to guests for half of the time, while there are any requests.

After each chunk, whether anything was asked since is found in what the processes have counted; then
there is a pause as long as the chunk has taken, MOST_PAUSE at most. So a merge always goes on, at
half its speed at the least, and at full speed when nobody is served. Asking costs workers a moment
itself, so what was found holds for INTERVAL.
"""

import asyncio
import time
from typing import Final

from nbdserve.measuring import Measuring

MOST_PAUSE: Final = 0.5
"""Seconds of one pause."""

INTERVAL: Final = 0.5
"""Seconds for which it is known whether somebody is served."""


class Pacing:
    """``pause`` is called after each chunk, with the seconds that it took."""

    def __init__(self, measuring: Measuring) -> None:
        self._measuring = measuring
        self._count = 0
        self._asked = float("-inf")
        self._busy = False

    async def pause(self, seconds: float) -> None:
        now = time.monotonic()
        if now - self._asked >= INTERVAL:
            self._asked = now
            await self._measuring.ask()
            count = self._measuring.count()
            self._busy = count != self._count
            self._count = count
        if self._busy:
            await asyncio.sleep(min(seconds, MOST_PAUSE))
