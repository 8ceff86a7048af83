"""Push: store a snapshot, committed by one conditional PUT.

The order of a push, which the collector relies on:

1. PUT ``intents/<push>``, naming the parent.
2. Look for the parent's tombstone. There: take another parent, or none. The deleter puts the
   tombstone first and then looks at the intents, so one of the two sees the other. Then read the
   parent's outcome; a collector removes it before the tombstone.
3. PUT segments and pages, under keys that begin with this push's id.
4. When the store has acknowledged all of them: PUT ``outcomes/<push>`` with the root in it, if
   absent. This is the commit. After an error or a refusal it is read back: it may be ours. When it
   is ABORTED, a collector gave up on this push, and nothing is committed.
5. PUT the pointer, which only saves time to those who list.

A push that fails puts ABORTED itself, so that its parent is pinned no longer.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

from backends.errors import (
    CorruptError,
    ExistsError,
    InUseError,
    InvalidError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from backends.objects import ObjectStore
from snapshots.names import check_name, check_volume_size
from snapshots.repository.holdings import (
    committed_summary,
    list_pointers,
    list_snapshots,
    read_outcome,
)
from snapshots.repository.interfaces import Progress, Source
from snapshots.repository.layout import (
    OUTCOME_LIMIT,
    intent_key,
    new_push_id,
    outcome_key,
    pointer_key,
    tombstone_key,
)
from snapshots.repository.packing import ParentUnusableError, SnapshotPacker
from snapshots.repository.records import Config, Intent, Outcome, Root, Summary

_MAX_SNAPSHOT_ID = 256


@dataclass(frozen=True)
class PushReport:
    """What a push did. Sizes in bytes.

    ``already_there``: the snapshot had been pushed before, and nothing was done. ``read`` is what
    was read from the source, ``changed`` the plain size of the chunks that differ from the
    parent's, ``uploaded`` everything put into the store but for the pointer, ``segments`` and
    ``pages`` how many objects of these kinds.
    """

    volume: str
    snapshot: str
    push: str
    already_there: bool
    parent: str | None
    read: int = 0
    changed: int = 0
    uploaded: int = 0
    segments: int = 0
    pages: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


def push_snapshot(
    store: ObjectStore, config: Config, source: Source, progress: Progress | None
) -> PushReport:
    """Store ``source``; see the module's text. A failure leaves nothing committed."""
    started = time.monotonic()
    check_name("volume", source.volume)
    check_name("snapshot", source.snapshot)
    check_volume_size(source.size)
    if not 0 < len(source.snapshot_id) <= _MAX_SNAPSHOT_ID or not source.snapshot_id.isprintable():
        raise InvalidError(f"the id of {source.volume}@{source.snapshot} is not printable text")
    live = list_snapshots(store, config, source.volume)
    same_name = [summary for summary in live if summary.snapshot == source.snapshot]
    for summary in same_name:
        if summary.snapshot_id != source.snapshot_id:
            raise ExistsError(
                f"{summary.label} exists in {store.name} and is another snapshot: delete it there "
                "first, or use another name"
            )
    if same_name:
        summary = same_name[-1]
        return PushReport(
            summary.volume,
            summary.snapshot,
            summary.push,
            already_there=True,
            parent=summary.parent,
            seconds=time.monotonic() - started,
            warnings=_put_pointer(store, summary),
        )
    warnings: list[str] = []
    by_id = {summary.snapshot_id: summary for summary in live}
    candidates = [by_id[id_] for id_ in source.ancestors() if id_ in by_id]
    for parent in candidates:
        try:
            return _Push(store, config, source).run(parent, progress, started, warnings)
        except ParentUnusableError as error:
            warnings.append(f"{parent.label} could not serve as the parent: {error}")
    return _Push(store, config, source).run(None, progress, started, warnings)


