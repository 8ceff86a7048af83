"""The comparison: every program on the same disk, one right after the other within each step.

In each round there is a new volume with the image's content, and each contestant has a new
repository. The steps, in their order:

* a full push;
* one after 1 % of the disk's 4 KiB blocks, chosen at random, got other content;
* one with nothing changed;
* the restore of the last into a new volume or file (in the first round compared with the image);
* a lazy restore, timed from the command's start until a client has read a block of those changed;
* deleting the first snapshot, and collecting what nobody needs then.

What a push reads is in the page cache. Before each step everything is synced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from scripts.bench.process import BenchError, tell
from scripts.bench.scale import BLOCK
from scripts.bench.servers import Nbdserve
from scripts.bench_repository import results as names
from scripts.bench_repository.contestants import (
    Borg,
    Check,
    Contestant,
    OfNbdserve,
    Restic,
)
from scripts.bench_repository.disk import Disk, changed_blocks, mixed_pieces
from scripts.bench_repository.measuring import Cost
from scripts.bench_repository.results import Results, Sample
from scripts.bench_repository.scale import Scale
from scripts.bench_repository.stores import Bucket, Directory

_FIRST, _CHANGED, _UNCHANGED = "first", "changed", "unchanged"
_SEED = 11


def compare(
    scale: Scale, directory: Path, ours: Nbdserve, bucket: Bucket, results: Results
) -> None:
    """Run all steps of all contestants for all rounds, into ``results.samples``."""
    tell("  making the image")
    disk = Disk(ours, directory / "image.raw", scale.image)
    disk.fill(mixed_pieces(scale.image, _SEED))
    results.data = disk.allocated()
    contestants = _contestants(disk, directory, bucket, scale, results.absent)
    for turn in range(scale.rounds):
        disk.new_volume(f"disk-{turn}")
        with _repositories(contestants, turn):
            for number, (step, prepare, run) in enumerate(_steps(disk, turn)):
                prepare()
                line = []
                for place in range(len(contestants)):
                    # Who goes first changes, lest one always follows another's leftovers.
                    contestant, _ = contestants[(place + turn + number) % len(contestants)]
                    cost = run(contestant)
                    if cost is None:
                        continue
                    stored = contestant.stored()
                    results.samples.append(Sample.of(turn, step, contestant.name, cost, stored))
                    line.append(f"{contestant.name} {cost.seconds:.2f}")
                if line:
                    tell(f"  round {turn + 1}, {step}, s: {'; '.join(line)}")


Entry = tuple[Contestant, Directory | Bucket]
"""A contestant, and where its repositories are."""


def _contestants(
    disk: Disk, scratch: Path, bucket: Bucket, scale: Scale, absent: list[str]
) -> list[Entry]:
    """Those whose programs are there."""
    directory = Directory(scratch)
    found: list[Entry] = [(OfNbdserve(names.NBDSERVE_S3, disk, scratch), bucket)]
    if not scale.quick:
        found.append((OfNbdserve(names.ENCRYPTED_S3, disk, scratch, encrypted=True), bucket))
    if "restic" not in absent:
        found.append((Restic(names.RESTIC_S3, disk, scratch), bucket))
        found.append((Restic(names.STDIN_S3, disk, scratch, stdin=True), bucket))
    found.append((OfNbdserve(names.NBDSERVE_DIRECTORY, disk, scratch), directory))
    if "restic" not in absent:
        found.append((Restic(names.RESTIC_DIRECTORY, disk, scratch), directory))
    if "borg" not in absent:
        found.append((Borg(names.BORG_DIRECTORY, disk, scratch), directory))
    return found


@contextmanager
def _repositories(contestants: list[Entry], turn: int) -> Iterator[None]:
    """A new repository for each, removed afterwards."""
    with ExitStack() as stack:
        for number, (contestant, where) in enumerate(contestants):
            contestant.begin(where.place(f"repository-{turn}-{number}"))
            stack.callback(contestant.end)
        yield


def _steps(
    disk: Disk, turn: int
) -> list[tuple[str, Callable[[], None], Callable[[Contestant], Cost | None]]]:
    """The name of each step, what is done before it, and what it is."""

    def take(snapshot: str) -> Callable[[], None]:
        return lambda: disk.ours.take_snapshot(disk.volume, snapshot)

    count = disk.size // BLOCK // 100

    def change() -> None:
        disk.change(count, seed=turn)
        take(_CHANGED)()

    def nothing() -> None:
        pass

    check = comparer(disk) if turn == 0 else None
    somewhere, _ = next(changed_blocks(disk.size, count, seed=turn))
    return [
        (names.FULL_PUSH, take(_FIRST), lambda one: one.push(_FIRST)),
        (names.CHANGED_PUSH, change, lambda one: one.push(_CHANGED)),
        (names.UNCHANGED_PUSH, take(_UNCHANGED), lambda one: one.push(_UNCHANGED)),
        (names.RESTORE, nothing, lambda one: one.restore(_UNCHANGED, check)),
        (names.FIRST_BYTE, nothing, lambda one: one.first_byte(_UNCHANGED, somewhere)),
        (names.DELETE, nothing, lambda one: one.delete(_FIRST)),
        (names.COLLECT, nothing, lambda one: one.collect()),
    ]


def comparer(disk: Disk) -> Check:
    """Compares what was restored with the image; BenchError when it differs."""

    def check(offset: int, data: bytes) -> None:
        with disk.image.open("rb") as image:
            image.seek(offset)
            if image.read(len(data)) != data or not data:
                raise BenchError(f"what was restored differs from the image at offset {offset}")

    return check
