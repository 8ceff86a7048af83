"""Prune: delete the snapshots of a volume that no rule keeps, and none that is not understood.

What a snapshot is, is read from its outcome, not only from its pointer, before anything is
decided: a snapshot whose outcome is missing, damaged, of a newer version or unlike its pointer
cannot be restored by this program. Counted, it would take the place of one that can, so it is left
alone and counts for nothing. The same goes for two snapshots of one name. When the store does not
answer, nothing is decided at all.

Protections are looked at again right before each deletion.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Sequence

from backends.errors import (
    CorruptError,
    InUseError,
    InvalidError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from snapshots.repository.holdings import THREADS
from snapshots.repository.interfaces import Progress
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.protection import list_protected
from snapshots.repository.records import Summary
from snapshots.repository.repository import Repository
from snapshots.repository.retention import Action, Decision, Rules, decide
from snapshots.repository.roots import find_root

_BACKUP_NAME = re.compile(r"backup-\d{8}T\d{6}Z", re.ASCII)


def plan_prune(
    repository: Repository,
    volume: str,
    rules: Rules,
    *,
    spared: Collection[str] = (),
    only_backups: bool = False,
) -> list[Decision]:
    """Decide about the volume's snapshots, newest first; nothing is changed.

    ``spared`` are pushes that are kept whatever the rules say. ``only_backups`` leaves alone what
    is not named as ``nbdserve backup`` names its snapshots.
    """
    summaries = repository.list(volume)
    protected = list_protected(repository.store)
    unclear = _unclear(summaries, only_backups)

    def decided() -> list[Decision]:
        decisions = decide(summaries, rules, time.time(), protected, unclear)
        return [_spare(decision) if decision.summary.push in spared else decision
                for decision in decisions]  # fmt: skip

    decisions = decided()
    if all(decision.action is not Action.DELETE for decision in decisions):
        return decisions
    unclear |= _unreadable(repository, [one for one in summaries if one.push not in unclear])
    return decided()


def carry_out(
    repository: Repository, decisions: Sequence[Decision], progress: Progress | None = None
) -> list[Decision]:
    """Delete what is to be deleted; returns the decisions as they were carried out.

    ``progress`` counts snapshots. A failure says how many were deleted; the others are still there.
    """
    doomed = [decision for decision in decisions if decision.action is Action.DELETE]
    doomed.reverse()  # the oldest first, so that an interruption leaves the newest
    outcomes: dict[str, Decision] = {}

    def delete(decision: Decision) -> Decision:
        try:
            repository.delete_one(decision.summary)
        except InUseError as error:
            return Decision(decision.summary, Action.LEAVE, [str(error)])
        return decision

    try:
        with Crew(THREADS, "prune") as crew, leaving_promptly(repository.store):
            for result in crew.ordered(delete, doomed, 2 * THREADS):
                outcomes[result.summary.push] = result
                if progress:
                    progress(len(outcomes), len(doomed))
    except StorageError as error:
        volume = doomed[0].summary.volume
        raise type(error)(
            f"pruning {volume} stopped after at least {len(outcomes)} of {len(doomed)} deletions:"
            f" {error}"
        ) from error
    return [outcomes.get(decision.summary.push, decision) for decision in decisions]


def _spare(decision: Decision) -> Decision:
    if decision.action is Action.DELETE:
        return Decision(decision.summary, Action.KEEP, ["pushed just now"])
    return decision


def _unclear(summaries: Sequence[Summary], only_backups: bool) -> dict[str, str]:
    names = Counter(summary.snapshot for summary in summaries)
    found = {}
    for summary in summaries:
        if only_backups and not _BACKUP_NAME.fullmatch(summary.snapshot):
            found[summary.push] = "its name is not one that backup gives"
        elif names[summary.snapshot] > 1:
            found[summary.push] = (
                f"there are {names[summary.snapshot]} snapshots of this name; 'nbdserve repo"
                " delete' deletes all of them"
            )
    return found


def _unreadable(repository: Repository, summaries: Sequence[Summary]) -> dict[str, str]:
    """Why snapshots cannot be understood, by push; sound ones are not in it."""

    def look(summary: Summary) -> tuple[str, str | None]:
        try:
            root = find_root(repository.store, repository.config, summary.push)
        except UnavailableError:
            raise
        except (CorruptError, InvalidError, NotFoundError) as error:
            return summary.push, str(error)
        found = root.summary
        if (found.label, found.created) != (summary.label, summary.created):
            return summary.push, f"its pointer does not belong to it: it is {found.label}"
        return summary.push, None

    with Crew(THREADS, "prune") as crew, leaving_promptly(repository.store):
        looked = crew.ordered(look, summaries, 2 * THREADS)
        return {push: problem for push, problem in looked if problem is not None}
