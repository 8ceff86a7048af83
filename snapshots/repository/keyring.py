"""Opening an encrypted repository, and managing its keys.

The object ``config`` of an encrypted repository says so, and holds the config proper, sealed. To
open it: read the objects under ``keys/``, unwrap the master key from one with the secret, open
the config with it. What the plain part of ``config`` says is not believed before that.

A key is never changed: another is added, and the old one removed. So that two hosts which each
remove the other's key at the same instant do not leave a repository that nothing opens, a key is
removed in this order:

1. PUT ``removals/<id>``.
2. Look whether the key that stays is there, and is not being removed itself. If not: withdraw.
3. Delete ``keys/<id>``, then ``removals/<id>``.

Of two that remove each other's, one at least sees the other. One that is killed after the first
step leaves a key that opens the repository as ever, but which no other removal relies on.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

from backends.errors import (
    CorruptError,
    InUseError,
    InvalidError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from backends.objects import ObjectStore
from snapshots.repository.envelope import Fields, Kind, seal
from snapshots.repository.key_slots import KeySlot, is_authentic, make_slot
from snapshots.repository.layout import CONFIG_KEY, KEYS, RECORD_LIMIT, is_key_id, removal_key
from snapshots.repository.records import CIPHER, Config
from snapshots.repository.sealed_objects import MASTER_KEY_SIZE, Sealer
from snapshots.repository.sealed_store import SealedObjectStore
from snapshots.repository.secret import Key, Secret

MAX_KEYS = 32
_MOST_TRIED = 2 * MAX_KEYS  # several may add one at once; each may cost a run of scrypt


@dataclass(frozen=True)
class KeyInfo:
    """One key. ``current``: the repository was opened with it. ``problem``: why it is no good."""

    id: str
    kind: str
    created: float | None
    current: bool
    problem: str | None = None


@dataclass(frozen=True)
class Unlocked:
    """An encrypted repository that was opened: what the rest of the code works with."""

    store: SealedObjectStore
    config: Config
    keyring: Keyring


class Keyring:
    """The keys of an open encrypted repository. Methods block; StorageErrors are for the user."""

    def __init__(
        self, store: ObjectStore, repository_id: str, master_key: bytes, current: str
    ) -> None:
        """``store`` is the one without encryption; ``current`` the key that opened it."""
        self._store = store
        self._repository_id = repository_id
        self._master_key = master_key
        self.sealer = Sealer(master_key, repository_id)
        self.current = current

    def list_keys(self) -> list[KeyInfo]:
        """All keys, oldest first; those that are damaged, or not made by a holder, at the end."""
        found = []
        for slot_id, content in _load(self._store).items():
            try:
                slot = self._check(slot_id, content)
            except (CorruptError, InvalidError) as error:
                found.append(KeyInfo(slot_id, "?", None, False, str(error)))
            else:
                current = slot_id == self.current
                found.append(KeyInfo(slot_id, slot.kind, slot.created, current))
        return sorted(found, key=lambda info: (info.created is None, info.created, info.id))

    def add(self, secret: Secret) -> str:
        """Let ``secret`` open the repository, too; returns the new key's id."""
        if len(_list_ids(self._store)) >= MAX_KEYS:
            raise InvalidError(
                f"{self._store.name} has {MAX_KEYS} keys already: remove one that is not needed"
            )
        slot = make_slot(self._master_key, self._repository_id, secret, time.time())
        content = slot.encode(self.sealer)
        self._store.put(slot.key, content)
        if self._store.get(slot.key, RECORD_LIMIT) != content:
            raise UnavailableError(f"{self._store.name} does not return what was put: check it")
        return slot.id

    def remove(self, slot_id: str) -> None:
        """Remove a key other than the one that this repository was opened with."""
        if slot_id == self.current:
            raise InvalidError(
                f"key {slot_id} is the one that this command uses: use another one to remove it, "
                "or put another in its place with 'nbdserve repo key passwd'"
            )
        if not is_key_id(slot_id) or self._store.size(KEYS + slot_id) is None:
            raise NotFoundError(
                f"there is no key {slot_id[:80]!r} in {self._store.name}; 'nbdserve repo key list' "
                "shows what there is"
            )
        self._retire(slot_id, self.current)

    def change(self, secret: Secret) -> str:
        """Put a key for ``secret`` in the place of the one that opened the repository."""
        old, new = self.current, self.add(secret)
        try:
            self._retire(old, new)
        except StorageError as error:
            raise type(error)(
                f"key {new} was added, but the old one, {old}, could not be removed; remove it "
                f"with 'nbdserve repo key remove': {error}"
            ) from error
        self.current = new
        return new

    def discard(self) -> None:
        """Take back the only key of a repository that was not made after all."""
        self._store.delete(KEYS + self.current)

    def problems(self) -> list[tuple[str, str]]:
        """The (key, problem) of objects under ``keys/`` that are damaged or foreign."""
        return [
            (KEYS + info.id, info.problem) for info in self.list_keys() if info.problem is not None
        ]

    def _check(self, slot_id: str, content: bytes) -> KeySlot:
        where = f"object {KEYS}{slot_id} in {self._store.name}"
        slot = KeySlot.decode(content, slot_id, where)
        if slot.repository_id != self._repository_id:
            raise CorruptError(f"{where}: it is a key of another repository")
        if not is_authentic(content, slot_id, self.sealer):
            raise CorruptError(f"{where}: it was not made by somebody who has a key")
        return slot

    def _retire(self, slot_id: str, staying: str) -> None:
        """Delete a key, sure that ``staying`` stays. See the module's text."""
        mark = removal_key(slot_id)
        self._store.put(mark, b"removed\n")
        if self._store.size(removal_key(staying)) is not None:
            self._store.delete(mark)
            raise InUseError(
                f"key {staying}, which would have to stay, is being removed by another command; if "
                "none runs, one was killed: renew the key first with 'nbdserve repo key passwd'"
            )
        if self._store.size(KEYS + staying) is None:
            self._store.delete(mark)
            raise InUseError(f"key {staying}, which would have to stay, was removed meanwhile")
        self._store.delete(KEYS + slot_id)
        self._store.delete(mark)


