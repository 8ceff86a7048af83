"""A repository: what the command line does with one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from backends.errors import ExistsError, InvalidError, NotFoundError, StorageError
from backends.locking import MODES, locking
from backends.object_urls import open_object_store
from backends.objects import ObjectStore
from snapshots.names import check_name
from snapshots.repository.collecting import DEFAULT_GIVE_UP_AFTER, CollectReport, collecting
from snapshots.repository.damage import Damage
from snapshots.repository.envelope import Fields, Kind, unseal
from snapshots.repository.holdings import (
    THREADS,
    describe_object,
    in_order,
    list_snapshots,
    walk_snapshots,
)
from snapshots.repository.insisting import insist
from snapshots.repository.interfaces import Progress, Sink, Source
from snapshots.repository.layout import (
    CONFIG_KEY,
    DEFAULT_CHUNK_SIZE,
    MAX_CHUNK_SIZE,
    MIN_CHUNK_SIZE,
    PROBES,
    RECORD_LIMIT,
    SEGMENTS,
    new_push_id,
)
from snapshots.repository.moving import move
from snapshots.repository.notes import list_notes
from snapshots.repository.pages import PageRef
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.protection import (
    check_unprotected,
    list_protected,
    protect,
    unprotect,
)
from snapshots.repository.push import PushReport, push_snapshot
from snapshots.repository.pushing import deleting
from snapshots.repository.records import (
    CIPHER,
    MAX_LOCK_SECONDS,
    MIN_LOCK_SECONDS,
    OBJECT_LOCK,
    REPACKING,
    Config,
    ObjectLock,
    Summary,
)
from snapshots.repository.restore import RestoreReport, restore_root
from snapshots.repository.retaining import hold
from snapshots.repository.roots import find_root
from snapshots.repository.secret import Key, Secret
from snapshots.repository.steps import Move, perform
from snapshots.repository.verify import VerifyReport, verify_snapshots

if TYPE_CHECKING:
    from snapshots.repository.keyring import Keyring

Summaries = list[Summary]  # Repository has a method of that name


class Repository:
    """An open repository. Methods block, and raise StorageErrors whose line is for the user."""

    def __init__(self, store: ObjectStore, config: Config, keyring: Keyring | None = None) -> None:
        """``keyring`` is that of an encrypted repository; ``store`` seals and unseals then."""
        self.store = store
        self.config = config
        self.keyring = keyring

    @property
    def notice(self) -> str | None:
        """One line for the user when the store cannot keep two writers apart, else None."""
        if self.config.conditional_put:
            return None
        return (
            f"{self.store.name} does not refuse a second PUT with If-None-Match: only one command "
            "at a time may write to this repository"
        )

    def list(self, volume: str | None = None) -> Summaries:
        """The snapshots, of one volume or of all, by volume and then oldest first."""
        return list_snapshots(self.store, self.config, volume)

    def find(self, volume: str, snapshot: str) -> Summary:
        """The snapshot of that name; NotFoundError when there is none."""
        return self._find_all(volume, snapshot)[-1]

    def push(
        self, source: Source, progress: Progress | None = None, *, line: str = ""
    ) -> PushReport:
        """Store a snapshot, uploading only what its newest parent here does not have.

        ``line`` names a line of pushes of which no two are under way at once: what an earlier one
        that was killed had stored is not uploaded again, and if it is not dead, it fails.
        """
        return push_snapshot(self.store, self.config, source, progress, line)

    def restore(
        self,
        volume: str,
        snapshot: str,
        sink: Sink,
        progress: Progress | None = None,
        *,
        skip_damaged: bool = False,
    ) -> RestoreReport:
        """Write a snapshot into ``sink``, every chunk verified before it is written.

        With ``skip_damaged`` what is missing or damaged is left out, and listed in the report.
        """
        summary = self.find(volume, snapshot)
        root = find_root(self.store, self.config, summary.push)
        return restore_root(
            self.store, self.config, root, sink, progress, skip_damaged=skip_damaged
        )

    def delete(self, volume: str, snapshot: str) -> Summary:
        """Delete a snapshot; others keep all that they share with it. ``collect`` frees space."""
        found = self._find_all(volume, snapshot)
        for summary in found:
            check_unprotected(self.store, summary)
        self.delete_all(found)
        return found[-1]

    def delete_one(self, summary: Summary) -> None:
        """Delete this one snapshot, whatever others have its name; InUseError if protected."""
        check_unprotected(self.store, summary)
        perform(self.store, self.config, deleting(summary))

    def list_protected(self) -> set[str]:
        """The pushes whose snapshots are protected."""
        return list_protected(self.store)

    def protect(self, volume: str, snapshot: str) -> Summary:
        """Refuse to delete a snapshot from now on; once more is no error."""
        found = self._find_all(volume, snapshot)
        protect(self.store, found)
        return found[-1]

    def unprotect(self, volume: str, snapshot: str) -> Summary:
        """Allow to delete a snapshot again; one that is not protected is no error."""
        found = self._find_all(volume, snapshot)
        unprotect(self.store, found)
        return found[-1]

    def delete_all(self, summaries: Iterable[Summary]) -> None:
        """Delete snapshots that :meth:`list` showed, many at a time; InUseError if protected."""

        with Crew(THREADS, "delete") as crew, leaving_promptly(self.store):
            for _ in crew.ordered(self.delete_one, summaries, 4 * THREADS):
                pass

    def collect(
        self,
        give_up_after: float = DEFAULT_GIVE_UP_AFTER,
        *,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> CollectReport:
        """Free the space of what nothing needs any more.

        Pushes that began ``give_up_after`` seconds ago and have not ended are given up; no clock
        decides anything else. May run beside anything, also on other hosts.
        """
        repack = REPACKING in self.config.features
        notes = list_notes(self.store)
        steps = collecting(
            give_up_after, dry_run=dry_run, repack=repack, notes=notes, progress=progress
        )

        def work(step: Move) -> dict[tuple[str, int, int], PageRef]:
            return move(self.store, self.config.chunk_size, step)

        return perform(self.store, self.config, steps, work)

    def verify(
        self,
        volume: str | None = None,
        snapshot: str | None = None,
        *,
        deep: bool = False,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Look for damage in all, in one volume's snapshots, or in one of them.

        What harms a snapshot is noted in the repository, for the next push.
        """
        report = verify_snapshots(self.store, self.config, volume, snapshot, deep, progress)
        if self.keyring is not None and volume is None:
            problems = self.keyring.problems()
            report.damaged[:0] = [Damage(key, problem) for key, problem in problems]
        return report

    def _find_all(self, volume: str, snapshot: str) -> Summaries:
        """All of that name: two hosts that pushed at the same instant may have made two."""
        check_name("volume", volume)
        check_name("snapshot", snapshot)
        found = in_order(walk_snapshots(self.store, self.config, volume, snapshot, only=True))
        if not found:
            raise NotFoundError(
                f"there is no {volume}@{snapshot} in {self.store.name}; 'nbdserve repo list' shows "
                "what there is"
            )
        return found


