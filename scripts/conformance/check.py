"""What a check is: a sentence of the specification, and a function that tests it on a server.

A check belongs to a section of the specification and is named after it::

    LIST = Section("NBD_OPT_LIST")

    @LIST.should("the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID")
    def with_data(target: Target) -> None:
        ...

The function returns when the server did as the sentence says, and raises Violation when not,
Unavailable when it cannot be tried on this server. It makes its own connections.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .target import Target
from .verdicts import Level

Run = Callable[[Target], None]


@dataclass(frozen=True)
class Check:
    """One check; ``writes`` when what it sends may change the export."""

    name: str
    section: str
    level: Level
    sentence: str
    writes: bool
    run: Run


class Section:
    """Checks of one section of the specification, in the order in which they are defined."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.checks: list[Check] = []
        self._prefix = title if title.startswith("NBD_") else title.lower()
        self._prefix = re.sub(r"[^A-Za-z0-9_]+", "-", self._prefix).strip("-")

    def must(self, sentence: str, *, writes: bool = False) -> Callable[[Run], Run]:
        """A check of a sentence with MUST, MUST NOT or REQUIRED."""
        return self._add(Level.MUST, sentence, writes)

    def should(self, sentence: str, *, writes: bool = False) -> Callable[[Run], Run]:
        """A check of a sentence with SHOULD, SHOULD NOT or RECOMMENDED."""
        return self._add(Level.SHOULD, sentence, writes)

    def rule(self, sentence: str, *, writes: bool = False) -> Callable[[Run], Run]:
        """A check of a sentence without a key word, or of what follows from several."""
        return self._add(Level.RULE, sentence, writes)

    def _add(self, level: Level, sentence: str, writes: bool) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            name = f"{self._prefix}/{run.__name__.replace('_', '-')}"
            self.checks.append(Check(name, self.title, level, sentence, writes, run))
            return run

        return add
