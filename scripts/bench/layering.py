"""Volumes whose data is spread over many layers, each block in a randomly chosen one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.scale import BLOCK, MIB


def make_content(size: int, seed: int) -> bytes:
    """Random bytes, whole MiB of them, the same for the same arguments."""
    source = random.Random(seed)
    return b"".join(source.randbytes(MIB) for _ in range(size // MIB))


def assign(blocks: int, layers: int, seed: int, together: int = 1) -> bytes:
    """For each of ``blocks`` the layer, 0 (oldest) to ``layers`` - 1, that holds it; at most 256.

    ``together`` neighbours, a divisor of ``blocks``, are in the same layer. The same arguments
    give the same answer.
    """
    chosen = random.Random(seed).choices(range(layers), k=blocks // together)
    return b"".join(bytes((layer,)) * together for layer in chosen)


def pieces_of(
    layer: int, assignment: bytes, content: memoryview
) -> Iterator[tuple[int, memoryview]]:
    """(offset, data) of each block of a layer, ascending."""
    block = assignment.find(layer)
    while block >= 0:
        offset = block * BLOCK
        yield offset, content[offset : offset + BLOCK]
        block = assignment.find(layer, block + 1)


def build(
    where: Path,
    volume: str,
    assignment: bytes,
    content: memoryview,
    seal: Callable[[int], None],
) -> None:
    """Write each block of ``content`` into its layer; ``seal(n)`` takes the snapshot over layer n.

    The last layer stays the head.
    """
    last = max(assignment)
    with Client(where, volume) as client:
        for layer in range(last + 1):
            client.write_many(pieces_of(layer, assignment, content))
            client.flush()
            if layer < last:
                seal(layer)
