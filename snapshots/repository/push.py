"""Push: store a snapshot; ``pushing`` has the steps and their order.

A push of which an intent but no outcome is found, of the very same snapshot, is gone on with: what
it had uploaded is not uploaded again. With a ``line``, a push of another snapshot of that line is,
too, as far as the content is the same.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field

from backends.errors import CorruptError, ExistsError, InvalidError, NotFoundError
from backends.objects import ObjectStore
from snapshots.names import check_name, check_volume_size
from snapshots.repository.holdings import in_order, list_snapshots, walk_snapshots
from snapshots.repository.interfaces import Progress, Source
from snapshots.repository.layout import new_push_id
from snapshots.repository.notes import read_damage
from snapshots.repository.packing import ParentUnusableError, SnapshotPacker
from snapshots.repository.pushing import finding_unfinished, pointing, pushing
from snapshots.repository.records import Config, Pointer, Summary
from snapshots.repository.retaining import hold, retain_committed, retain_uploaded
from snapshots.repository.roots import find_root
from snapshots.repository.steps import Upload, perform

_MAX_SNAPSHOT_ID = 256


@dataclass(frozen=True)
class PushReport:
    """What a push did. Sizes in bytes.

    ``already_there``: the snapshot had been pushed before, and nothing was done. ``read`` is what
    was read from the source, ``changed`` the plain size of the chunks that differ from the
    parent's, or of the blocks in patches, ``uploaded`` everything put into the store but for the
    intent and the pointer, ``segments`` and ``pages`` how many objects of these kinds, ``resumed``
    what pushes that were killed had stored and need not be uploaded again, ``repaired`` the plain
    size of chunks that were stored anew because those in the repository are damaged.
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
    resumed: int = 0
    repaired: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


def push_snapshot(
    store: ObjectStore,
    config: Config,
    source: Source,
    progress: Progress | None,
    line: str = "",
) -> PushReport:
    """Store ``source``; see the module's text. A failure leaves nothing committed."""
    started = time.monotonic()
    hold(store, config)
    check_name("volume", source.volume)
    check_name("snapshot", source.snapshot)
    check_volume_size(source.size)
    if not 0 < len(source.snapshot_id) <= _MAX_SNAPSHOT_ID or not source.snapshot_id.isprintable():
        raise InvalidError(f"the id of {source.volume}@{source.snapshot} is not printable text")
    live = _find_related(store, config, source)
    same_name = in_order(item for item in live if item.snapshot == source.snapshot)
    for summary in same_name:
        if summary.snapshot_id != source.snapshot_id:
            raise ExistsError(
                f"{summary.label} exists in {store.name} and is another snapshot: delete it there "
                "first, or use another name"
            )
    if same_name:
        summary = same_name[-1]
        if config.object_lock is not None:  # this is acknowledged now, too
            retain_committed(store, config, find_root(store, config, summary.push))
        return PushReport(
            summary.volume,
            summary.snapshot,
            summary.push,
            already_there=True,
            parent=summary.parent,
            seconds=time.monotonic() - started,
            warnings=perform(store, config, pointing(summary, Pointer(summary))),
        )
    warnings: list[str] = []
    damage = read_damage(store, source.volume)
    unfinished = perform(store, config, finding_unfinished(source, line))
    tried: set[str] = set()
    while True:
        by_id = {item.snapshot_id: item for item in live if item.push not in tried}
        parent = next((by_id[id_] for id_ in source.ancestors() if id_ in by_id), None)
        push = new_push_id()
        packer = SnapshotPacker(store, config.chunk_size, source, push)

        def upload(step: Upload, packer: SnapshotPacker = packer) -> SnapshotPacker:
            begun = time.time()
            packer.run(step.parent, step.donors, progress, damage)
            try:
                packer.retained = retain_uploaded(store, config, step, packer.table, begun)
            except (NotFoundError, CorruptError) as error:
                if step.parent is None:
                    raise
                raise ParentUnusableError(str(error)) from error
            return packer

        try:
            outcome, late = perform(
                store, config, pushing(push, source, parent, unfinished, line), upload
            )
        except ParentUnusableError as error:
            assert parent is not None
            warnings.append(f"{parent.label} could not serve as the parent: {error}")
            unfinished = []  # they have ended now
            tried.add(parent.push)
            live = list_snapshots(store, config, source.volume)
        else:
            assert outcome.root is not None
            retain_committed(store, config, outcome.root)
            return _report(outcome.summary, packer, started, warnings + packer.warnings + late)


def _find_related(store: ObjectStore, config: Config, source: Source) -> list[Summary]:
    """The snapshots of that name, and, if there is any, the one that is the best parent."""
    ancestors = source.ancestors()
    found: list[Summary] = []
    snapshots = walk_snapshots(store, config, source.volume, source.snapshot, only=not ancestors)
    with closing(snapshots):
        for summary in snapshots:
            found.append(summary)
            if summary.snapshot != source.snapshot and summary.snapshot_id == ancestors[0]:
                break
    return found


def _report(
    summary: Summary, packer: SnapshotPacker, started: float, warnings: list[str]
) -> PushReport:
    return PushReport(
        summary.volume,
        summary.snapshot,
        summary.push,
        already_there=False,
        parent=summary.parent,
        read=packer.read,
        changed=packer.changed,
        uploaded=summary.uploaded,
        segments=packer.segments,
        pages=packer.pages,
        resumed=packer.resumed,
        repaired=packer.repaired,
        seconds=time.monotonic() - started,
        warnings=warnings,
    )
