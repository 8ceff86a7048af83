"""How much is measured: the full run, and the quick one that only shows that all of it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 1 << 20
GIB = 1 << 30
BLOCK = 4096


@dataclass(frozen=True)
class Scale:
    """Sizes in bytes; ``job_milliseconds`` is the length of each fio job."""

    quick: bool
    rounds: int
    job_milliseconds: int
    volume: int
    """Volume of the comparison and of the probe of many layers."""
    snapshots: int
    """Of the compared volume, whose layers are one more."""
    gate_repetitions: int
    extents: int
    """Of the volume whose opening is timed: single blocks with a hole after each."""
    layers: int
    """Of the volume with many."""
    touched: int
    """Written all over a 16 TiB volume before its memory is looked at."""
    trimmed: int
    """Written all over a 1 TiB volume before all of it is trimmed."""
    idle: int
    """Of the crowd: clients that ask for nothing."""
    stuck: int
    """Of the crowd: clients that stopped in the middle of something."""
    working: int
    """Clients that go on meanwhile."""
    flushes: int
    """Of each load whose syncs and bytes are counted."""

    def adjusted(self, rounds: int | None, seconds: int | None) -> Scale:
        """The same with what the user asked for."""
        return replace(
            self,
            rounds=rounds or self.rounds,
            job_milliseconds=seconds * 1000 if seconds else self.job_milliseconds,
        )

    @property
    def disk_bytes(self) -> int:
        """Room that the hungriest part needs."""
        return (
            max(16 * self.volume, 2 * self.extents * BLOCK, 3 * self.touched, 2 * self.trimmed)
            + GIB
        )


FULL = Scale(
    quick=False,
    rounds=3,
    job_milliseconds=3000,
    volume=GIB,
    snapshots=8,
    gate_repetitions=10,
    extents=1_000_000,
    layers=250,
    touched=GIB,
    trimmed=10 * GIB,
    idle=1000,
    stuck=200,
    working=50,
    flushes=400,
)

QUICK = Scale(
    quick=True,
    rounds=1,
    job_milliseconds=200,
    volume=32 * MIB,
    snapshots=2,
    gate_repetitions=1,
    extents=10_000,
    layers=20,
    touched=16 * MIB,
    trimmed=16 * MIB,
    idle=40,
    stuck=9,
    working=4,
    flushes=8,
)
