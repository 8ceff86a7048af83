"""Metadata contexts as backup programs read them: qemu-img, nbdinfo, and one made of libnbd."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .parts import KIB, MIB, NBDSERVE, Daemon, qemu_io, require, run, run_nbdsh, unpacked

TIB = 1 << 40
Range = tuple[int, int]

# Reads what changed since a snapshot, and writes it into a copy of that snapshot.
BACKUP = """
import json, sys
context = "qemu:dirty-bitmap:%(base)s"
h.add_meta_context(context)
h.connect_uri("%(uri)s")
changed, offset = [], 0
while offset < h.get_size():
    def extent(name, start, entries, error):
        global offset
        assert name == context
        for length, status in zip(entries[::2], entries[1::2]):
            if status & 1:
                changed.append((start, length))
            start += length
        offset = start
    h.block_status(min(h.get_size() - offset, 1 << 30), offset, extent)
with open("%(copy)s", "r+b") as copy:
    copy.truncate(h.get_size())
    for start, length in changed:
        copy.seek(start)
        copy.write(h.pread(length, start))
print(sum(length for _, length in changed))
"""


@pytest.fixture(autouse=True)
def _clients() -> None:
    require("qemu-img", "qemu-io", "nbdinfo", "nbdsh", "nbdcopy")


@pytest.fixture(params=["installed", "10"])
def qemu_map(request: pytest.FixtureRequest, daemon: Daemon) -> Callable[[str, str], str]:
    """Return what runs `qemu-img map` on an export with a metadata context; two releases of it."""
    program = "qemu-img" if request.param == "installed" else unpacked("qemu", "qemu-img")

    def read_map(export: str, context: str) -> str:
        options = f"driver=nbd,server.type=unix,server.path={daemon.socket},export={export}"
        image = f"{options},x-dirty-bitmap={context}"
        return run(program, "map", "--output=json", "--image-opts", image).stdout

    return read_map


def dirty_ranges(output: str) -> list[Range]:
    """What a map says is dirty: qemu shows bit 0 of the context as "data": false."""
    return [(entry["start"], entry["length"]) for entry in json.loads(output) if not entry["data"]]


def test_qemu_img_reads_what_changed_since_any_snapshot(
    daemon: Daemon, qemu_map: Callable[[str, str], str]
) -> None:
    daemon.create("disk", 8 * TIB)
    qemu_io(daemon, "disk", "write -P 1 0 1M", "write -P 1 4T 64k")
    daemon.take_snapshot("disk@one")
    qemu_io(daemon, "disk", "write -P 2 512k 64k", "discard 4T 32k", "write -P 2 6T 4k")
    daemon.take_snapshot("disk@two")
    qemu_io(daemon, "disk", "write -P 3 7T 512")

    def dirty(export: str, snapshot: str) -> list[Range]:
        return dirty_ranges(qemu_map(export, f"qemu:dirty-bitmap:{snapshot}"))

    between = [(512 * KIB, 64 * KIB), (4 * TIB, 32 * KIB), (6 * TIB, 4 * KIB)]
    since = [(7 * TIB, 4 * KIB)]
    assert dirty("disk", "one") == between + since
    assert dirty("disk", "two") == since
    assert dirty("disk@two", "one") == between
    assert dirty("disk@one", "two") == between
    assert dirty("disk@two", "two") == []
    qemu_io(daemon, "disk", "write -P 4 5T 4k")
    assert dirty("disk", "two") == [(5 * TIB, 4 * KIB), *since]
    # A branch that the volume has left.
    daemon.command("snapshot", "rollback", "disk@one")
    assert dirty("disk", "one") == []
    assert dirty("disk", "two") == between


def test_allocation_depths(daemon: Daemon, qemu_map: Callable[[str, str], str]) -> None:
    daemon.create("disk", 16 * MIB)
    qemu_io(daemon, "disk", "write 0 4M", "write 8M 1M")
    daemon.take_snapshot("disk@one")
    qemu_io(daemon, "disk", "write 1M 1M", "discard 8M 512k")
    daemon.take_snapshot("disk@two")
    qemu_io(daemon, "disk", "write 2M 1M")

    def depths(export: str) -> list[tuple[int, int]]:
        output = run("nbdinfo", "--map=qemu:allocation-depth", "--json", daemon.uri(export)).stdout
        return [(entry["length"] // (512 * KIB), entry["type"]) for entry in json.loads(output)]

    assert depths("disk") == [(2, 3), (2, 2), (2, 1), (2, 3), (9, 0), (1, 3), (14, 0)]
    assert depths("disk@two") == [(2, 2), (2, 1), (4, 2), (9, 0), (1, 2), (14, 0)]
    assert depths("disk@one") == [(8, 1), (8, 0), (2, 1), (14, 0)]
    # qemu shows bit 0 of the depth as "data": false.
    assert (2 * MIB, MIB) in dirty_ranges(qemu_map("disk", "qemu:allocation-depth"))


def test_contexts_are_listed(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    for name in ("b", "a"):
        daemon.take_snapshot(f"disk@{name}")
    for export in ("disk", "disk@a"):
        found = json.loads(run("nbdinfo", "--json", daemon.uri(export)).stdout)["exports"][0]
        assert found["contexts"] == [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:b",
            "qemu:dirty-bitmap:a",
        ]


def test_incremental_backups_of_a_volume_in_use_are_whole(daemon: Daemon, tmp_path: Path) -> None:
    daemon.create("disk", 64 * MIB)
    qemu_io(daemon, "disk", "write -P 1 0 64M")
    daemon.take_snapshot("disk@b0")
    copy = tmp_path / "copy.raw"
    run("nbdcopy", daemon.uri("disk@b0"), copy)
    sizes = []
    for number in range(1, 4):
        qemu_io(
            daemon, "disk",
            f"write -P {number + 1} {number * 3}M 300k",
            f"write -P {number + 1} {number * 5 * MIB + 1000} 5000",
            f"discard {40 + number}M 100k",
            f"write -z {50 + number}M 10000",
        )  # fmt: skip
        daemon.take_snapshot(f"disk@b{number}")
        qemu_io(daemon, "disk", f"write -P 99 {60 + number}M 64k")  # the guest goes on
        script = BACKUP % {
            "base": f"b{number - 1}",
            "uri": daemon.uri(f"disk@b{number}"),
            "copy": copy,
        }
        sizes.append(int(run_nbdsh(script)))
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, daemon.uri(f"disk@b{number}"))
        daemon.command("snapshot", "delete", f"disk@b{number - 1}")
    assert max(sizes) < MIB


def test_a_snapshot_can_be_deleted_while_a_client_compares_with_it(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    daemon.take_snapshot("disk@base")
    script = f"""
import subprocess
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:base")
h.connect_uri("{daemon.uri("disk")}")
h.pwrite(b"x" * 4096, 8192)
said = []
def extent(name, start, entries, error):
    said.append((name, entries))
h.block_status(2**20, 0, extent)
assert sorted(said) == [
    ("base:allocation", [8192, 3, 4096, 0, 2**20 - 12288, 3]),
    ("qemu:dirty-bitmap:base", [8192, 0, 4096, 1, 2**20 - 12288, 0]),
], said
subprocess.run(["{NBDSERVE}", "--data", "{daemon.data}", "snapshot", "delete", "disk@base"],
               check=True, capture_output=True)
try:
    h.block_status(2**20, 0, lambda *said: 0)
except nbd.Error as error:
    print(error.errno)
assert h.pread(4096, 8192) == b"x" * 4096
h.flush()
"""
    assert run_nbdsh(script).strip() == "EIO"
