"""A file system without space under the data directory."""

import asyncio
import errno
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.errors import NoSpaceError
from backends.local_layers import LocalLayerStore
from snapshots import head as head_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.space import SpacePolicy
from snapshots.space_watch import Threshold

from .parts import (
    GIB,
    MIB,
    SYSTEM_PATH,
    Daemon,
    over_all_transports,
    require,
    require_root,
    run,
    run_nbdsh,
)

FILE_SYSTEM_MIB = 96


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory on a file system of its own, of `FILE_SYSTEM_MIB`.

    It is an ext4, or a tmpfs where there are no loop devices.
    """
    require_root()
    require("mke2fs", "mount")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(FILE_SYSTEM_MIB * MIB)
    run("/sbin/mke2fs", "-q", "-t", "ext4", "-m", "0", image)
    mounted.mkdir()
    if run("mount", "-o", "loop", image, mounted, check=False).returncode:
        run("mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM_MIB}m", "tmpfs", mounted)
    try:
        yield mounted
    finally:
        if subprocess.run(["umount", mounted], check=False).returncode:
            run("umount", "--lazy", mounted)


@over_all_transports
def test_full_disk(small_file_system: Path, start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(small_file_system / "data")
    daemon.create("disk", GIB)
    # A first layer that a snapshot holds, so that deleting the snapshot gives space back.
    run_nbdsh("h.pwrite(b'o' * 2**20, 0); h.pwrite(b'o' * 26 * 2**20, 2**26)", daemon.uri("disk"))
    daemon.command("snapshot", "create", "disk@first")
    run_nbdsh("h.trim(26 * 2**20, 2**26); h.flush()", daemon.uri("disk"))

    fill = """
import errno
import json
def fill(start, limit=1024):
    written = 0
    for index in range(limit):
        try:
            h.pwrite(bytes([index % 255 + 1]) * 2**20, start + index * 2**20)
        except nbd.Error as error:
            assert error.errnum == errno.ENOSPC, (error, error.errnum)
            return index
    return limit
def verify(count):
    for index in range(count):
        data = bytes(h.pread(2**20, 2**28 + index * 2**20))
        assert data == bytes([index % 255 + 1]) * 2**20, index
"""
    written = int(
        run_nbdsh(
            fill
            + """
count = fill(2**28, 200)
assert 20 < count < 100, count
verify(count)
# Overwriting takes no space; neither do TRIM and FLUSH.
h.pwrite(bytes([1]) * 2**20, 2**28)
h.pwrite(b"p" * 4096, 0)
h.trim(2**20, 2**28 + 2**20)
h.pwrite(bytes([2]) * 4096, 2**28 + 2**20)
h.flush()
assert bytes(h.pread(4096, 2**28 + 2**20)) == bytes([2]) * 4096
assert bytes(h.pread(2**20 - 4096, 2**28 + 2**20 + 4096)) == bytes(2**20 - 4096)
# What the TRIM gave back can be written again, and then it is full again.
assert fill(2**28 + 2**20, 1) in (0, 1)
for attempt in range(3):
    assert fill(2**29, 200) < 100
h.pwrite(bytes([2]) * 4096, 2**28 + 2**20)
h.flush()
print(count)
""",
            daemon.uri("disk"),
        )
    )
    assert daemon.is_running()

    # Everything acknowledged earlier reads back, now and after a restart on the full disk.
    check = f"""
for index in range({written}):
    if index != 1:
        data = bytes(h.pread(2**20, 2**28 + index * 2**20))
        assert data == bytes([index % 255 + 1]) * 2**20, index
