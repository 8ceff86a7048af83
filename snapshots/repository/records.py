"""The records beside pages: config, intent, outcome with its root, tombstone, pointer, plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from backends.errors import CorruptError, InvalidError
from backends.locking import MODES, Retention
from snapshots.names import MAX_VOLUME_SIZE, check_name
from snapshots.repository.envelope import Fields, Kind, seal, unseal
from snapshots.repository.layout import (
    MAX_CHUNK_SIZE,
    MIN_CHUNK_SIZE,
    PAGE_ENTRIES,
    is_collectable,
    parse_root_key,
)
from snapshots.repository.pages import PageTable

CIPHER = "aes-256-gcm"  # of an encrypted repository, in its config

_COUNT = 2**63 - 1
REPACKING = "repacking"
OBJECT_LOCK = "object-lock"
_FEATURES = {REPACKING, OBJECT_LOCK}  # that this program understands
MIN_LOCK_SECONDS = 86400
MAX_LOCK_SECONDS = 24_000 * 86400  # one and a half times that is less than S3's hundred years


class ObjectLock(NamedTuple):
    """What a repository under Object Lock promises: ``retaining`` has the rules.

    For ``seconds`` after a push was acknowledged its snapshot can be restored.
    """

    mode: str
    seconds: int

    @property
    def retention(self) -> Retention:
        """How objects are put: longer than promised, so that few have to be extended."""
        return Retention(self.mode, self.seconds + self.seconds // 2)


@dataclass(frozen=True)
class Config:
    """What was decided when the repository was made; never changed. ``chunk_size`` in bytes."""

    repository_id: str
    chunk_size: int
    conditional_put: bool  # whether the store was seen to refuse a second conditional PUT
    created: float
    features: tuple[str, ...] = (REPACKING,)
    cipher: str = "none"
    object_lock: ObjectLock | None = None

    def encode(self) -> bytes:
        lock = self.object_lock
        return seal(
            Kind.CONFIG,
            {
                "repository": bytes.fromhex(self.repository_id),
                "chunk_size": self.chunk_size,
                "page_entries": PAGE_ENTRIES,
                "codec": "lz4",
                "cipher": self.cipher,
                "conditional_put": self.conditional_put,
                "created": self.created,
                "features": list(self.features),
                **({"lock_mode": lock.mode, "lock_seconds": lock.seconds} if lock else {}),
            },
        )

    @classmethod
    def decode(cls, record: bytes, where: str, cipher: str = "none") -> Config:
        """``cipher`` is what the repository was opened with."""
        fields = unseal(Kind.CONFIG, record, where)
        features = fields.texts("features")
        needed = [feature[:40] for feature in features if feature not in _FEATURES]
        if fields.text("cipher") != cipher:
            needed.append("encryption")
        if fields.text("codec") != "lz4":
            needed.append("another codec")
        if needed:
            raise InvalidError(
                f"{where}: the repository uses {', '.join(needed)}, which needs a newer nbdserve"
            )
        fields.integer("page_entries", PAGE_ENTRIES, PAGE_ENTRIES)
        chunk_size = fields.integer("chunk_size", MIN_CHUNK_SIZE, MAX_CHUNK_SIZE)
        if chunk_size & (chunk_size - 1):
            raise CorruptError(f"{where}: the chunk size {chunk_size} is no power of two")
        lock: ObjectLock | None = None
        if OBJECT_LOCK in features:
            lock = ObjectLock(
                fields.text("lock_mode"),
                fields.integer("lock_seconds", MIN_LOCK_SECONDS, MAX_LOCK_SECONDS),
            )
            if lock.mode not in MODES:
                raise CorruptError(f"{where}: the Object Lock mode {lock.mode[:40]!r} is unknown")
        return cls(
            fields.push("repository"),
            chunk_size,
            fields.boolean("conditional_put"),
            fields.number("created"),
            tuple(features),
            cipher,
            lock,
        )


@dataclass(frozen=True)
class Intent:
    """A push is under way. As long as it has no outcome, all that it pins is kept.

    ``parents`` are pushes whose snapshots it may refer to, ``donors`` given-up pushes of whose
    segments it may take what they had stored. ``line`` is said of pushes that somebody makes one
    after another, never two at a time: the next may end this one, whatever snapshot it stores.
    """

    push: str
    parents: tuple[str, ...]
    volume: str
    snapshot: str
    snapshot_id: str
    started: float
    donors: tuple[str, ...] = ()
    line: str = ""

    @property
    def pins(self) -> tuple[str, ...]:
        return self.parents + self.donors

    def encode(self) -> bytes:
        return seal(
            Kind.INTENT,
            {
                "push": bytes.fromhex(self.push),
                "parents": bytes.fromhex("".join(self.parents)),
                "volume": self.volume,
                "snapshot": self.snapshot,
                "snapshot_id": self.snapshot_id,
                "started": self.started,
                "donors": bytes.fromhex("".join(self.donors)),
                "line": self.line,
            },
        )

    @classmethod
    def decode(cls, record: bytes, where: str) -> Intent:
        fields = unseal(Kind.INTENT, record, where)
        return cls(
            fields.push("push"),
            tuple(fields.pushes("parents")),
            _name(fields, "volume"),
            _name(fields, "snapshot"),
            fields.text("snapshot_id"),
            fields.number("started"),
            tuple(fields.pushes("donors")) if fields.has("donors") else (),
            fields.text("line") if fields.has("line") else "",
        )


@dataclass(frozen=True)
class Summary:
    """One snapshot in the repository, as listings show it. Sizes in bytes.

    ``data`` counts the chunks that are no holes, plain; ``stored`` the same chunks as they are
    stored, whoever uploaded them; ``uploaded`` what this push added to the store for them: its
    segments, its pages and its outcome. ``push`` is the snapshot's identity in the repository.
    """

    volume: str
    snapshot: str
    snapshot_id: str
    push: str
    created: float
    pushed: float
    size: int
    data: int
    stored: int
    uploaded: int
    parent: str | None  # name of the snapshot that it was pushed against
    parent_push: str | None

    def fields(self) -> dict[str, Any]:
        return {
            "push": bytes.fromhex(self.push),
            "volume": self.volume,
            "snapshot": self.snapshot,
            "snapshot_id": self.snapshot_id,
            "created": self.created,
            "pushed": self.pushed,
            "size": self.size,
            "data": self.data,
            "stored": self.stored,
            "uploaded": self.uploaded,
            "parent": self.parent,
            "parent_push": bytes.fromhex(self.parent_push) if self.parent_push else None,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> Summary:
        return cls(
            volume=_name(fields, "volume"),
            snapshot=_name(fields, "snapshot"),
            snapshot_id=fields.text("snapshot_id"),
            push=fields.push("push"),
            created=fields.number("created"),
            pushed=fields.number("pushed"),
            size=fields.integer("size", 1, MAX_VOLUME_SIZE),
            data=fields.integer("data", 0, _COUNT),
            stored=fields.integer("stored", 0, _COUNT),
            uploaded=fields.integer("uploaded", 0, _COUNT),
            parent=_name(fields, "parent") if fields.has("parent") else None,
            parent_push=fields.push("parent_push") if fields.has("parent_push") else None,
        )

    @classmethod
    def decode_pointer(cls, record: bytes, where: str) -> Summary:
        return cls.from_fields(unseal(Kind.POINTER, record, where))

    @property
    def label(self) -> str:
        return f"{self.volume}@{self.snapshot}"


@dataclass(frozen=True)
class Root:
    """The manifest of one snapshot. ``summary.uploaded`` leaves out the outcome itself.

    ``retained``: until when, at least, all that it refers to is under Object Lock; 0 without.
    """

    summary: Summary
    table: PageTable
    retained: float = 0.0

    def fields(self, generation: int) -> dict[str, Any]:
        fields = {**self.summary.fields(), **self.table.encode(), "generation": generation}
        return {**fields, "retained": self.retained} if self.retained else fields

    @classmethod
    def from_fields(cls, fields: Fields, push: str, generation: int, chunk_size: int) -> Root:
        """Decode and check the root of the snapshot ``push``."""
        fields.integer("generation", generation, generation)
        summary = Summary.from_fields(fields)
        if summary.push != push:
            raise CorruptError(f"{fields.where}: its root belongs to another push")
        pages = -(-summary.size // (PAGE_ENTRIES * chunk_size))
        retained = fields.number("retained") if fields.has("retained") else 0.0
        return cls(summary, PageTable.decode(fields, pages), retained)


@dataclass(frozen=True)
class Repacked:
    """The root of a snapshot that the push ``repack`` put in place of the generation before."""

    repack: str
    generation: int
    root: Root

    def encode(self) -> bytes:
        fields = self.root.fields(self.generation)
        return seal(Kind.ROOT, {**fields, "repack": bytes.fromhex(self.repack)})

    @classmethod
    def decode(cls, record: bytes, key: str, chunk_size: int, where: str) -> Repacked:
        """Decode the object ``key``, and check that it belongs there."""
        names = parse_root_key(key)
        if names is None:
            raise CorruptError(f"{where}: it is not the key of a root")
        fields = unseal(Kind.ROOT, record, where)
        if fields.push("repack") != names[2]:
            raise CorruptError(f"{where}: it is a root of another push")
        root = Root.from_fields(fields, names[0], names[1], chunk_size)
        return cls(names[2], names[1], root)


@dataclass(frozen=True)
class Outcome:
    """How a push ended: committed, with the root of its snapshot, or aborted, without.

    ``repacked`` is said of a collector's own push, which is committed without a root in here.
    ``why`` and ``taken_by`` are of an aborted push; ``taken_by`` is the push of the same snapshot
    that ended it in order to go on where it was.
    """

    push: str
    root: Root | None
    why: str = ""
    taken_by: str | None = None
    repacked: bool = False

    def encode(self) -> bytes:
        roots = []
        if self.root is not None:
            # Repacking puts others in its place, as objects of their own.
            roots.append(self.root.fields(0))
        return seal(
            Kind.OUTCOME,
            {
                "push": bytes.fromhex(self.push),
                "state": self.state,
                "why": self.why,
                "taken_by": bytes.fromhex(self.taken_by) if self.taken_by else None,
                "roots": roots,
            },
        )

    @classmethod
    def decode(cls, record: bytes, push: str, chunk_size: int, where: str) -> Outcome:
        fields = unseal(Kind.OUTCOME, record, where)
        if fields.push("push") != push:
            raise CorruptError(f"{where}: it is the outcome of another push")
        state = fields.text("state")
        roots = fields.maps("roots")
        if state == "aborted" and not roots:
            taken_by = fields.push("taken_by") if fields.has("taken_by") else None
            return cls(push, None, fields.text("why"), taken_by)
        if state == "repacked" and not roots:
            return cls(push, None, repacked=True)
        if state != "committed" or len(roots) != 1:
            raise CorruptError(f"{where}: state {state!r} with {len(roots)} roots")
        return cls(push, Root.from_fields(roots[0], push, 0, chunk_size))

    @property
    def state(self) -> str:
        if self.root is not None:
            return "committed"
        return "repacked" if self.repacked else "aborted"

    @property
    def summary(self) -> Summary:
        """Of a committed push, the snapshot; its outcome's own bytes count as uploaded, too."""
        assert self.root is not None
        summary = self.root.summary
        return replace(summary, uploaded=summary.uploaded + len(self.encode()))