def init_repository(
    url: str,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    secret: Secret | None = None,
    object_lock: ObjectLock | None = None,
) -> Repository:
    """Make a repository at ``url``; ``chunk_size`` in bytes, a power of two.

    With a ``secret`` it is encrypted, with ``object_lock`` kept from being destroyed. Raises
    ExistsError when there is one. See :attr:`Repository.notice` afterwards.
    """
    check_chunk_size(chunk_size)
    return init_in_store(open_store(url, create=True), chunk_size, secret, object_lock)


def open_store(
    url: str,
    *,
    create: bool = False,
    storage_class: str | None = None,
    at: float | None = None,
) -> ObjectStore:
    """The object store of a repository at ``url``, whether there is one or not.

    As it was ``at`` seconds since the epoch, to be read, where the bucket keeps versions.

    ``storage_class`` is for segments alone. Every push, listing and collection reads records and
    pages, so they stay where a request costs least; segments are nearly all of the bytes, and are
    read when something is restored, verified or repacked.
    """
    return open_object_store(url, create=create, storage_class=storage_class, bulk=SEGMENTS, at=at)


def open_repository(url: str, key: Key = None) -> Repository:
    """Open the repository at ``url``; NotFoundError when there is none.

    A ``key`` that is a secret must open it: a repository that is not encrypted is refused then,
    for whoever controls the store could have put it in the place of an encrypted one. A function
    is called for the secret when the repository says that it is encrypted.
    """
    return open_in_store(open_store(url), key)


