"""Keeping what comes out of a pipe: a push has to know the size, and reads at several places."""

from __future__ import annotations

import os

from backends.errors import InvalidError
from snapshots.images.blocks import data_runs, write_at
from snapshots.names import MAX_VOLUME_SIZE

_PIECE = 1 << 20


def spool(descriptor: int, copy: int) -> int:
    """Read to the end, into the empty file ``copy``; zeros become holes. Returns the bytes.

    OSError; InvalidError when there is more than a volume can hold.
    """
    size = 0
    while piece := _read_piece(descriptor):
        for start, end in data_runs(piece):
            write_at(copy, memoryview(piece)[start:end], size + start)
        size += len(piece)
        if size > MAX_VOLUME_SIZE:
            raise InvalidError("there is more than 16 TiB, the most that a volume has")
    os.ftruncate(copy, size)
    return size


def _read_piece(descriptor: int) -> bytes:
    """A whole piece unless the end comes before: a pipe gives 64 KiB at a time."""
    parts: list[bytes] = []
    missing = _PIECE
    while missing and (part := os.read(descriptor, missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
