"""A file system without space under the data directory."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .parts import GIB, MIB, Daemon, over_all_transports, require, require_root, run, run_nbdsh

FILE_SYSTEM_MIB = 96


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory on an ext4 file system of its own, of `FILE_SYSTEM_MIB`."""
    require_root()
    require("mke2fs", "mount")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(FILE_SYSTEM_MIB * MIB)
    run("/sbin/mke2fs", "-q", "-t", "ext4", "-m", "0", image)
    mounted.mkdir()
    run("mount", "-o", "loop", image, mounted)
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
    run_nbdsh("h.pwrite(b'o' * 2**20, 0); h.pwrite(b'o' * 2**24, 2**26)", daemon.uri("disk"))
    daemon.command("snapshot", "create", "disk@first")
    run_nbdsh("h.trim(2**24, 2**26); h.flush()", daemon.uri("disk"))

    fill = """
import errno
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
assert bytes(h.pread(2**24, 2**26)) == bytes(2**24)
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
