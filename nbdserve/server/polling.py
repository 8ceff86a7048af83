"""When it pays to try to receive again before going back to the event loop.

A client that sends one request at a time sends the next some 20 to 60 µs after our reply. Going
back to the event loop, and being woken by it, costs about as much again: at a queue depth of 1
that is a third of the time. So after a reply the transmission may try again for a while, under
these rules:

- Only for a client whose next request came soon after the reply, several times running.
- For LONGEST seconds after each reply, and a TURN in a row; then the loop has its turn.
- Only while nobody else is served: when another connection had a turn since this one's last, the
  loop is busy anyway, and polling would take time from the others. A TLS relay in the same loop
  counts as somebody else (``disturb``), and what it relays is never waited for: it has to bring it.
- In the middle of a request, whose rest is on its way, the first rule does not count.
- MISSES in vain, and it is over until the client has shown again that it is quick. An idle or slow
  client costs nothing.
"""

from __future__ import annotations

from time import perf_counter
from typing import ClassVar, Final

LONGEST: Final = 100e-6
"""Seconds that one request is waited for."""

TURN: Final = 1e-3
"""Seconds after which the event loop has its turn, however quick the client is."""

_SOON: Final = 250e-6  # from a reply to the next request, through the event loop
_QUICK: Final = 8  # such requests running, before polling begins
_MISSES: Final = 3


class Polling:
    """Keeps count for one connection."""

    __slots__ = ("_misses", "_quick", "_replied")

    _served: ClassVar[Polling | None] = None

    def __init__(self) -> None:
        self._quick = 0
        self._misses = 0
        self._replied = 0.0

    @staticmethod
    def disturb() -> None:
        """Something other than a transmission was served: a relay, which polling would hold up."""
        Polling._served = None

    def woken(self) -> bool:
        """The event loop says that there is something to receive; whether nobody else is served."""
        if Polling._served is not self:
            Polling._served = self
            self._quick = 0
            return False
        if perf_counter() - self._replied < _SOON:
            self._quick += 1
        else:
            self._quick = 0
        return True

    def replied(self, now: float) -> bool:
        """All that was received is answered and sent: whether to try to receive again at once."""
        self._replied = now
        return self._quick >= _QUICK

    def hit(self) -> None:
        """Trying again was worth it."""
        self._misses = 0

    def missed(self) -> None:
        """Trying again was in vain."""
        self._misses += 1
        if self._misses >= _MISSES:
            self._misses = 0
            self._quick = 0
