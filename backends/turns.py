"""How many requests a store is sent at once: fewer when it asks to slow down.

An object store that has too much to do says so (503 SlowDown, 429), and expects less, not only
later. So every request to a store, from whatever thread, takes a turn, and there is a *bound* on
how many turns are taken at once. It moves as TCP's congestion window does (additive increase,
multiplicative decrease):

- It begins at ``most``, and is never more than that nor less than 1.
- An answer *throttled* halves what is in flight at that moment, and that is the new bound. But only
  once for all requests that began before: they were sent under the old bound, and what they say is
  no news.
- An answer *served* adds ``1 / bound``: one more for each round of as many requests as the bound.
- Any other end (an error, a time-out, an exception) leaves it alone.

Turns are handed out in the order in which they were asked for, so nobody starves. What is in flight
when the bound falls is not called back; none begins before fewer than the new bound are.

Who waits for a turn has done nothing wrong, but must not wait for ever. So its *patience* is how
long it waits without anybody being served: each answer *served* to another begins it anew. The
part of a wait that ended with such an answer is *excused*: it does not count towards the caller's
deadline, for the store worked, on the requests before.

``stop`` is for leaving: who waits is refused a turn at once, and from then on who would have to.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from enum import Enum, auto
from types import TracebackType


class Answer(Enum):
    """How a request ended."""

    SERVED = auto()
    THROTTLED = auto()
    OTHER = auto()


class Turn:
    """A request that may be sent. Set ``answer`` before its ``with`` block is left."""

    def __init__(self, turns: Turns, halvings: int, excused: float) -> None:
        self.answer = Answer.OTHER
        self.excused = excused  # seconds of the wait for it, see the module's text
        self._turns = turns
        self._halvings = halvings

    def __enter__(self) -> Turn:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turns._give_back(self.answer, self._halvings)


class Turns:
    """See the module's text. All methods may be called from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bound = float(most)
        self._in_flight = 0
        self._halvings = 0  # how many there were: tells what a request began under
        self._served = -1.0  # when anybody was last
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()
        self._stopped = False

    @property
    def bound(self) -> int:
        return int(self._bound)

    def take(self, patience: float) -> Turn | None:
        """Wait for a turn; None when nobody was served for ``patience`` seconds, or at ``stop``."""
        place = object()
        with self._changed:
            began = time.monotonic()
            self._waiting.append(place)
            try:
                while self._waiting[0] is not place or self._in_flight >= self.bound:
                    left = max(began, self._served) + patience - time.monotonic()
                    if left <= 0 or self._stopped:
                        return None
                    self._changed.wait(left)
                self._in_flight += 1
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()  # there is another first one now
            return Turn(self, self._halvings, max(0.0, self._served - began))

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _give_back(self, answer: Answer, halvings: int) -> None:
        with self._changed:
            if answer is Answer.SERVED:
                self._served = time.monotonic()
                self._bound = min(float(self._most), self._bound + 1 / self._bound)
            elif answer is Answer.THROTTLED and halvings == self._halvings:
                self._halvings += 1
                self._bound = float(max(1, min(self.bound, self._in_flight) // 2))
            self._in_flight -= 1
            self._changed.notify_all()
