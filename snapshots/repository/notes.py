"""Notes of what is damaged, so that the next push stores it anew.

``damaged/<key of a segment or an object of pages>`` says that verify found that object missing or
damaged, at which offsets, and in which regions of the volume (numbers of pages) that matters. The
next push of the volume does not take over what is noted, but stores what its source has there now;
so its snapshot is whole, and so are those that are pushed against it. Older ones stay harmed.

A note is a hint: a missing or wrong one costs no data. So it may be put by anyone at any time, two
who put one at once may lose a part of it until the next verify, and a collector removes it with the
object, or when no live snapshot needs that any more.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from backends.errors import CorruptError, InvalidError, NotFoundError
from backends.objects import ObjectStore
from snapshots.names import check_name
from snapshots.repository.damage import Finding
from snapshots.repository.envelope import Kind, seal, unseal
from snapshots.repository.holdings import THREADS, describe_object
from snapshots.repository.layout import NOTES, RECORD_LIMIT, noted_object, parse_data_key
from snapshots.repository.pages import Entry
from snapshots.repository.pipeline import Crew

_MOST = 7000  # offsets or regions in a note, so that it is a record of 64 KiB
_SEGMENTS = "segments/"


@dataclass(frozen=True)
class Note:
    """``offsets`` of chunks in a segment, or of records in an object of pages; None: all of it."""

    volume: str
    key: str
    found: float
    offsets: frozenset[int] | None
    regions: frozenset[int]

    def encode(self) -> bytes:
        return seal(
            Kind.DAMAGE,
            {
                "object": self.key,
                "volume": self.volume,
                "found": self.found,
                "offsets": None if self.offsets is None else _pack(self.offsets),
                "regions": _pack(self.regions),
            },
        )

    @classmethod
    def decode(cls, record: bytes, where: str) -> Note:
        fields = unseal(Kind.DAMAGE, record, where)
        return cls(
            check_name("volume", fields.text("volume")),
            fields.text("object"),
            fields.number("found"),
            _unpack(fields.binary("offsets"), where) if fields.has("offsets") else None,
            _unpack(fields.binary("regions"), where),
        )

    def joined(self, other: Note) -> Note:
        """Both together."""
        offsets = None
        if self.offsets is not None and other.offsets is not None:
            offsets = self.offsets | other.offsets
        return _note(self.volume, self.key, offsets, self.regions | other.regions)


@dataclass
class KnownDamage:
    """What is noted of a volume: by segment (push, number) the offsets, None being all of it."""

    segments: dict[tuple[str, int], frozenset[int] | None] = field(default_factory=dict)
    regions: set[int] = field(default_factory=set)

    def hits(self, entry: Entry) -> bool:
        """Whether the chunk of ``entry`` is noted, or its patch."""
        return any(self._hits(piece) for piece in entry.pieces())

    def _hits(self, piece: Entry) -> bool:
        place = piece[:2]
        if place not in self.segments:
            return False
        offsets = self.segments[place]
        return offsets is None or piece.offset in offsets


def list_notes(store: ObjectStore) -> dict[str, int]:
    """The keys of all notes, with their sizes."""
    return {key: size for key, size in store.list(NOTES) if noted_object(key) is not None}


def note_damage(store: ObjectStore, findings: Iterable[Finding]) -> int:
    """Note what a verification found, beside what was noted before; how many. StorageError."""
    noted = 0
    for finding in findings:
        if parse_data_key(finding.key) is None:
            continue
        offsets = None if finding.whole else frozenset(finding.offsets)
        note = _note(finding.volume, finding.key, offsets, frozenset(finding.regions))
        before = _read(store, NOTES + finding.key)
        if before is not None:
            note = before.joined(note)
        if before is None or (before.offsets, before.regions) != (note.offsets, note.regions):
            store.put(NOTES + finding.key, note.encode())
        noted += 1
    return noted


def drop_notes(store: ObjectStore, needed: set[str]) -> None:
    """Remove the notes of objects other than these, which all are sound. StorageError."""
    for key in list_notes(store):
        if noted_object(key) not in needed:
            store.delete(key)


def read_damage(store: ObjectStore, volume: str) -> KnownDamage:
    """What is noted of a volume. A note that cannot be read says nothing. UnavailableError."""
    known = KnownDamage()
    with Crew(THREADS, "notes") as crew:
        for note in crew.ordered(lambda key: _read(store, key), list_notes(store), 4 * THREADS):
            place = None if note is None else parse_data_key(note.key)
            if note is None or place is None or note.volume != volume:
                continue
            known.regions |= note.regions
            if note.key.startswith(_SEGMENTS):
                known.segments[place] = note.offsets
    return known


def _read(store: ObjectStore, key: str) -> Note | None:
    with suppress(NotFoundError, CorruptError, InvalidError):
        note = Note.decode(store.get(key, RECORD_LIMIT), describe_object(store, key))
        if note.key == noted_object(key):
            return note
    return None


def _note(volume: str, key: str, offsets: frozenset[int] | None, regions: frozenset[int]) -> Note:
    if offsets is not None and len(offsets) > _MOST:
        offsets = None
    if len(regions) > _MOST:  # the next verify finds what is left of them
        regions = frozenset(sorted(regions)[:_MOST])
    return Note(volume, key, time.time(), offsets, regions)


def _pack(numbers: frozenset[int]) -> bytes:
    return struct.pack(f">{len(numbers)}I", *sorted(numbers))


def _unpack(packed: bytes, where: str) -> frozenset[int]:
    if len(packed) % 4:
        raise CorruptError(f"{where}: its numbers are damaged")
    return frozenset(struct.unpack(f">{len(packed) // 4}I", packed))