@dataclass(frozen=True)
class Pointer:
    """What a listing shows of a snapshot."""

    of: Summary | Outcome

    def encode(self) -> bytes:
        summary = self.of if isinstance(self.of, Summary) else self.of.summary
        return seal(Kind.POINTER, summary.fields())


@dataclass(frozen=True)
class Tombstone:
    """The snapshot of ``push`` is deleted. That the object exists is what counts."""

    push: str
    volume: str
    snapshot: str
    deleted: float

    def encode(self) -> bytes:
        return seal(
            Kind.TOMBSTONE,
            {
                "push": bytes.fromhex(self.push),
                "volume": self.volume,
                "snapshot": self.snapshot,
                "deleted": self.deleted,
            },
        )

    @classmethod
    def decode(cls, record: bytes, where: str) -> Tombstone:
        fields = unseal(Kind.TOMBSTONE, record, where)
        return cls(
            fields.push("push"),
            _name(fields, "volume"),
            _name(fields, "snapshot"),
            fields.number("deleted"),
        )


@dataclass(frozen=True)
class Plan:
    """Objects that a collector found to be dead; whoever meets the plan may delete them."""

    plan: str
    keys: tuple[str, ...]

    def encode(self) -> bytes:
        return seal(
            Kind.PLAN,
            {"plan": bytes.fromhex(self.plan), "keys": "\n".join(self.keys).encode("ascii")},
        )

    @classmethod
    def decode(cls, record: bytes, where: str) -> Plan:
        fields = unseal(Kind.PLAN, record, where)
        try:
            keys = fields.binary("keys").decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise CorruptError(f"{where}: its keys are damaged") from None
        wrong = next((key for key in keys if not is_collectable(key)), None)
        if wrong is not None:
            raise CorruptError(f"{where}: it names {wrong[:80]!r}, which nobody may collect")
        return cls(fields.push("plan"), tuple(keys))


def _name(fields: Fields, name: str) -> str:
    try:
        return check_name(name, fields.text(name))
    except InvalidError as error:
        raise CorruptError(f"{fields.where}: {error}") from None
