"""The repository: snapshots in an object store, incremental, each whole by itself.

docs/format-repository.md describes every object. ``push`` and ``restore`` read and write through
the protocols :class:`Source` and :class:`Sink`.
"""

from snapshots.repository.collecting import DEFAULT_GIVE_UP_AFTER, CollectReport
from snapshots.repository.damage import Damage
from snapshots.repository.interfaces import Progress, Sink, Source
from snapshots.repository.layout import DEFAULT_CHUNK_SIZE
from snapshots.repository.losses import Hole
from snapshots.repository.push import PushReport
from snapshots.repository.records import ObjectLock, Summary
from snapshots.repository.repository import (
    Repository,
    check_chunk_size,
    check_object_lock,
    init_in_store,
    init_repository,
    open_in_store,
    open_repository,
    open_store,
)
from snapshots.repository.restore import RestoreReport
from snapshots.repository.secret import Key, Secret
from snapshots.repository.verify import VerifyReport

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "DEFAULT_GIVE_UP_AFTER",
    "CollectReport",
    "Damage",
    "Hole",
    "Key",
    "ObjectLock",
    "Progress",
    "PushReport",
    "Repository",
    "RestoreReport",
    "Secret",
    "Sink",
    "Source",
    "Summary",
    "VerifyReport",
    "check_chunk_size",
    "check_object_lock",
    "init_in_store",
    "init_repository",
    "open_in_store",
    "open_repository",
    "open_store",
]
