"""A policy that real cron runs every minute, to radosgw.

cron has /etc/cron.d and /var/spool/cron of its own, in a mount namespace of its own, and runs
nothing but the lines that `nbdserve policy crontab` prints. NBDSERVE_CRON_MINUTES says how many
runs there are to be; 1 unless given. With more than one, a second run is started while one is under
way, and what is pruned is looked at.
"""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .parts import (
    DIE_WITH_PARENT,
    KIB,
    MIB,
    NBDSERVE,
    Daemon,
    S3Server,
    require,
    require_root,
    run,
    run_qemu_io,
)

RUNS = int(os.environ.get("NBDSERVE_CRON_MINUTES", "1"))
VOLUMES = ("web-1", "web-2")
SIZE = 16 * MIB
KEPT = 2
# What cron reads and writes is the test's, below a directory that only it sees.
CRON = """
set -e
for directory in /etc/cron.d /var/spool/cron /run; do mount -t tmpfs none $directory; done
mkdir -m 1730 /var/spool/cron/crontabs
: >/run/crontab
mount --bind /run/crontab /etc/crontab
cp "$1" /etc/cron.d/nbdserve
chmod 644 /etc/cron.d/nbdserve
exec cron -f
"""


@contextmanager
def cron(crontab: Path) -> Iterator[None]:
    """Run cron, which runs what the file says, and nothing else."""
    process = subprocess.Popen(
        [*DIE_WITH_PARENT, "unshare", "--mount", "--propagation", "private",
         "sh", "-c", CRON, "sh", crontab],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
        assert process.poll() is None, "cron has ended by itself"
    finally:
        process.terminate()
        process.wait(timeout=60)


class Content:
    """What a volume has, and what it had when each backup was made."""

    def __init__(self, daemon: Daemon, volume: str, directory: Path, seed: int) -> None:
        self._daemon = daemon
        self._volume = volume
        self._piece = directory / f"{volume}.piece"
        self._random = random.Random(seed)
        self._now = bytearray(SIZE)
        self.at: dict[str, bytes] = {}

    def change(self) -> None:
        """Write at some places."""
        for _ in range(8):
            data = self._random.randbytes(self._random.randrange(1, 64) * KIB)
            offset = self._random.randrange((SIZE - len(data)) // KIB) * KIB
            self._piece.write_bytes(data)
            run_qemu_io(self._daemon, self._volume, f"write -s {self._piece} {offset} {len(data)}")
            self._now[offset : offset + len(data)] = data

    def note(self, snapshot: str) -> None:
        """A backup was made of what there is now."""
        self.at[snapshot] = bytes(self._now)


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(180 + 120 * RUNS)
def test_a_policy_run_by_cron(daemon: Daemon, s3_server: S3Server, tmp_path: Path) -> None:
    require("cron", "unshare", "qemu-io", "nbdcopy")
    require_root()
    bucket = s3_server.new_bucket()
    url = f"s3://{bucket}/host"
    daemon.command("repo", "init", url, env=s3_server.env)
    contents = {
        volume: Content(daemon, volume, tmp_path, seed) for seed, volume in enumerate(VOLUMES)
    }
    for volume, content in contents.items():
        daemon.create(volume, SIZE)
        content.change()
    daemon.create("web-scratch", SIZE)
    # A run takes some seconds, so that another can be started meanwhile.
    frozen = "1" if RUNS == 1 else "4"
    config = tmp_path / "nbdserve.toml"
    config.write_text(
        f'data = "{daemon.data}"\n'
        f'[[policy]]\nname = "minutely"\nvolumes = ["web-*"]\nexclude = ["web-scratch"]\n'
        f'repository = "{url}"\nkeep_last = {KEPT}\nschedule = "every 1m"\n'
        f'freeze_command = ["sleep", "{frozen}"]\nthaw_command = ["true"]\n'
    )
    env = {**os.environ, **s3_server.env, "NBDSERVE_CONFIG": str(config)}
    reports = tmp_path / "reports"
    printed = run(NBDSERVE, "policy", "crontab", "--user", "root", env=env).stdout
    lines = [
        *(f"{name}={value}" for name, value in s3_server.env.items()), 'MAILTO=""',
        f"PYTHONPATH={os.environ.get('PYTHONPATH', '.')}",
        *(f"{line} --json >>{reports} 2>&1" if line[:1] in "*0123456789" else line
          for line in printed.splitlines()),
    ]  # fmt: skip
    crontab = tmp_path / "crontab"
    crontab.write_text("\n".join([*lines, ""]))

    def made() -> list[Any]:
        return read_reports(reports)

    names: list[str] = []

    def note(report: Any) -> None:
        assert (report["status"], report["policy"]) == ("done", "minutely"), report
        assert [entry["volume"] for entry in report["backups"]] == [*VOLUMES]
        names.append(report["snapshot"])
        for content in contents.values():
            content.note(report["snapshot"])

    with cron(crontab):
        for number in range(RUNS):
            others = [start_others_meanwhile(daemon, env)] if number == 2 else []
            wait_for(lambda number=number: len(made()) > number, 130)  # type: ignore[misc]
            for report in (made()[number], *others):
                note(report)
            for content in contents.values():
                content.change()
    assert len(names) == RUNS + (1 if RUNS > 2 else 0)

    kept = names[-KEPT:]
    listed = daemon.json("repo", "list", url, env=s3_server.env)["snapshots"]
    assert [(entry["volume"], entry["snapshot"]) for entry in listed] == [
        (volume, name) for volume in VOLUMES for name in kept
    ]
    for volume, content in contents.items():
        local = daemon.json("snapshot", "list", volume)["snapshots"]
        assert [entry["name"] for entry in local] == names[-1:]
        for name in kept:
            restored = f"{volume}-{name}"
            daemon.command("repo", "restore", url, f"{volume}@{name}", restored, env=s3_server.env)
            copy = tmp_path / "copy"
            run("nbdcopy", daemon.uri(restored), copy)
            assert copy.read_bytes() == content.at[name], (volume, name)
            copy.unlink()
    history = daemon.json("status")["history"]
    assert [(entry["volume"], entry["snapshot"]) for entry in history] == [
        (volume, names[-1]) for volume in VOLUMES
    ]
    assert all(entry["last_failure"] is None for entry in history)
    run(NBDSERVE, "policy", "check", env=env)
    daemon.command("repo", "gc", url, env=s3_server.env)
    daemon.command("repo", "verify", url, "--deep", env=s3_server.env)
    s3_server.empty_bucket(bucket)


def start_others_meanwhile(daemon: Daemon, env: dict[str, str]) -> Any:
    """While cron's run is under way: one that does not wait says so, one that does is made."""
    command = ("backup", "--policy", "minutely", "--json")
    wait_for(lambda: bool(daemon.json("status")["backups"]), 70)
    skipped = run(NBDSERVE, *command, env=env, check=False)
    assert skipped.returncode == os.EX_TEMPFAIL
    assert json.loads(skipped.stdout)["status"] == "skipped"
    assert "nothing is backed up: policy minutely is being run by process" in skipped.stderr
    waited = run(NBDSERVE, *command, "--wait", "50s", env=env)
    assert "waiting, for policy minutely is being run by process" in waited.stderr
    return json.loads(waited.stdout)


def read_reports(file: Path) -> list[Any]:
    """The JSON documents that runs have written, one behind the other, and nothing else."""
    text = file.read_text() if file.exists() else ""
    found = []
    decoder = json.JSONDecoder()
    while text.strip():
        try:
            report, end = decoder.raw_decode(text.lstrip())
        except ValueError:
            assert text.lstrip().startswith("{"), text  # else it is an error
            break  # it is being written
        found.append(report)
        text = text.lstrip()[end:]
    return found
