"""What a check can come to, and how it says so."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How strongly the specification words the sentence that a check tests."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    RULE = "RULE"
    """Said without a key word of RFC 2119: the layout of a message, a definition, or what
    follows from them."""


class Verdict(Enum):
    """What came out of a check."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"
    """Not the server's fault: a mistake of this program, or a server that nobody can reach."""


class Violation(Exception):  # noqa: N818 (no error of ours)
    """The server did not do what it has to.

    ``level`` and ``sentence`` are given when it is another sentence than the check's that was
    violated: the format of a message, say, which is looked at whatever the check is about.
    """

    def __init__(
        self, expected: str, came: str, level: Level | None = None, sentence: str = ""
    ) -> None:
        super().__init__(f"expected {expected}; came {came}")
        self.expected = expected
        self.came = came
        self.level = level
        self.sentence = sentence


class Closed(Violation):
    """The server closed the connection where something else was expected."""


class Silent(Violation):
    """Nothing came in time."""


class Unavailable(Exception):  # noqa: N818
    """The check cannot be carried out on this server; ``str()`` says why."""


class Unreachable(Exception):  # noqa: N818
    """No connection to the server can be made; ``str()`` says why."""


class Refused(Exception):  # noqa: N818
    """The server does not let us to this export in this way; ``str()`` says why.

    Not for checks: without the export there is nothing to check.
    """


@dataclass(frozen=True)
class Result:
    """What came out of one check; the strings are for people."""

    check: str
    section: str
    declared: Level
    """The check's own level."""
    level: Level
    """That of what was violated, which may be another sentence than the check's own."""
    sentence: str
    verdict: Verdict
    seconds: float
    reason: str = ""
    """Why it was skipped, or what went wrong in this program."""
    sent: str = ""
    expected: str = ""
    came: str = ""
    violated: str = ""
    """The sentence that was violated, when it is not the check's own."""
