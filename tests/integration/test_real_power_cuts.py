"""A virtual machine with a volatile disk is cut off and must have all that it acknowledged.

One round of it; `make torture` plays more, and sees that they bite. The other tests are of what
judges: the model and the disk.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from .parts import DIE_WITH_PARENT, PROJECT, require, run
from .power.disk import SECTOR, Disk
from .power.model import Clock, Volume, WrongError, fill, is_torn, read_numbers

PROGRAMS = ("qemu-system-x86_64", "busybox", "mkfs.ext4", "mkfs.xfs", "modprobe", "nbdsh")


@pytest.mark.timeout(900)
def test_cut_off() -> None:
    require(*PROGRAMS)
    if not (PROJECT / ".cache" / "kernel" / "complete").exists():
        pytest.skip("no kernel in .cache/kernel: run scripts/install-test-dependencies")
    words = ["--rounds", "1", "--file-system", "ext4", "--seed", "8"]
    done = subprocess.run(
        [*DIE_WITH_PARENT, sys.executable, "-m", "tests.integration.power", *words],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def write(volume: Volume, clock: Clock, *sectors: int) -> int:
    """Let a write be acknowledged; its number."""
    number = clock.tick()
    volume.send(sectors, number, number)
    clock.acknowledged[number] = clock.tick()
    return number


def test_a_sector_may_hold_the_durable_write_and_later_ones() -> None:
    clock, volume = Clock(), Volume("v", 4, [0] * 4)
    first = write(volume, clock, 0, 1)
    second = write(volume, clock, 1)
    for numbers in ([0, 0, 0, 0], [first, second, 0, 0], [0, first, 0, 0]):
        volume.examine(numbers, clock)
    with pytest.raises(WrongError, match=r"sector 2 \(byte 1024\) holds write 1"):
        volume.examine([0, 0, first, 0], clock)
    with pytest.raises(WrongError, match="never written there"):
        volume.examine([bytes(511) + b"x", 0, 0, 0], clock)


def test_what_was_flushed_is_there_or_wrong() -> None:
    clock, volume = Clock(), Volume("v", 2, [0] * 2)
    first = write(volume, clock, 0)
    sent = clock.tick()
    second = write(volume, clock, 1)
    volume.settle(clock, sent)
    with pytest.raises(WrongError, match="sector 0"):
        volume.examine([0, second], clock)
    assert volume.examine([first, 0], clock) == 1
    # That was seen: it counts as written, so nothing else can be flushed.
    volume.settle(clock, clock.tick())
    with pytest.raises(WrongError, match="sector 1"):
        volume.examine([first, second], clock)


def test_a_snapshot_is_of_one_instant() -> None:
    clock, volume = Clock(), Volume("v", 3, [0] * 3)
    snapshot = volume.begin_snapshot("s", clock, 1)
    first = write(volume, clock, 0)
    second = write(volume, clock, 1)
    with pytest.raises(WrongError, match="lacks"):
        snapshot.examine([0, second, 0], clock)
    other = volume.begin_snapshot("t", clock, 2)
    volume.watching.clear()
    write(volume, clock, 0)
    other.examine([first, second, 0], clock)
    with pytest.raises(WrongError, match=f"holds write 0 instead of any of .{first}."):
        other.examine([0, second, 0], clock)


def test_a_rollback_in_doubt_is_done_or_not() -> None:
    clock, volume = Clock(), Volume("v", 2, [0] * 2)
    snapshot = volume.begin_snapshot("s", clock, 1)
    volume.watching.clear()
    snapshot.examine([0, 0], clock)
    number = write(volume, clock, 0, 1)
    volume.settle(clock, clock.tick())
    volume.rolled_back = snapshot
    with pytest.raises(WrongError, match="nor is the rollback"):
        volume.examine([0, number], clock)
    volume.examine([0, 0], clock)
    assert volume.durable == [0, 0]


def test_content_names_its_write_and_its_place() -> None:
    data = fill(7, 0) + fill(8, 1) + fill(0, 2)
    assert read_numbers(data) == [7, 8, 0]
    assert read_numbers(fill(7, 1)) == [fill(7, 1)]
    torn = data[:500] + fill(9, 0)[500:512]
    assert read_numbers(torn) == [torn]
    assert is_torn(torn, 0, [3, 7, 9])
    assert not is_torn(torn, 0, [3, 7])
    assert not is_torn(torn, 0, [3, 9])
    assert not is_torn(fill(7, 1), 0, [3, 7])
    assert is_torn(bytes(16) + fill(7, 0)[16:], 0, [0, 7])


def test_only_what_was_not_flushed_may_be_torn() -> None:
    clock = Clock()
    volume = Volume("v", 2, [5, 5])
    volume.send(range(1), 7, clock.tick())
    torn = fill(7, 0)[:128] + fill(5, 0)[128:]
    assert volume.examine([torn, 5], clock) == 0
    with pytest.raises(WrongError, match="sector 1"):
        volume.examine([torn, fill(7, 1)[:128] + fill(5, 1)[128:]], clock)


def test_a_cut_keeps_what_was_flushed_and_any_of_the_rest(data_directory: Path) -> None:
    require("qemu-io")
    data_directory.mkdir()
    disk = Disk(data_directory, 64 * SECTOR)
    source = random.Random(3)
    ends = set()
    for _ in range(25):
        disk.power_on()
        lines = ["write -P 1 0 16k", "flush", "write -P 2 0 12k", "write -P 3 8k 4k", "abort"]
        words = [word for line in lines for word in ("-c", line)]
        node = f"nbd+unix:///?socket={disk.socket}"
        run("qemu-io", "-t", "writeback", "-f", "raw", *words, node, check=False)
        disk.cut(source)
        durable, current = ((data_directory / name).read_bytes() for name in ("durable", "current"))
        assert durable == current
        sectors = [durable[start : start + SECTOR] for start in range(0, len(durable), SECTOR)]
        assert all(len(set(sector)) == 1 for sector in sectors)
        ends.add(bytes(sector[0] for sector in sectors))
    disk.close()
    for end in ends:
        assert end[:8] in (bytes([1] * 8), bytes([2] * 8)), "the first block is not torn"
        assert set(end[8:16]) <= {1, 2}
        assert set(end[16:24]) <= {1, 2, 3}
        assert end[24:32] == bytes([1] * 8)
        assert not any(end[32:])
    both = bytes([2] * 16 + [3] * 8)
    assert {bytes([1] * 24), both} <= {end[:24] for end in ends}, "lost as a whole, and not at all"
    assert any(len(set(end[8:16])) == 2 for end in ends), "torn"
