"""What volumes and snapshots may hold while things fail: a set of contents for each block.

``now`` is what a read may give, ``durable`` what may be there when everything is opened again. An
operation that succeeds leaves one content of ``now``; one that fails leaves it open whether it
was done, and a read that gives one of the contents settles it. A FLUSH that succeeds makes
``durable`` what is ``now``; without one, whatever was written since may be there as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCK = 4096
EMPTY = bytes(BLOCK)

Contents = dict[int, frozenset[bytes]]
"""What blocks may hold; a block that is not in it holds zeroes."""

_EMPTY = frozenset((EMPTY,))


@dataclass
class Modelled:
    """A volume; ``sure`` says whether it surely exists, ``sizes`` which sizes it may have,
    and ``other_name`` under which it may be found instead; ``id`` is known once a life ended."""

    sizes: set[int]
    now: Contents = field(default_factory=dict)
    durable: Contents = field(default_factory=dict)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    sure: bool = True
    other_name: str = ""
    id: str = ""

    def put(self, offset: int, data: bytes, *, done: bool) -> None:
        """``data`` was written, or (not ``done``) may have been, in any part."""
        for block in range(offset // BLOCK, (offset + len(data) + BLOCK - 1) // BLOCK):
            begin = max(offset, block * BLOCK)
            end = min(offset + len(data), (block + 1) * BLOCK)
            part = data[begin - offset : end - offset]
            at = begin - block * BLOCK
            old = self.now.get(block, _EMPTY)
            new = frozenset(each[:at] + part + each[at + len(part) :] for each in old)
            self.now[block] = new if done else old | new
            self.durable[block] = self.durable.get(block, _EMPTY) | new

    def flushed(self) -> None:
        """Everything that was acknowledged is durable."""
        self.durable = dict(self.now)

    def may_revert(self) -> None:
        """A volume that failed is opened again: reads may find what was durable before."""
        for block, contents in self.durable.items():
            self.now[block] = self.now.get(block, _EMPTY) | contents

    def may_become(self, other: Contents) -> None:
        """A failed rollback: what is found later is what was there, or ``other``."""
        self.durable = {
            block: self.durable.get(block, _EMPTY) | other.get(block, _EMPTY)
            for block in self.durable.keys() | other.keys()
        }


@dataclass
class Snapshot:
    """What a snapshot holds, if it is there, which is ``sure`` or not."""

    holds: Contents
    size: set[int]
    sure: bool


def settle(where: str, contents: Contents, block: int, found: bytes) -> None:
    """Check what was read of a block; from now on that is what it holds."""
    allowed = contents.get(block, _EMPTY)
    assert found in allowed, (
        f"{where}, block {block}: {summary(found)} was read,"
        f" {' or '.join(sorted(map(summary, allowed)))} expected"
    )
    contents[block] = frozenset((found,))


def summary(content: bytes) -> str:
    """A block's content in a few characters: runs of bytes and how long they are."""
    runs: list[list[int]] = []
    for byte in content:
        if runs and runs[-1][0] == byte:
            runs[-1][1] += 1
        else:
            runs.append([byte, 1])
    if len(runs) > 6:
        return f"{content[:8].hex()}…"
    return "+".join(f"{byte:02x}*{count}" for byte, count in runs)
