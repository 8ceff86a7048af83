"""Runs checks one after the other, and sees whether one of them harms the rest of the server.

A *witness*, a second connection in the transmission phase, stays open all the time where the
server allows it. After each check it reads a block. When it no longer can, what the check sent
has hurt somebody who had nothing to do with it: that is a finding of the check, whatever else
came out. When the server takes no connections any more, it gets ``patience`` seconds to come
back, as a supervisor would see to; then the rest is not run.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterable, Iterator

from .check import Check
from .target import Target, is_alive
from .transmission import Transmission
from .verdicts import Level, Result, Unavailable, Unreachable, Verdict, Violation

_WITNESS_SENTENCE = (
    "Terminating the transmission phase: the server MUST NOT initiate any form of disconnect "
    "other than for a violation on that very connection"
)
_JOURNAL_LINES = 3


class Runner:
    """Runs checks on a target; ``write`` says whether those may be run that change the export."""

    def __init__(self, target: Target, *, write: bool, patience: float) -> None:
        self._target = target
        self._write = write
        self._patience = patience
        self._witness: Transmission | None = None
        self._gone = ""

    @property
    def server_is_gone(self) -> bool:
        """Whether the rest was not run because nobody answers any more."""
        return bool(self._gone)

    def run(self, checks: Iterable[Check]) -> Iterator[Result]:
        """Run them; a result for each, as soon as it is known."""
        self._call_witness()
        try:
            for check in checks:
                yield self._run_one(check)
        finally:
            self._dismiss_witness()

    def _run_one(self, check: Check) -> Result:
        if self._gone:
            return _result(check, Verdict.ERROR, 0.0, reason=self._gone)
        if check.writes and not self._write:
            return _result(check, Verdict.SKIP, 0.0, reason="may change data: --write runs it")
        if self._witness is None:
            self._call_witness()
        target = self._target
        target.begin()
        begun = time.monotonic()
        try:
            result = self._try(check, begun)
        finally:
            target.finish()
        return self._hear_witness(check, result)

    def _try(self, check: Check, begun: float) -> Result:
        target = self._target
        try:
            check.run(target)
        except Unavailable as unavailable:
            return _result(check, Verdict.SKIP, _since(begun), reason=str(unavailable))
        except Violation as violation:
            return _failed(check, violation, target.journal, _since(begun))
        except Unreachable as unreachable:
            return _result(check, Verdict.ERROR, _since(begun), reason=str(unreachable))
        except Exception:  # a mistake of ours is no finding
            reason = f"a mistake in nbd-conformance: {traceback.format_exc(limit=-3)}"
            return _result(check, Verdict.ERROR, _since(begun), reason=reason)
        return _result(check, Verdict.PASS, _since(begun))

    def _hear_witness(self, check: Check, result: Result) -> Result:
        if self._witness is None or is_alive(self._witness):
            if result.verdict is Verdict.ERROR:
                self._wait_for_server()
            return result
        self._dismiss_witness()
        journal = self._target.journal
        came = "it was closed, or answers no more"
        if not self._wait_for_server():
            came = "the server takes no connections any more"
        violation = Violation(
            "another client's connection to go on",
            came + (f"; the check itself: {result.came}" if result.came else ""),
            Level.MUST,
            _WITNESS_SENTENCE,
        )
        return _failed(check, violation, journal, result.seconds)

    def _wait_for_server(self) -> bool:
        """Whether the server takes connections, at once or after a while."""
        target = self._target
        deadline = time.monotonic() + self._patience
        while True:
            target.begin()
            try:
                target.greet()
                return True
            except Unavailable:
                return True
            except (Unreachable, Violation) as problem:
                if time.monotonic() > deadline:
                    self._gone = f"not run: the server is gone ({problem})"
                    return False
            finally:
                target.finish()
            time.sleep(0.1)

    def _call_witness(self) -> None:
        target = self._target
        target.begin()
        with contextlib.suppress(Violation, Unavailable, Unreachable):
            self._witness = target.enter_for_good()
        if self._witness is None:
            return
        # Some servers serve one client at a time: then there can be no witness.
        try:
            target.greet()
        except (Violation, Unavailable, Unreachable):
            self._dismiss_witness()
            target.facts.notes.append("the server takes one connection at a time: no witness")
        finally:
            target.finish()

    def _dismiss_witness(self) -> None:
        if self._witness is not None:
            self._witness.connection.close()
            self._witness = None


def _since(begun: float) -> float:
    return time.monotonic() - begun


def _result(check: Check, verdict: Verdict, seconds: float, reason: str = "") -> Result:
    return Result(
        check.name,
        check.section,
        check.level,
        check.level,
        check.sentence,
        verdict,
        seconds,
        reason=reason,
    )


def _failed(check: Check, violation: Violation, journal: list[str], seconds: float) -> Result:
    hidden = len(journal) - _JOURNAL_LINES
    sent = ([f"({hidden} more)"] if hidden > 0 else []) + journal[-_JOURNAL_LINES:]
    return Result(
        check.name,
        check.section,
        check.level,
        violation.level or check.level,
        check.sentence,
        Verdict.FAIL,
        seconds,
        sent="; ".join(sent) or "nothing",
        expected=violation.expected,
        came=violation.came,
        violated=violation.sentence,
    )
