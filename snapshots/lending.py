"""Loans: replies that refer to the page cache until the client has received them.

A long read from the page cache is sent with sendfile(2), which copies nothing: on a Unix socket,
what lies in the client's receive queue *is* the page cache. So what happens to those bytes of a
layer meanwhile happens to the reply:

- A client's own write or TRIM: the two requests were under way together, either result is right.
- Deleting a layer: the pages live on for as long as the reply refers to them.
- A merge that punches blocks which it has copied elsewhere: part of a large page is zeroed in
  place. The reply would turn into zeroes. So nothing is lent from a layer whose blocks are moved
  away, and before the first of them is punched all loans are back, which the **borrowers**, the
  connections, can tell: everything that they had sent by then has been received.

A client may hand the pages on without copying (splice(2)), and one that was cut off may still read
what it has been sent. GRACE is for those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set
from typing import Final, Protocol

MIN_LOAN: Final = 32 << 10
"""Shortest piece of a file, in bytes, that is lent: shorter ones are cheaper to copy."""

GRACE: Final = 1.0
"""Seconds from the last loan until it counts as returned, at the least."""

RECALL: Final = 10.0
"""Seconds that clients have to receive what was lent."""

_PAUSE: Final = 0.02


class Borrower(Protocol):
    """A connection that sends what it is lent."""

    def mark(self) -> int:
        """Where its stream of replies ends now, those on loan included."""

    def has_passed(self, mark: int) -> bool:
        """Whether the client has received its replies up to ``mark``."""


async def wait_for_loans(borrowers: Set[Borrower]) -> bool:
    """Wait until everything lent before this call is back; False when RECALL was not enough."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + RECALL
    waiting = [(borrower, borrower.mark()) for borrower in borrowers]
    await asyncio.sleep(GRACE)
    while waiting := [(found, mark) for found, mark in waiting if not found.has_passed(mark)]:
        if loop.time() > deadline:
            return False
        await asyncio.sleep(_PAUSE)
    return True
