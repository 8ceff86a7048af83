"""Protected snapshots: nobody deletes them until the protection is taken back.

``protections/<push>`` exists, or it does not; whatever it holds, it is the same each time, so the
key is never used for other content although it comes and goes.

A deletion looks for the protection and then puts the tombstone; who protects puts the protection
and then looks for the tombstone. So of a deletion and a protection at the same instant at least
one sees the other, unless both looked before either put: a deletion that has looked already is not
held up any more. This guards against mistakes and against retention, not against who may write to
the store.
"""

from __future__ import annotations

from collections.abc import Iterable

from backends.errors import InUseError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.envelope import Kind, seal
from snapshots.repository.holdings import list_pushes
from snapshots.repository.layout import PROTECTIONS, protection_key, tombstone_key
from snapshots.repository.records import Summary


def list_protected(store: ObjectStore) -> set[str]:
    """The pushes that are protected, whether there still is a snapshot or not."""
    return list_pushes(store, PROTECTIONS)


def check_unprotected(store: ObjectStore, summary: Summary) -> None:
    """InUseError, with the way out, when the snapshot is protected."""
    if store.size(protection_key(summary.push)) is not None:
        raise InUseError(
            f"{summary.label} in {store.name} is protected; 'nbdserve repo unprotect' takes that"
            " back"
        )


def protect(store: ObjectStore, summaries: Iterable[Summary]) -> None:
    """Protect snapshots; NotFoundError when one was deleted meanwhile."""
    for summary in summaries:
        key = protection_key(summary.push)
        store.put(key, seal(Kind.PROTECTION, {"push": bytes.fromhex(summary.push)}))
        if store.size(tombstone_key(summary.push)) is not None:
            store.delete(key)
            raise NotFoundError(f"{summary.label} in {store.name} was deleted meanwhile")


def unprotect(store: ObjectStore, summaries: Iterable[Summary]) -> None:
    """Take the protection of snapshots back; one that has none is no error."""
    for summary in summaries:
        store.delete(protection_key(summary.push))