def init_in_store(
    store: ObjectStore,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    secret: Secret | None = None,
    object_lock: ObjectLock | None = None,
) -> Repository:
    """Make a repository in an open store."""
    check_chunk_size(chunk_size)
    if object_lock is not None:
        check_object_lock(object_lock)
        locking(store).require_lock()
    taken = ExistsError(f"{store.name} holds a repository: use it, or choose another place")
    if store.size(CONFIG_KEY) is not None:
        raise taken
    conditional = _refuses_second_put(store)
    # Repacking frees space by deleting, which here it only does when the lock has ended.
    features = (REPACKING,) if object_lock is None else (OBJECT_LOCK,)
    config = Config(
        new_push_id(), chunk_size, conditional, time.time(), features, object_lock=object_lock
    )
    hold(store, config)
    repository, record = Repository(store, config), config.encode()
    if secret is not None:
        from snapshots.repository.keyring import encrypt  # noqa: PLC0415

        unlocked, record = encrypt(store, config, secret)
        repository = Repository(unlocked.store, unlocked.config, unlocked.keyring)
    put: Callable[[str, bytes], bool | None] = store.put_if_absent if conditional else store.put
    if put(CONFIG_KEY, record) is False:
        if repository.keyring is not None:
            repository.keyring.discard()
        raise taken
    return repository


def open_in_store(store: ObjectStore, key: Key = None) -> Repository:
    """Open the repository in an open store; see :func:`open_repository`."""
    where = describe_object(store, CONFIG_KEY)

    def attempt() -> tuple[bytes, Fields]:
        record = store.get(CONFIG_KEY, RECORD_LIMIT)
        return record, unseal(Kind.CONFIG, record, where)

    try:
        record, fields = insist(attempt)
    except NotFoundError:
        next(store.list(CONFIG_KEY), None)  # says so when there is no such bucket
        raise NotFoundError(
            f"there is no repository in {store.name}: make one with 'nbdserve repo init'"
        ) from None
    if fields.text("cipher") == CIPHER:
        # Only an encrypted repository needs cryptography, which takes a while to import.
        from snapshots.repository.keyring import unlock  # noqa: PLC0415

        unlocked = unlock(store, fields, key)
        return _opened(Repository(unlocked.store, unlocked.config, unlocked.keyring))
    if isinstance(key, Secret):
        raise InvalidError(
            f"the repository in {store.name} is not encrypted, but a {key.kind} was given: leave "
            "it out if that is right; if it was made encrypted, somebody has exchanged its config"
        )
    return _opened(Repository(store, Config.decode(record, where)))


def _opened(repository: Repository) -> Repository:
    with suppress(InvalidError):  # a copy in another kind of store: it is read, and a push refuses
        hold(repository.store, repository.config)
    return repository


def check_object_lock(lock: ObjectLock) -> ObjectLock:
    """Return ``lock`` when a repository may have it, else InvalidError."""
    if lock.mode not in MODES:
        raise InvalidError(f"Object Lock mode {lock.mode!r} is unknown: use {' or '.join(MODES)}")
    if not MIN_LOCK_SECONDS <= lock.seconds <= MAX_LOCK_SECONDS:
        raise InvalidError("the period of an Object Lock is one day to 24000 days, such as 30d")
    return lock


def check_chunk_size(chunk_size: int) -> int:
    """Return ``chunk_size`` (bytes) when a repository may have it, else InvalidError."""
    if not MIN_CHUNK_SIZE <= chunk_size <= MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise InvalidError(
            f"chunk size {chunk_size} is not allowed: use a power of two from 4K to 4M"
        )
    return chunk_size


def _refuses_second_put(store: ObjectStore) -> bool:
    """Probe whether a conditional PUT of a key that exists is refused, as the commit needs."""
    key = f"{PROBES}{secrets.token_hex(16)}"
    try:
        first = store.put_if_absent(key, b"first")
        second = store.put_if_absent(key, b"second")
        return first and not second and store.get(key, RECORD_LIMIT) == b"first"
    except InvalidError:  # the endpoint does not know such a request
        return False
    finally:
        _remove_probe(store, key)


def _remove_probe(store: ObjectStore, key: str) -> None:
    try:
        store.delete(key)
    except StorageError:
        return  # a probe left behind harms nothing, and the first error says more
