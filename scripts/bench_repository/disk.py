"""The disk that is backed up: the same content in a volume and in a raw image."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.jobs import KIB
from scripts.bench.scale import BLOCK, MIB
from scripts.bench.servers import Nbdserve

PIECE = 256 * KIB
RANDOM, TEXT, ZEROES, HOLE = "random", "text", "zeroes", "hole"
MIX = {RANDOM: 40, TEXT: 35, ZEROES: 10, HOLE: 15}
"""Of how many per cent of the pieces of the mixed image are what."""

_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_LONGEST_WORD = 11
_WORDS = _PHRASES = 2000
_PHRASE_WEIGHT = 4  # of a phrase, a word's being 1


class Text:
    """Text that nobody wrote, no two pieces alike: about half its size when compressed by lz4."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        weights = range(len(_LETTERS), 0, -1)
        words = [
            "".join(source.choices(_LETTERS, weights, k=source.randint(1, _LONGEST_WORD)))
            for _ in range(_WORDS)
        ]
        phrases = [" ".join(source.choices(words, k=source.randint(2, 6))) for _ in range(_PHRASES)]
        self._parts = words + phrases * _PHRASE_WEIGHT

    def make(self, length: int) -> bytes:
        """``length`` bytes of it."""
        made = ""
        while len(made) < length:
            made += " ".join(self._source.choices(self._parts, k=1 + length // 20)) + "\n"
        return made[:length].encode()


def mixed_pieces(size: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of the mixed image's pieces, ascending, without its holes."""
    source = random.Random(seed)
    text = Text(source)
    for offset in range(0, size, PIECE):
        length = min(PIECE, size - offset)
        (kind,) = source.choices(list(MIX), list(MIX.values()))
        if kind == RANDOM:
            yield offset, source.randbytes(length)
        elif kind == TEXT:
            yield offset, text.make(length)
        elif kind == ZEROES:
            yield offset, bytes(length)


def scattered_pieces(size: int, data: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of pieces of 1 MiB, half random and half text, at places chosen at random."""
    source = random.Random(seed)
    text = Text(source)
    for place in sorted(source.sample(range(size // MIB), data // MIB)):
        yield place * MIB, source.randbytes(MIB // 2) + text.make(MIB // 2)


def changed_blocks(size: int, count: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of ``count`` different blocks of 4 KiB, random ones with random content."""
    source = random.Random(seed)
    for block in source.sample(range(size // BLOCK), count):
        yield block * BLOCK, source.randbytes(BLOCK)


class Disk:
    """A raw image, sparse, and at ``volume`` of ``ours`` the same."""

    def __init__(self, ours: Nbdserve, image: Path, size: int) -> None:
        self.ours = ours
        self.image = image
        self.size = size
        self.volume = ""
        with image.open("xb") as file:
            file.truncate(size)

    def fill(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write to the image; ``new_volume`` is to follow."""
        with self.image.open("r+b") as file:
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def new_volume(self, name: str) -> None:
        """From now on the volume is a new one, with the image's content."""
        self.ours.command("volume", "create", name, "--size", str(self.size))
        self.volume = name
        with self.image.open("rb") as file, Client(self.ours.socket, name) as client:
            for offset, end in _data_runs(file.fileno(), self.size):
                for start in range(offset, end, PIECE):
                    data = os.pread(file.fileno(), min(PIECE, end - start), start)
                    client.write(start, data)
            client.flush()

    def change(self, count: int, seed: int) -> None:
        """Change blocks in the image and the volume."""
        with self.image.open("r+b") as file, Client(self.ours.socket, self.volume) as client:
            for offset, data in changed_blocks(self.size, count, seed):
                os.pwrite(file.fileno(), data, offset)
                client.write(offset, data)
            client.flush()
            os.fsync(file.fileno())

    def allocated(self) -> int:
        """Bytes of the image that are no holes."""
        with self.image.open("rb") as file:
            return sum(end - start for start, end in _data_runs(file.fileno(), self.size))


def _data_runs(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, end) of what a file holds."""
    end = 0
    with contextlib.suppress(OSError):  # ENXIO: nothing but a hole follows
        while end < size:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, end