assert bytes(h.pread(4096, 2**28 + 2**20)) == bytes([2]) * 4096
assert bytes(h.pread(4096, 0)) == b"p" * 4096
assert bytes(h.pread(2**20 - 4096, 4096)) == b"o" * (2**20 - 4096)
assert bytes(h.pread(26 * 2**20, 2**26)) == bytes(26 * 2**20)
h.flush()
"""
    run_nbdsh(check, daemon.uri("disk"))
    refused = daemon.command("snapshot", "create", "disk@second", check=False)
    assert refused.returncode == 1
    assert "make room" in refused.stderr
    assert daemon.stop() == 0
    daemon.start()
    run_nbdsh(check, daemon.uri("disk"))

    # Deleting the snapshot works on a full disk and gives back what only it held.
    assert run_nbdsh("print(bytes(h.pread(4, 2**26)))", daemon.uri("disk@first")) == "b'oooo'\n"
    daemon.command("snapshot", "delete", "disk@first")
    run_nbdsh(check, daemon.uri("disk"))
    output = run_nbdsh(fill + "print(fill(2**29 + 2**28, 8)); h.flush()", daemon.uri("disk"))
    assert output == "8\n", "the space that came back takes 8 MiB"
    daemon.command("snapshot", "create", "disk@third")
    run_nbdsh(check, daemon.uri("disk"))
    run("nbdcopy", daemon.uri("disk@third"), "null:")


@over_all_transports
def test_space_that_other_files_took_and_gave_back(
    small_file_system: Path, start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon(small_file_system / "data")
    daemon.create("disk", 64 * MIB)
    run_nbdsh("h.pwrite(b'a' * 2**20, 0); h.flush()", daemon.uri("disk"))
    ballast = small_file_system / "ballast"
    with ballast.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(64 << 10))
            file.flush()
    output = run_nbdsh(
        """
import errno
import json
failed = 0
for index in range(1, 64):
    try:
        h.pwrite(b"b" * 2**20, index * 2**20)
    except nbd.Error as error:
        assert error.errnum == errno.ENOSPC, error
        failed += 1
h.pwrite(b"c" * 2**20, 0)
h.flush()
assert bytes(h.pread(2**20, 0)) == b"c" * 2**20
print(failed > 0)
""",
        daemon.uri("disk"),
    )
    assert output == "True\n"
    refused = daemon.command("snapshot", "create", "disk@full", check=False)
    assert refused.returncode == 1
    refused = daemon.command("volume", "create", "other", "--size", "1M", check=False)
    assert refused.returncode in (0, 1)
    assert "Traceback" not in refused.stderr
    ballast.unlink()
    run_nbdsh(
        """
for index in range(1, 48):
    h.pwrite(b"d" * 2**20, index * 2**20)
h.flush()
assert bytes(h.pread(2**20, 0)) == b"c" * 2**20
for index in range(1, 48):
    assert bytes(h.pread(2**20, index * 2**20)) == b"d" * 2**20
""",
        daemon.uri("disk"),
    )
    daemon.command("snapshot", "create", "disk@later")


def test_the_file_system_gets_the_space_of_snapshots_and_trims_back(
    small_file_system: Path, start_daemon: Callable[..., Daemon]
) -> None:
    def free() -> int:
        run("sync", "--file-system", small_file_system)
        status = os.statvfs(small_file_system)
        return status.f_bavail * status.f_frsize

    def wait_for(least: int) -> None:
        deadline = time.monotonic() + 60
        while (found := free()) < least:
            assert time.monotonic() < deadline, (found, least)
            time.sleep(0.2)

    daemon = start_daemon(small_file_system / "data")
    daemon.create("disk", GIB)
    run_nbdsh("h.pwrite(b'a' * 4096, 0); h.flush()", daemon.uri("disk"))
    empty = free()
    run_nbdsh("h.pwrite(b'a' * 24 * 2**20, 0); h.flush()", daemon.uri("disk"))
    daemon.take_snapshot("disk@s")
    run_nbdsh("h.pwrite(b'b' * 24 * 2**20, 0); h.flush()", daemon.uri("disk"))
    assert free() < empty - 47 * MIB
    # All that the snapshot held has been overwritten since.
    daemon.command("snapshot", "delete", "disk@s")
    wait_for(empty - 27 * MIB)
    # There are two layers now, and a TRIM frees what each of them has.
    run_nbdsh("assert h.pread(24 * 2**20, 0) == b'b' * 24 * 2**20", daemon.uri("disk"))
    run_nbdsh("h.trim(2**30, 0); h.flush()", daemon.uri("disk"))
    wait_for(empty - 3 * MIB)


class Ballast:
    """A file beside the data directory that takes all the space there is, to the last block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take_all(self) -> None:
        # What was freed a moment ago comes back when the file system's journal is committed, which
        # syncfs does; so first that, and more than once.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for _ in range(5):
                run("sync", "--file-system", self.path)
                if os.fstatvfs(descriptor).f_bavail == 0:
                    return
                for length in (1 << 20, 1 << 16, 1 << 12):
                    with pytest.raises(OSError, match="No space left"):
                        while True:
                            os.write(descriptor, bytes(length))
        finally:
            os.close(descriptor)

    def leave(self, length: int) -> None:
        """Take all but `length` bytes."""
        self.take_all()
        os.truncate(self.path, self.path.stat().st_size - length)
        run("sync", "--file-system", self.path)

    def give_back(self) -> None:
        self.path.unlink()


