"""fsfreeze as the hook of a backup, on an ext4 that lies on the volume that is backed up.

The file system is mounted over nbdfuse and a loop device. Nothing here waits for a write to it
before it is known to be thawed: what writes to a frozen file system cannot be killed.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .parts import DIE_WITH_PARENT, MIB, NBDSERVE, Daemon, require, require_root, run

TEXT = "what a program had not synced\n" * 1000


class Mounted:
    """An ext4 on a volume of the daemon."""

    def __init__(self, daemon: Daemon, volume: str, directory: Path) -> None:
        self.path = directory / "mounted"
        self.path.mkdir()
        self._fuse = directory / "fuse"
        self._fuse.mkdir()
        self._process = subprocess.Popen(
            [*DIE_WITH_PARENT, "nbdfuse", self._fuse, daemon.uri(volume)]
        )
        self._device = self._fuse / "nbd"
        deadline = time.monotonic() + 60
        while not self._device.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run("/sbin/mkfs.ext4", "-q", self._device)
        run("mount", "-o", "loop", self._device, self.path)

    def is_frozen(self) -> bool:
        """Whether it was until now: only what is frozen can be thawed."""
        return run("/sbin/fsfreeze", "-u", self.path, check=False).returncode == 0

    def close(self) -> None:
        self.is_frozen()
        run("umount", self.path, check=False)
        run("umount", self._fuse, check=False)
        self._process.wait(timeout=60)


@pytest.fixture
def mounted(daemon: Daemon, tmp_path: Path) -> Iterator[Mounted]:
    require("nbdfuse", "fsfreeze", "mkfs.ext4", "dumpe2fs", "debugfs", "nbdcopy")
    require_root()
    daemon.create("guest", 64 * MIB)
    found = Mounted(daemon, "guest", tmp_path)
    yield found
    found.close()


class Policy:
    """Backs up the volume, with these hooks."""

    def __init__(self, daemon: Daemon, directory: Path, freeze: str, thaw: str) -> None:
        self._daemon = daemon
        self.url = f"file://{directory}/repository"
        daemon.command("repo", "init", self.url)
        self.notes = directory / "notes"
        self._file = directory / "nbdserve.toml"
        self._file.write_text(
            f'[[policy]]\nname = "p"\nvolumes = ["guest"]\nrepository = "{self.url}"\n'
            f"freeze_command = ['sh', '-c', 'echo freeze >>{self.notes}; {freeze}']\n"
            f"thaw_command = ['sh', '-c', '{thaw} && echo thaw >>{self.notes}']\n"
        )
        self.command = ["backup", "--policy", "p", "--config", str(self._file)]

    def wait_for(self, *words: str) -> None:
        deadline = time.monotonic() + 60
        while not self.notes.exists() or self.notes.read_text().split() != list(words):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def needs_recovery(daemon: Daemon, snapshot: str, copy: Path) -> bool:
    """Copy a snapshot, and say whether its file system is as after a power cut."""
    run("nbdcopy", daemon.uri(f"guest@{snapshot}"), copy)
    return "needs_recovery" in run("/sbin/dumpe2fs", "-h", copy).stdout


def test_a_frozen_file_system_needs_no_recovery(
    daemon: Daemon, mounted: Mounted, tmp_path: Path
) -> None:
    policy = Policy(daemon, tmp_path, f"fsfreeze -f {mounted.path}", f"fsfreeze -u {mounted.path}")
    (mounted.path / "file").write_text(TEXT)
    daemon.take_snapshot("guest@not-frozen")
    snapshot = daemon.json(*policy.command)["snapshot"]
    assert not mounted.is_frozen()
    (mounted.path / "after").write_text(TEXT)
    assert needs_recovery(daemon, "not-frozen", tmp_path / "copy")
    assert not needs_recovery(daemon, snapshot, tmp_path / "copy")
    assert run("/sbin/debugfs", "-R", "cat file", tmp_path / "copy").stdout == TEXT


def test_it_is_thawed_when_the_backup_is_killed(
    daemon: Daemon, mounted: Mounted, tmp_path: Path
) -> None:
    """Frozen, and the freeze command has not ended yet: nothing may be left of either."""
    policy = Policy(
        daemon, tmp_path, f"fsfreeze -f {mounted.path}; echo frozen >>{tmp_path}/notes; sleep 600",
        f"fsfreeze -u {mounted.path}",
    )  # fmt: skip
    expected: list[str] = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [NBDSERVE, *policy.command], env={**daemon.env}, stderr=subprocess.DEVNULL
        )
        expected += ["freeze", "frozen"]
        policy.wait_for(*expected)
        os.kill(process.pid, number)
        assert process.wait(timeout=60) != 0
        expected.append("thaw")
        policy.wait_for(*expected)
        assert not mounted.is_frozen()
        (mounted.path / f"after-{number}").write_text(TEXT)
    assert daemon.json("repo", "list", policy.url)["snapshots"] == []


def test_it_is_thawed_when_the_freeze_fails(
    daemon: Daemon, mounted: Mounted, tmp_path: Path
) -> None:
    policy = Policy(
        daemon, tmp_path, f"fsfreeze -f {mounted.path}; exit 1", f"fsfreeze -u {mounted.path}"
    )
    failed = daemon.command(*policy.command, check=False)
    assert failed.returncode == 1
    assert "not frozen: the freeze command 'sh' ended with status 1" in failed.stderr
    assert not mounted.is_frozen()
    (mounted.path / "after").write_text(TEXT)