def encrypt(store: ObjectStore, config: Config, secret: Secret) -> tuple[Unlocked, bytes]:
    """Make the first key of a new repository; returns it open, and the object ``config``."""
    config = replace(config, cipher=CIPHER)
    master_key = os.urandom(MASTER_KEY_SIZE)
    slot = make_slot(master_key, config.repository_id, secret, config.created)
    keyring = Keyring(store, config.repository_id, master_key, slot.id)
    store.put(slot.key, slot.encode(keyring.sealer))
    sealed = keyring.sealer.seal(CONFIG_KEY, config.encode())
    fields = {
        "repository": bytes.fromhex(config.repository_id),
        "cipher": CIPHER,
        "features": [],
        "codec": "lz4",
        "sealed": bytes(sealed),
    }
    sealed_store = SealedObjectStore(store, keyring.sealer)
    return Unlocked(sealed_store, config, keyring), seal(Kind.CONFIG, fields)


def unlock(store: ObjectStore, fields: Fields, key: Key) -> Unlocked:
    """Open the repository whose object ``config`` has ``fields``. See the module's text."""
    needed = [feature[:40] for feature in fields.texts("features")]
    if needed:
        raise InvalidError(
            f"{fields.where}: the repository uses {', '.join(needed)}, which needs a newer nbdserve"
        )
    repository_id = fields.push("repository")
    if key is None:
        raise InvalidError(
            f"the repository in {store.name} is encrypted: give its passphrase with "
            "--passphrase-file, --passphrase-command or NBDSERVE_PASSPHRASE_FILE, or its key file "
            "with --repo-key-file or NBDSERVE_REPO_KEY_FILE"
        )
    secret = key if isinstance(key, Secret) else key()
    slots = _load(store)
    current, master_key, problems = _try_all(store, slots, repository_id, secret)
    if master_key is None and not slots.keys() >= _list_ids(store):
        slots = _load(store)  # another was put in the place of the one that was looked for
        current, master_key, problems = _try_all(store, slots, repository_id, secret)
    if master_key is None:
        raise _refusal(store, secret, problems if slots else None)
    keyring = Keyring(store, repository_id, master_key, current)
    record = keyring.sealer.unseal(CONFIG_KEY, fields.binary("sealed"), fields.where)
    config = Config.decode(record, fields.where, CIPHER)
    if config.repository_id != repository_id:
        raise CorruptError(f"{fields.where}: it is the config of another repository")
    return Unlocked(SealedObjectStore(store, keyring.sealer), config, keyring)


def _try_all(
    store: ObjectStore, slots: dict[str, bytes], repository_id: str, secret: Secret
) -> tuple[str, bytes | None, list[str]]:
    """The id of the key that ``secret`` opens, the master key, and what was wrong with others."""
    problems: list[str] = []
    for slot_id, content in slots.items():
        where = f"object {KEYS}{slot_id} in {store.name}"
        try:
            slot = KeySlot.decode(content, slot_id, where)
            # The key of an init that was killed, or lost a race, says another repository.
            master_key = slot.open(secret, where) if slot.repository_id == repository_id else None
            if master_key is not None:
                if is_authentic(content, slot_id, Sealer(master_key, repository_id)):
                    return slot_id, master_key, problems
                problems.append(f"{where}: it is damaged")
        except StorageError as error:
            problems.append(str(error))
    return "", None, problems


def _refusal(store: ObjectStore, secret: Secret, problems: list[str] | None) -> StorageError:
    """``problems`` are those of the keys that were tried; None when there was no key."""
    if problems is None:
        return CorruptError(
            f"the repository in {store.name} is encrypted and has no key left: nothing in it can "
            f"be read, unless there is a copy of what was under {KEYS}"
        )
    line = f"the {secret.kind} given does not open the repository in {store.name}"
    return CorruptError(f"{line}; {problems[0]}") if problems else InvalidError(line)


def _list_ids(store: ObjectStore) -> set[str]:
    ids = {key.removeprefix(KEYS) for key, _ in store.list(KEYS)}
    return {slot_id for slot_id in ids if is_key_id(slot_id)}


def _load(store: ObjectStore) -> dict[str, bytes]:
    """The objects under ``keys/`` by id, sorted; those that are removed meanwhile are left out."""
    ids = sorted(_list_ids(store))
    if len(ids) > _MOST_TRIED:
        raise CorruptError(
            f"{store.name} has {len(ids)} objects under {KEYS}, and not all can be tried: remove "
            "those that are no keys of yours"
        )
    found = {}
    for slot_id in ids:
        try:
            found[slot_id] = store.get(KEYS + slot_id, RECORD_LIMIT)
        except NotFoundError:
            continue
        except CorruptError:
            found[slot_id] = b""  # longer than any key: fails its check like any other damage
    return found
