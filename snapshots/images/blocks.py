"""Finding zeros, and whole reads and writes of file descriptors."""

from __future__ import annotations

import os
from collections.abc import Iterator

from snapshots.names import BLOCK_SIZE

_ZERO_BLOCK = bytes(BLOCK_SIZE)


def data_runs(content: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the runs of blocks in ``content`` that are not all zero."""
    view = memoryview(content)
    start: int | None = None
    for position in range(0, len(view), BLOCK_SIZE):
        block = view[position : position + BLOCK_SIZE]
        if block == _ZERO_BLOCK[: len(block)]:
            if start is not None:
                yield start, position
                start = None
        elif start is None:
            start = position
    if start is not None:
        yield start, len(view)


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of ``content`` at ``offset``; OSError."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset``; returns how much there was before the file's end."""
    done = 0
    while done < len(buffer):
        read = os.preadv(descriptor, [buffer[done:]], offset + done)
        if read == 0:
            break
        done += read
    return done
