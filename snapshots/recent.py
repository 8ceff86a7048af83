"""What a head took and its journal does not say yet: for the next process, after a kill.

A client that stays, such as a kernel or qemu that connects again, takes for granted that what was
answered is there, flushed or not: to it the server's cache is a disk's, and no power failed. The
data is: it is in the page cache. Which blocks it is in, is in this process only, until the journal
has it; and the journal must not have it before the disk has the data (head.py). So it is written
down here before the answer goes out, in a **scratch** file that nobody ever syncs. After a power
cut it says nothing.

Two files take turns, one **generation** each. What is pending is noted in one; when the head
captures it, for its journal, what comes then is noted in the other, from its beginning. A
generation is overwritten only by the one after the next, and by then the journal has it. A record
is ::

    4 bytes   CRC-32 of the rest, begun with that of the layer's name and the machine's run
    4 bytes   generation
    8 bytes   first block
    8 bytes   four times the end block, plus what the blocks became: DATA or ZERO

Numbers are little endian. The records of a file are those from its beginning up to the first whose
checksum or generation is another. Those of another run of the machine have another checksum. To
apply both files, the older generation first, is right whatever of it the journal has already: it
is what happened, in order, and the last of it wins.

**Behind the gate** of a snapshot, before its commit, clients write into a head that no manifest
names. Its files then begin with a record whose end is FOLLOWS, and whose first block is the name
of the head below: what a kill leaves in it is moved down there (gates.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backends.layers import LayerStore, ScratchFile
from snapshots.extent_log import Run
from snapshots.names import MAX_VOLUME_SIZE
from snapshots.owner_map import DATA, ZERO

FILES = ("recent-0", "recent-1")
FOLLOWS = 3

_RECORD = struct.Struct("<IIQQ")
_BODY = struct.Struct("<IQQ")
_KIND_BITS = 2
_ROOM = 64 << 10


class Recent:
    """The two files of a head; all methods on the event loop's thread, none waits for a disk."""

    def __init__(self, files: tuple[ScratchFile, ScratchFile], seed: int) -> None:
        self._files = files
        self._seed = seed
        self._generation = 1
        self._position = 0
        self._follows: int | None = None
        self._broken = False

    def follow(self, layer: str | None) -> None:
        """Nothing is noted yet: what will be follows that head, until None says that it is over."""
        self._follows = None if layer is None else int(layer, 16)
        self._begin()

    def note(self, runs: Iterable[Run]) -> None:
        """Note runs, in the order of their coming; OSError, and nothing of them counts then."""
        if self._broken:
            return
        self._append((first, end << _KIND_BITS | kind) for first, end, kind in runs)

    def turn(self) -> None:
        """What was noted is on its way to the journal, and what comes is noted in the other file.

        The journal has what was there. No generation is left out: the files would have one without
        the ones after it, which undid it.
        """
        if self._position or self._broken:
            self._generation += 1
            self._position = 0
            self._broken = False
            self._begin()

    def _begin(self) -> None:
        if self._follows is not None and self._position == 0:
            # Neither the gate nor a sync may fail for want of this: then nothing is noted.
            with contextlib.suppress(OSError):
                self._append([(self._follows, FOLLOWS)])

    def _append(self, records: Iterable[tuple[int, int]]) -> None:
        body, seed, generation = _BODY.pack, self._seed, self._generation
        content = bytearray()
        for first, last in records:
            rest = body(generation, first, last)
            content += zlib.crc32(rest, seed).to_bytes(4, "little")
            content += rest
        file = self._files[generation & 1]
        try:
            file.write(self._position, content)
        except OSError:
            # What is not whole would undo what the journal has by and by; so would the last
            # generation without this one. It goes second: maybe the journal does not have it yet.
            self._broken = True
            for found in (file, self._files[1 - (generation & 1)]):
                with contextlib.suppress(OSError):
                    found.clear()
            raise
        self._position += len(content)

    def _older_first(self) -> tuple[ScratchFile, ScratchFile]:
        """The newer one must not be gone before the older one.

        As long as nothing of this generation is noted its file has the one before the last.
        """
        newer = self._generation & 1 if self._position else 1 - (self._generation & 1)
        return self._files[1 - newer], self._files[newer]

    def remove(self) -> None:
        """The journal has everything, or what was written is lost: nothing is to be applied."""
        for file in self._older_first():
            with contextlib.suppress(OSError):
                file.remove()
            file.close()

    def close(self) -> None:
        """Leave the files as they are."""
        for file in self._files:
            file.close()


@dataclass(frozen=True)
class Found:
    """What a killed process noted: runs, oldest first, and the head that they follow, if they do.

    ``files`` has the names of the two files, the one with the older generation first.
    """

    runs: list[Run]
    follows: str | None
    files: Sequence[str]


NOTHING = Found([], None, FILES)


async def read_recent(store: LayerStore, layer: str) -> Found:
    """What there is of this run of the machine. OSError."""
    run = store.machine_run
    if not run:
        return NOTHING
    found: list[tuple[int, str, list[Run], str | None]] = []
    for name in FILES:
        content = await store.read_log(layer, name)
        generation, runs, follows = _read(content or b"", _seed(layer, run))
        found.append((generation, name, runs, follows))
    found.sort(key=lambda each: each[:2])
    return Found(
        [run for _, _, runs, _ in found for run in runs],
        next((follows for _, _, _, follows in found if follows is not None), None),
        [name for _, name, _, _ in found],
    )


async def open_recent(store: LayerStore, layer: str, found: Found) -> Recent | None:
    """The files of a head, emptied; the journal has what was ``found`` in them. OSError.

    None where the store cannot tell one run of the machine from another.
    """
    run = store.machine_run
    if not run:
        return None

    def make() -> Recent:
        # The older one first: it must not be left alone.
        files = {name: store.open_scratch(layer, name) for name in found.files}
        for file in files.values():
            # Otherwise there is none on a full disk to note what a client frees.
            with contextlib.suppress(OSError):
                file.reserve(_ROOM)
        first, second = FILES
        return Recent((files[first], files[second]), _seed(layer, run))

    return await asyncio.to_thread(make)


def _read(content: bytes, seed: int) -> tuple[int, list[Run], str | None]:
    runs: list[Run] = []
    follows: str | None = None
    found: int | None = None
    for offset in range(0, len(content) - _RECORD.size + 1, _RECORD.size):
        check, generation, first, last = _RECORD.unpack_from(content, offset)
        if check != zlib.crc32(content[offset + 4 : offset + _RECORD.size], seed):
            break
        if found not in (None, generation):
            break
        found = generation
        if last == FOLLOWS:
            follows = f"{first:016x}"
            continue
        kind, end = last & (1 << _KIND_BITS) - 1, last >> _KIND_BITS
        if kind not in (DATA, ZERO) or not first < end <= MAX_VOLUME_SIZE:
            break
        runs.append((first, end, kind))
    return found or 0, runs, follows


def _seed(layer: str, run: bytes) -> int:
    return zlib.crc32(run, zlib.crc32(layer.encode()))