def blocks(letter: str, count: int = 1) -> bytes:
    return letter.encode() * (count * 4096)


async def put(disk: Handle, offset: int, data: bytes) -> None:
    if not disk.try_write(offset, memoryview(data)):
        await disk.write(offset, data)


async def get(disk: Handle, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await disk.read(offset, memoryview(buffer))
    return bytes(buffer)


async def connect(catalogue: Catalogue, name: str) -> Handle:
    lease = await catalogue.open_volume(name, lambda: None)
    assert isinstance(lease, Handle)
    return lease


async def until(what: str, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert condition(), what


def test_every_operation_while_the_disk_is_full_and_after(
    small_file_system: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one life of the catalogue: full to the last block, the reserve gone too; then space."""
    monkeypatch.setattr(head_module, "_COMPACT_FROM", 32 << 10)
    caplog.set_level(logging.INFO)
    ballast = Ballast(small_file_system / "ballast")
    data = small_file_system / "data"

    async def scenario() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(data))
        await catalogue.create_volume("disk", GIB)
        await catalogue.create_volume("other", GIB)
        disk, other = await connect(catalogue, "disk"), await connect(catalogue, "other")
        await put(disk, 0, blocks("a", 512))
        await put(other, 0, blocks("o", 256))
        await other.flush()
        await catalogue.create_snapshots([("disk", "one")])
        await put(disk, 0, blocks("b", 256))
        await catalogue.create_snapshots([("disk", "two")])
        await put(disk, MIB, blocks("c", 256))
        await disk.flush()

        async def as_it_was() -> None:
            assert await get(disk, 0, MIB) == blocks("b", 256)
            assert await get(other, 0, MIB) == blocks("o", 256)

        (data / "reserve").unlink()
        ballast.take_all()
        # Writes.
        for volume in (disk, other):
            with pytest.raises(OSError, match="No space left") as refused:
                await put(volume, 2**28, blocks("x", 256))
            assert refused.value.errno == errno.ENOSPC
            assert await get(volume, 2**28, MIB) == bytes(MIB)
        await put(disk, MIB, blocks("d", 256))
        await disk.flush()
        await as_it_was()
        # Snapshots, of one volume and of several; clones and new volumes.
        for targets in ([("disk", "full")], [("disk", "full"), ("other", "full")]):
            with pytest.raises(NoSpaceError, match="make room"):
                await catalogue.create_snapshots(targets)
        catalogue.space.policy = SpacePolicy(min_free=Threshold())
        for targets in ([("disk", "full")], [("disk", "full"), ("other", "full")]):
            ballast.take_all()
            with pytest.raises(NoSpaceError, match="no space left"):
                await catalogue.create_snapshots(targets)
        ballast.take_all()
        with pytest.raises(NoSpaceError, match="no space left"):
            await catalogue.clone_volume("copy", "disk", "one")
        ballast.take_all()
        with pytest.raises(NoSpaceError, match="no space left"):
            await catalogue.create_volume("new", MIB)
        assert catalogue.volume_names() == ["disk", "other"]
        # Deleting a snapshot: with no space for its record it stays; with a little it goes, and
        # what is left to merge waits. (What runs in the background may free that little just then.)
        ballast.take_all()
        with pytest.raises(NoSpaceError, match="no space left"):
            await catalogue.delete_snapshot("disk", "one")
        if len(catalogue.list_snapshots("disk")) == 2:
            ballast.leave(128 << 10)
            with pytest.raises(NoSpaceError, match="no space left to merge a deleted snapshot"):
                await catalogue.delete_snapshot("disk", "one")
        assert len(catalogue.list_snapshots("disk")) == 1
        assert catalogue._merging.deferred
        await as_it_was()
        # A journal that is due to be rewritten: it cannot be, and goes on as it is.
        ballast.take_all()
        for number in range(100):
            await disk.trim(MIB + number * 4096, 4096)
            ballast.take_all()
            await disk.flush()
        assert "was not compacted" in caplog.text
        await as_it_was()
        assert await get(disk, MIB, MIB) == bytes(100 * 4096) + blocks("d", 156)
        assert "read-only" not in caplog.text

        ballast.give_back()
        await put(disk, 2**28, blocks("x", 256))
        await put(other, 2**28, blocks("y", 256))
        await disk.flush()
        await other.flush()
        await catalogue.create_snapshots([("disk", "three"), ("other", "three")])
        await catalogue.clone_volume("copy", "disk", "three")
        await until("the merges that were put off", lambda: not catalogue._merging.deferred)
        for snapshot in catalogue.list_snapshots("disk"):
            await catalogue.delete_snapshot("disk", snapshot.name)
        assert (await catalogue.show_volume("disk")).layers <= 2
        await as_it_was()
        assert await get(disk, 2**28, MIB) == blocks("x", 256)
        assert "read-only" not in caplog.text
        await catalogue.close()

        catalogue = await Catalogue.open(LocalLayerStore(data))
        disk, other = await connect(catalogue, "disk"), await connect(catalogue, "other")
        await as_it_was()
        assert await get(other, 2**28, MIB) == blocks("y", 256)
        await catalogue.close()

    asyncio.run(scenario())
    assert not any(record.exc_info for record in caplog.records)
    assert not list(data.glob("lost/*"))


def test_a_wiped_volume_is_not_on_the_disk_any_more(
    small_file_system: Path, tmp_path: Path, start_daemon: Callable[..., Daemon]
) -> None:
    """What only the volume had; and it works on a full disk, which then has space again."""
    daemon = start_daemon(small_file_system / "data")
    for name in ("secret", "plain"):
        daemon.create(name, GIB)
    fill = "h.pwrite({!r} * (4 * 2**20 // 16), {}); h.flush()"
    marks = {
        "own": b"wiped-from-disk-",
        "shared": b"kept-by-a-clone-",
        "plain": b"merely-deleted--",
    }
    run_nbdsh(fill.format(marks["shared"], 0), daemon.uri("secret"))
    daemon.command("snapshot", "create", "secret@first")
    daemon.command("volume", "create", "clone", "--from", "secret@first")
    run_nbdsh(fill.format(marks["own"], 2**20), daemon.uri("secret"))
    run_nbdsh(fill.format(marks["plain"], 0), daemon.uri("plain"))
    Ballast(small_file_system / "ballast").take_all()

    done = daemon.command("volume", "delete", "secret", "--with-snapshots", "--wipe").stdout
    assert re.fullmatch(
        r"deleted volume secret, wiped 4(\.\d)?M; not wiped: 4(\.\d)?M that clone use too\n", done
    )
    daemon.command("volume", "delete", "plain")
    (small_file_system / "ballast").unlink()
    assert run_nbdsh("print(bytes(h.pread(16, 2**21)))", daemon.uri("clone")) == (
        f"{marks['shared']!r}\n"
    )
    assert daemon.stop() == 0
    run("sync", "--file-system", small_file_system)
    image = tmp_path / "image"
    if image.stat().st_blocks * 512 > 8 * MIB:  # else it was a tmpfs: nothing of it is anywhere
        content = image.read_bytes()
        assert {name: mark in content for name, mark in marks.items()} == {
            "own": False, "shared": True, "plain": True
        }  # fmt: skip


HAMMER = """
import errno, itertools, sys
print("begun", flush=True)
for block in itertools.count():
    try:
        h.pwrite(b"t" * 2**16, (2**28 + block * 2**16) % 2**30)
    except nbd.Error as error:
        assert error.errnum == errno.ENOSPC, error
"""
RESERVE = 24


def test_a_volume_can_write_what_is_reserved_for_it_on_a_full_disk(
    small_file_system: Path, start_daemon: Callable[..., Daemon]
) -> None:
    """Others have filled it: a volume that goes on trying all the time, and files beside."""
    daemon = start_daemon(small_file_system / "data")
    daemon.create("thief", GIB)
    daemon.command("volume", "create", "ours", "--size", "1G", "--reserve", f"{RESERVE}M")
    status = json.loads(daemon.command("status", "--json").stdout)
    assert status["reserved"] == RESERVE * MIB
    assert RESERVE * MIB < status["held"] < (RESERVE + 8) * MIB
    refused = daemon.command("volume", "reserve", "thief", "1G", check=False)
    assert "volume thief: to reserve 1G another" in refused.stderr
    Ballast(small_file_system / "ballast").take_all()
    hammering = subprocess.Popen(
        ["nbdsh", "--uri", daemon.uri("thief"), "-c", HAMMER],
        stdout=subprocess.PIPE,
        env={**os.environ, "PATH": SYSTEM_PATH},
    )
    try:
        assert hammering.stdout is not None
        assert hammering.stdout.readline() == b"begun\n"
        half = RESERVE // 2
        run_nbdsh(
            f"for at in range({half}): h.pwrite(bytes([at + 1]) * 2**20, at * 2**21)\nh.flush()",
            daemon.uri("ours"),
        )
        # Small ones at random, each a run of its own in the journal and an extent of its own.
        count = (RESERVE - half - 2) * 256
        run_nbdsh(
            "import random; places = random.Random(1).sample(range(2**15, 2**17), "
            f"{count})\nfor at in places: h.pwrite(b's' * 4096, at * 2**12)\nh.flush()",
            daemon.uri("ours"),
        )
        assert hammering.poll() is None
    finally:
        hammering.kill()
        hammering.wait()
        hammering.stdout.close()
    daemon.kill()
    daemon.start()
    run_nbdsh(
        f"for at in range({half}): assert h.pread(2**20, at * 2**21) == bytes([at + 1]) * 2**20",
        daemon.uri("ours"),
    )
    # What is used up is as full as everything else is.
    run_nbdsh(
        """
import errno
import json
try:
    for at in range(64): h.pwrite(b"x" * 2**20, 2**29 + 2**28 + at * 2**20)
    assert False, "there is no space"
except nbd.Error as error:
    assert error.errnum == errno.ENOSPC
""",
        daemon.uri("ours"),
    )
    (small_file_system / "ballast").unlink()
    run_nbdsh("h.pwrite(b'x' * 2**20, 2**29 + 2**28); h.flush()", daemon.uri("ours"))
    done = daemon.command("volume", "reserve", "ours", "none")
    assert done.stdout == "reserved nothing for volume ours\n"
    assert json.loads(daemon.command("status", "--json").stdout)["held"] == 0
