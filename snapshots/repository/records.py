"""The records beside pages: config, intent, outcome with its root, tombstone, pointer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from backends.errors import CorruptError, InvalidError
from snapshots.names import MAX_VOLUME_SIZE, check_name
from snapshots.repository.envelope import Fields, Kind, seal, unseal
from snapshots.repository.layout import MAX_CHUNK_SIZE, MIN_CHUNK_SIZE, PAGE_ENTRIES
from snapshots.repository.pages import PageTable

CIPHER = "aes-256-gcm"  # of an encrypted repository, in its config

_COUNT = 2**63 - 1


@dataclass(frozen=True)
class Config:
    """What was decided when the repository was made; never changed. ``chunk_size`` in bytes."""

    repository_id: str
    chunk_size: int
    conditional_put: bool  # whether the store was seen to refuse a second conditional PUT
    created: float
    cipher: str = "none"

    def encode(self) -> bytes:
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
                "features": [],
            },
        )

    @classmethod
    def decode(cls, record: bytes, where: str, cipher: str = "none") -> Config:
        """``cipher`` is what the repository was opened with."""
        fields = unseal(Kind.CONFIG, record, where)
        needed = [feature[:40] for feature in fields.texts("features")]
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
        return cls(
            fields.push("repository"),
            chunk_size,
            fields.boolean("conditional_put"),
            fields.number("created"),
            cipher,
        )


@dataclass(frozen=True)
class Intent:
    """A push is under way. As long as it has no outcome, its parent stays live."""

    push: str
    parent: str | None
    volume: str
    snapshot: str
    snapshot_id: str
    started: float

    def encode(self) -> bytes:
        return seal(
            Kind.INTENT,
            {
                "push": bytes.fromhex(self.push),
                "parents": bytes.fromhex(self.parent) if self.parent else b"",
                "volume": self.volume,
                "snapshot": self.snapshot,
                "snapshot_id": self.snapshot_id,
                "started": self.started,
            },
        )

    @classmethod
    def decode(cls, record: bytes, where: str) -> Intent:
        fields = unseal(Kind.INTENT, record, where)
        parents = fields.pushes("parents")
        return cls(
            fields.push("push"),
            parents[0] if parents else None,
            _name(fields, "volume"),
            _name(fields, "snapshot"),
            fields.text("snapshot_id"),
            fields.number("started"),
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

    def encode_pointer(self) -> bytes:
        return seal(Kind.POINTER, self.fields())

    @classmethod
    def decode_pointer(cls, record: bytes, where: str) -> Summary:
        return cls.from_fields(unseal(Kind.POINTER, record, where))

    @property
    def label(self) -> str:
        return f"{self.volume}@{self.snapshot}"


@dataclass(frozen=True)
class Root:
    """The manifest of one snapshot. ``summary.uploaded`` leaves out the outcome itself."""

    summary: Summary
    table: PageTable


@dataclass(frozen=True)
class Outcome:
    """How a push ended: committed, with the root of its snapshot, or aborted, without."""

    push: str
    root: Root | None
    why: str = field(default="")  # of an aborted push

    def encode(self) -> bytes:
        roots = []
        if self.root is not None:
            # A generation above 0 is for roots that repacking puts in place of this one.
            roots.append(
                {**self.root.summary.fields(), **self.root.table.encode(), "generation": 0}
            )
        return seal(
            Kind.OUTCOME,
            {
                "push": bytes.fromhex(self.push),
                "state": "committed" if self.root else "aborted",
                "why": self.why,
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
            return cls(push, None, fields.text("why"))
        if state != "committed" or len(roots) != 1:
            raise CorruptError(f"{where}: state {state!r} with {len(roots)} roots")
        root = roots[0]
        root.integer("generation", 0, 0)
        summary = Summary.from_fields(root)
        if summary.push != push:
            raise CorruptError(f"{where}: its root belongs to another push")
        page_bytes = PAGE_ENTRIES * chunk_size
        pages = -(-summary.size // page_bytes)
        return cls(push, Root(summary, PageTable.decode(root, pages)))


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


def _name(fields: Fields, name: str) -> str:
    try:
        return check_name(name, fields.text(name))
    except InvalidError as error:
        raise CorruptError(f"{fields.where}: {error}") from None
