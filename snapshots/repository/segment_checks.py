"""What a verification checks in segments: that what is needed is there, and, deep, what it holds.

``check_extent`` is for one thread, ``check_range`` for any number, after ``check_extent`` of what
the range is for.
"""

from __future__ import annotations

from typing import NamedTuple

from backends.errors import CorruptError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.donors import read_index
from snapshots.repository.holdings import describe_object
from snapshots.repository.insisting import TRIES
from snapshots.repository.layout import SEGMENTS, parse_numbered_key, segment_key
from snapshots.repository.pages import Entry
from snapshots.repository.reading import Fetched, Part, Range, fetch_patches, unpack_entry
from snapshots.repository.regions import chunk_length
from snapshots.repository.segments import SEGMENT_HEADER_SIZE, segment_header

Segment = tuple[str, int]  # push, number


class Trouble(NamedTuple):
    """A piece that is damaged, or the header or index of its segment, which restores do without.

    ``missing``: the segment is.
    """

    key: str
    problem: str
    piece: Entry | None
    missing: bool = False


class SegmentChecks:
    """Of one verification. What it found in order is remembered: headers, indexes, sizes."""

    def __init__(self, store: ObjectStore, chunk_size: int) -> None:
        self._store = store
        self._chunk_size = chunk_size
        self._headers_seen: set[Segment] = set()
        self._sizes: dict[str, dict[int, int]] = {}

    def check_extent(self, piece: Entry) -> Trouble | None:
        """Whether the segment of a piece is there and long enough."""
        sizes = self._sizes.get(piece.push)
        if sizes is None:
            sizes = {}
            for key, size in self._store.list(f"{SEGMENTS}{piece.push}/"):
                number = parse_numbered_key(key)
                if number is not None:
                    sizes[number] = size
            self._sizes[piece.push] = sizes
        found = sizes.get(piece.segment)
        if found is not None and found >= piece.offset + piece.length:
            return None
        key = segment_key(piece.push, piece.segment)
        where = describe_object(self._store, key)
        found = self._store.size(key)  # in case it was the listing that was damaged
        if found is None:
            return Trouble(key, f"{where} is missing", piece, missing=True)
        sizes[piece.segment] = found
        if found >= piece.offset + piece.length:
            return None
        return Trouble(key, f"{where} is too short: it ends at {found}", piece)

    def check_range(self, planned: Range, size: int) -> tuple[int, list[Trouble]]:
        """Fetch a range of a volume of ``size`` bytes, and check all that is in it.

        Returns how many bytes were read, and what is wrong.
        """
        for _ in range(TRIES - 1):
            fetched, troubles = self._look(planned, size)
            if not troubles:
                return fetched, []
            # Perhaps it was damaged on its way only: look at the headers again, too.
            for part in planned.parts:
                self._headers_seen -= {piece[:2] for piece in part.entry.pieces()}
        return self._look(planned, size)

    def _look(self, planned: Range, size: int) -> tuple[int, list[Trouble]]:
        where = describe_object(self._store, planned.key)
        troubles: list[Trouble] = []
        segment = planned.parts[0].entry[:2]
        begin, end = planned.offset, planned.offset + planned.length
        first = segment not in self._headers_seen
        if first:
            self._headers_seen.add(segment)
            begin = begin if begin > 2 * SEGMENT_HEADER_SIZE else 0
        try:
            data = self._store.get_range(planned.key, begin, end - begin)
            if first:
                troubles += self._check_header(segment, b"" if begin else data, where)
        except (NotFoundError, CorruptError):
            for part in planned.parts:
                troubles += self._check_alone(part, size)
            return 0, troubles
        for part in planned.parts:
            for piece in part.entry.pieces()[1:]:
                troubles += self._check_patched(piece[:2])
        patches = fetch_patches(self._store, planned.parts)
        fetched = Fetched(data[planned.offset - begin :], patches)
        for part in planned.parts:
            sizes = self._chunk_size, chunk_length(part.chunk, self._chunk_size, size)
            try:
                unpack_entry(part.entry, *fetched.pieces(part), sizes, where)
            except CorruptError:
                troubles += self._check_alone(part, size)
        return end - begin + sum(map(len, patches.values())), troubles

    def _check_alone(self, part: Part, size: int) -> list[Trouble]:
        """Once more, by itself: it may have been damaged on its way, or not itself."""
        sizes = self._chunk_size, chunk_length(part.chunk, self._chunk_size, size)
        stored: list[bytes] = []
        troubles: list[Trouble] = []
        for piece in part.entry.pieces():
            key = segment_key(piece.push, piece.segment)
            where = describe_object(self._store, key)
            try:
                stored.append(self._store.get_range(key, piece.offset, piece.length))
                unpack_entry(piece, stored[-1], None, sizes, where)
                if len(stored) > 1 and not troubles:
                    unpack_entry(part.entry, stored[0], stored[1], sizes, where)
            except (NotFoundError, CorruptError) as error:
                missing = isinstance(error, NotFoundError)
                troubles.append(Trouble(key, str(error), piece, missing))
        return troubles

    def _check_patched(self, segment: Segment) -> list[Trouble]:
        """The header of a segment that has patches, and maybe nothing else."""
        if segment in self._headers_seen:
            return []
        self._headers_seen.add(segment)
        key = segment_key(*segment)
        try:
            return self._check_header(segment, b"", describe_object(self._store, key))
        except NotFoundError:
            return []  # each patch is missing
        except CorruptError as error:
            return [Trouble(key, str(error), None)]

    def _check_header(self, segment: Segment, data: bytes, where: str) -> list[Trouble]:
        """The header of a segment, which begins with ``data``, and its index."""
        key = segment_key(*segment)
        found = data[:SEGMENT_HEADER_SIZE] or self._store.get_range(key, 0, SEGMENT_HEADER_SIZE)
        if found == segment_header(*segment):
            return self._check_index(key, segment)
        if found != segment_header(*segment, indexed=False):
            return [Trouble(key, f"{where}: its header is wrong", None)]
        return []

    def _check_index(self, key: str, segment: Segment) -> list[Trouble]:
        """The index of a segment, which only a push that goes on with another one reads."""
        try:
            read_index(self._store, key, self._sizes[segment[0]][segment[1]])
        except CorruptError as error:
            return [Trouble(key, str(error), None)]
        return []
