"""Going on with a push: the chunks that others, which were ended for that, had stored.

Every segment ends with an index of its chunks. A push stores its chunks in the order of the volume,
so the indexes are read one after another as the new push gets there: memory is that of one index
for each donor. A segment that is missing, or whose index cannot be read, is done without.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from backends.errors import CorruptError, InvalidError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.holdings import describe_object
from snapshots.repository.layout import SEGMENT_LIMIT, SEGMENTS, parse_data_key, segment_key
from snapshots.repository.pages import Entry
from snapshots.repository.segments import (
    INDEX_FOOTER_SIZE,
    IndexedChunk,
    decode_index,
    index_length,
)

_TAIL = 64 << 10  # bytes in which an index mostly is


def read_index(store: ObjectStore, key: str, size: int) -> list[IndexedChunk]:
    """The index of a segment of ``size`` bytes; CorruptError or NotFoundError otherwise."""
    where = describe_object(store, key)
    tail = store.get_range(key, max(0, size - _TAIL), min(size, _TAIL))
    length = index_length(tail, size, where) + INDEX_FOOTER_SIZE
    if length > len(tail):
        tail = store.get_range(key, size - length, length)
    return decode_index(tail[len(tail) - length : -INDEX_FOOTER_SIZE], where)


class Donors:
    """What some pushes had stored; asked for chunks in ascending order."""

    def __init__(self, store: ObjectStore, pushes: list[str], chunk_size: int) -> None:
        self._donors = [_Donor(store, push, chunk_size) for push in pushes]

    def find(self, first: int, end: int) -> dict[int, list[Entry]]:
        """Entries for some of the chunks from ``first`` to before ``end``; compare the digests.

        One that is a patch has :data:`segments.PATCHED` in its codec.
        """
        found: dict[int, list[Entry]] = {}
        for donor in self._donors:
            for chunk, entry in donor.find(first, end).items():
                found.setdefault(chunk, []).append(entry)
        return found


class _Donor:
    def __init__(self, store: ObjectStore, push: str, chunk_size: int) -> None:
        self._store = store
        self._push = push
        self._chunk_size = chunk_size
        self._chunks: deque[tuple[int, Entry]] = deque()
        numbered = ((parse_data_key(key), size) for key, size in store.list(f"{SEGMENTS}{push}/"))
        self._segments = deque(
            sorted((key[1], size) for key, size in numbered if key and size <= SEGMENT_LIMIT)
        )

    def find(self, first: int, end: int) -> dict[int, Entry]:
        chunks = self._chunks
        while chunks and chunks[0][0] < first:
            chunks.popleft()
        while self._segments and (not chunks or chunks[-1][0] < end):
            number, size = self._segments.popleft()
            with suppress(NotFoundError, CorruptError, InvalidError):
                chunks.extend(item for item in self._load(number, size) if item[0] >= first)
        found: dict[int, Entry] = {}
        while chunks and chunks[0][0] < end:
            chunk, entry = chunks.popleft()
            found[chunk] = entry
        return found

    def _load(self, number: int, size: int) -> list[tuple[int, Entry]]:
        index = read_index(self._store, segment_key(self._push, number), size)
        return [(chunk.number, self._entry(number, chunk)) for chunk in self._in_order(index)]

    def _in_order(self, index: list[IndexedChunk]) -> list[IndexedChunk]:
        usable = [chunk for chunk in index if 0 < chunk.length <= self._chunk_size]
        return sorted(usable, key=lambda chunk: chunk.number)

    def _entry(self, segment: int, chunk: IndexedChunk) -> Entry:
        return Entry(self._push, segment, chunk.offset, chunk.length, chunk.codec, chunk.digest)
