"""How much is measured: the full run, and the quick one that only shows that all of it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scripts.bench.scale import GIB, MIB

_PUSHED_A_SECOND = 400 * MIB  # at most, beside the guest


@dataclass(frozen=True)
class Scale:
    """Sizes in bytes."""

    quick: bool
    rounds: int
    seconds: int
    """Of each measurement of the guest's latency."""
    image: int
    """The disk of the comparison, and the one whose guest is looked at."""
    scattered: int
    """The disk that is changed in scattered places."""
    scattered_data: int
    """What that one holds."""
    writes: int
    """Blocks of 4 KiB that are changed there."""
    lazy: int
    """The volume that is restored lazily."""
    lazy_data: int
    """What that one holds."""
    lazy_reads: int
    """Reads that are timed there after the first."""

    def adjusted(
        self, rounds: int | None, seconds: int | None, image: int | None, data: int | None
    ) -> Scale:
        """The same with what the user asked for."""
        return replace(
            self,
            rounds=rounds or self.rounds,
            seconds=seconds or self.seconds,
            image=image or self.image,
            scattered_data=data or self.scattered_data,
        )

    @property
    def disk_bytes(self) -> int:
        """Room that is needed in the directory."""
        volumes = (self.rounds + 2) * self.image + 2 * self.scattered_data + self.lazy_data
        repositories = 4 * self.image + self.seconds * _PUSHED_A_SECOND + 2 * self.scattered_data
        # A peer stores a mebibyte around each write.
        repositories += self.rounds * min(self.writes << 20, self.scattered_data)
        return volumes + repositories + GIB

    @property
    def memory_gib(self) -> int:
        """Room that the S3 server needs, in memory, in GiB; what was deleted stays for a while."""
        return 6 + (5 * self.image + self.lazy_data) // GIB


FULL = Scale(
    quick=False,
    rounds=3,
    seconds=10,
    image=GIB,
    scattered=10 * GIB,
    scattered_data=GIB,
    writes=10_000,
    lazy=100 * GIB,
    lazy_data=GIB,
    lazy_reads=50,
)

QUICK = Scale(
    quick=True,
    rounds=1,
    seconds=1,
    image=32 * MIB,
    scattered=64 * MIB,
    scattered_data=16 * MIB,
    writes=100,
    lazy=10 * GIB,
    lazy_data=16 * MIB,
    lazy_reads=5,
)