class _Push:
    """One push, under an id of its own."""

    def __init__(self, store: ObjectStore, config: Config, source: Source) -> None:
        self._store = store
        self._config = config
        self._source = source
        self._id = new_push_id()
        self._packer = SnapshotPacker(store, config.chunk_size, source, self._id)

    def run(
        self,
        parent: Summary | None,
        progress: Progress | None,
        started: float,
        warnings: list[str],
    ) -> PushReport:
        source, packer = self._source, self._packer
        intent = Intent(
            self._id,
            parent.push if parent else None,
            source.volume,
            source.snapshot,
            source.snapshot_id,
            time.time(),
        ).encode()
        try:
            if not self._put_once(intent_key(self._id), intent):
                raise UnavailableError(
                    f"{self._store.name} refused the new key {intent_key(self._id)}: "
                    "check the store"
                )
            packer.run(self._pin(parent) if parent else None, progress)
            summary = self._commit(parent)
        except BaseException as error:
            self._abort(error)
            raise
        return PushReport(
            source.volume,
            source.snapshot,
            self._id,
            already_there=False,
            parent=summary.parent,
            read=packer.read,
            changed=packer.changed,
            uploaded=summary.uploaded + len(intent),
            segments=packer.segments,
            pages=packer.pages,
            seconds=time.monotonic() - started,
            warnings=warnings + _put_pointer(self._store, summary),
        )

    def _put_once(self, key: str, data: bytes) -> bool:
        """``put_if_absent``, or what comes next to it where there is but a single writer."""
        if self._config.conditional_put:
            return self._store.put_if_absent(key, data)
        if self._store.size(key) is not None:
            return False
        self._store.put(key, data)
        return True

    def _pin(self, parent: Summary) -> Root:
        """Make sure that the parent, which our intent names, is live; return its root."""
        if self._store.size(tombstone_key(parent.push)) is not None:
            raise ParentUnusableError("it was deleted meanwhile")
        try:
            outcome, _ = read_outcome(self._store, self._config, parent.push)
        except (NotFoundError, CorruptError) as error:
            raise ParentUnusableError(str(error)) from error
        if outcome.root is None:
            raise ParentUnusableError("it was never committed")
        return outcome.root

    def _commit(self, parent: Summary | None) -> Summary:
        source, packer = self._source, self._packer
        label = f"{source.volume}@{source.snapshot}"
        for push in list_pointers(self._store, f"{source.volume}/{source.snapshot}/"):
            there = self._store.size(outcome_key(push)) is not None
            if there and self._store.size(tombstone_key(push)) is None:
                raise InUseError(
                    f"{label} was pushed to {self._store.name} by somebody else meanwhile: push "
                    "again to see whether it is the same snapshot"
                )
        root = Root(
            Summary(
                volume=source.volume,
                snapshot=source.snapshot,
                snapshot_id=source.snapshot_id,
                push=self._id,
                created=source.created,
                pushed=time.time(),
                size=source.size,
                data=packer.data,
                stored=packer.stored,
                uploaded=packer.uploaded,
                parent=parent.snapshot if parent else None,
                parent_push=parent.push if parent else None,
            ),
            packer.table,
        )
        outcome = Outcome(self._id, root)
        record = outcome.encode()
        key = outcome_key(self._id)
        try:
            won = self._put_once(key, record)
        except StorageError as error:
            if not self._reads_back(key, record):
                raise UnavailableError(
                    f"whether {label} was committed is not known; push it again to find out: "
                    f"{error}"
                ) from error
            won = True
        if not won and not self._reads_back(key, record):
            raise InUseError(
                f"the push of {label} took so long that it was given up and collected: push again"
            )
        summary = committed_summary(outcome, len(record))
        assert summary is not None
        return summary

    def _reads_back(self, key: str, record: bytes) -> bool:
        try:
            return self._store.get(key, OUTCOME_LIMIT) == record
        except StorageError:
            return False

    def _abort(self, error: BaseException) -> None:
        """Say that this push is over. Without it a collector gives up on the push in time."""
        if isinstance(error, UnavailableError):
            return  # the store does not answer, or it is not known whether the push is committed
        with suppress(StorageError):
            why = type(error).__name__
            self._put_once(outcome_key(self._id), Outcome(self._id, None, why).encode())


def _put_pointer(store: ObjectStore, summary: Summary) -> list[str]:
    """Put the snapshot's pointer; a failure is only worth a warning, returned."""
    key = pointer_key(summary.volume, summary.snapshot, summary.push)
    try:
        store.put(key, summary.encode_pointer())
    except StorageError as error:
        return [f"{summary.label} is committed, but listing will be slower: {error}"]
    return []
