"""S3 Object Lock, for stores that have it: objects that nobody can remove before a date.

A bucket that was made with Object Lock keeps every version of every object. A version that is
*retained* until a date cannot be removed before: in the mode COMPLIANCE by nobody, in GOVERNANCE by
those alone who have the right to bypass it. The date can be put off and never brought forward. A
deletion only puts a marker in front, and another PUT a newer version; what was retained is still
there (backends/s3_versions.py reads it).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from backends.errors import InvalidError
from backends.objects import ObjectStore

MODES = ("COMPLIANCE", "GOVERNANCE")


class Retention(NamedTuple):
    """How what is put is retained: ``mode``, and for how many ``seconds`` from then."""

    mode: str
    seconds: float


@runtime_checkable
class LockingStore(Protocol):
    """What a store with Object Lock can do beside the contract of all stores."""

    def require_lock(self) -> None:
        """InvalidError when the bucket was made without Object Lock."""

    def hold(self, retention: Retention) -> None:
        """From now on retain every object that is put."""

    def extend(self, key: str, until: float) -> None:
        """Retain the object until at least ``until``, seconds since the epoch.

        In the mode of ``hold``. Raises NotFoundError when there is no such object.
        """


def locking(store: ObjectStore) -> LockingStore:
    """``store``, when it can lock; else InvalidError."""
    if not isinstance(store, LockingStore):
        raise InvalidError(f"{store.name} has no Object Lock: only buckets in S3 can have it")
    return store
