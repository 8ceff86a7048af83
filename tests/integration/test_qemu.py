"""qemu's tools as clients: disk images go in and out, and patterns at awkward offsets."""

import json
from pathlib import Path

import pytest

from .parts import (
    KIB,
    MIB,
    Daemon,
    over_all_transports,
    qemu_img,
    qemu_io,
    require,
    run,
    run_qemu_io,
)

pytestmark = over_all_transports


@pytest.fixture(autouse=True)
def _qemu_tools() -> None:
    require("qemu-img", "qemu-io")


def find_zero_ranges(output: str) -> list[tuple[int, int]]:
    """Return (start, end) of what a JSON map of qemu-img says is zero, neighbours merged."""
    ranges: list[tuple[int, int]] = []
    for entry in json.loads(output):
        if entry["zero"]:
            start, end = entry["start"], entry["start"] + entry["length"]
            if ranges and ranges[-1][1] == start:
                start, _ = ranges.pop()
            ranges.append((start, end))
    return ranges


def test_convert_compare_and_map_a_disk_image(
    daemon: Daemon, disk_image: Path, tmp_path: Path
) -> None:
    daemon.create("disk", 256 * MIB)
    image = daemon.image("disk")
    qemu_img(daemon, "convert", "-n", "-f", "qcow2", "-O", "raw", disk_image, image)
    qemu_img(daemon, "compare", "-f", "qcow2", "-F", "raw", disk_image, image)

    holes = find_zero_ranges(run("qemu-img", "map", "--output=json", disk_image).stdout)
    exported = find_zero_ranges(qemu_img(daemon, "map", "--output=json", "-f", "raw", image).stdout)
    assert sum(end - start for start, end in holes) > 128 * MIB
    for start, end in holes:
        assert any(low <= start and end <= high for low, high in exported), (start, end, exported)

    copy = tmp_path / "copy.raw"
    qemu_img(daemon, "convert", "-f", "raw", "-O", "raw", image, copy)
    with copy.open("rb") as content:
        for start, end in exported:
            content.seek(start)
            for position in range(start, end, MIB):
                part = content.read(min(MIB, end - position))
                assert not any(part), f"the map says zero, but there is data after {position}"
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", disk_image, copy)
    run("/sbin/e2fsck", "-f", "-n", copy)


def test_convert_over_tcp_into_a_volume_that_holds_other_data(
    daemon: Daemon, disk_image: Path
) -> None:
    daemon.create("disk", 256 * MIB)
    qemu_io(daemon, "disk", "write -P 0x77 0 256M")
    image = daemon.tcp_image("disk")
    qemu_img(daemon, "convert", "-n", "-f", "qcow2", "-O", "raw", disk_image, image)
    qemu_img(daemon, "compare", "-f", "qcow2", "-F", "raw", disk_image, image)


def test_patterns(daemon: Daemon) -> None:
    daemon.create("disk", 64 * MIB)
    qemu_io(
        daemon,
        "disk",
        "read -P 0 0 64M",
        "write -P 0x11 0 1M",
        "write -P 0x22 64k 128k",
        "read -P 0x11 0 64k",
        "read -P 0x22 64k 128k",
        "read -P 0x11 192k 832k",
        # Unaligned on both sides, within a block and across blocks.
        "write -P 0x33 513 1",
        "write -P 0x44 4095 2",
        "write -P 0x55 70001 99999",
        "read -P 0x11 0 513",
        "read -P 0x33 513 1",
        "read -P 0x11 514 3581",
        "read -P 0x44 4095 2",
        "read -P 0x11 4097 61439",
        "read -P 0x22 65536 4465",
        "read -P 0x55 70001 99999",
        "read -P 0x22 170000 26608",
        # FUA, and the very end of the volume.
        "write -f -P 0x66 67108863 1",
        "read -P 0x66 67108863 1",
        "flush",
    )


@pytest.mark.parametrize("zero", ["write -z", "write -z -u", "discard"])
def test_zeroes_and_discards(daemon: Daemon, zero: str) -> None:
    daemon.create("disk", 64 * MIB)
    qemu_io(
        daemon,
        "disk",
        "write -P 0xaa 0 8M",
        f"{zero} 1M 1M",
        "read -P 0xaa 0 1M",
        "read -P 0 1M 1M",
        "read -P 0xaa 2M 6M",
        # Less than a block, and a range whose ends lie within blocks.
        f"{zero} 3146241 1000",
        f"{zero} 4198401 20000",
        "flush",
        "read -P 0xaa 3145728 513",
        "read -P 0xaa 3147241 1051160",
        "read -P 0xaa 4218401 4170207",
    )
    if zero != "discard":
        # A discard may leave what is not a whole block; zeroes may not.
        qemu_io(daemon, "disk", "read -P 0 3146241 1000", "read -P 0 4198401 20000")
    # Data over what was zeroed, and zeroes over snapshotted data.
    daemon.take_snapshot("disk@before")
    qemu_io(
        daemon,
        "disk",
        "write -P 0xbb 1500k 4k",
        f"{zero} 5M 1M",
        "read -P 0 1M 476k",
        "read -P 0xbb 1500k 4k",
        "read -P 0 1504k 544k",
        "read -P 0 5M 1M",
    )
    before = run_qemu_io(
        daemon, "disk@before", "read -P 0xaa 5M 1M", "read -P 0 1M 1M", options=["-r"]
    )
    assert "failed" not in before.stdout


def test_snapshot_export_is_read_only(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    daemon.take_snapshot("disk@first")
    refused = run_qemu_io(daemon, "disk@first", "write 0 4k", check=False)
    assert refused.returncode != 0
    assert "Permission denied" in refused.stderr
    run_qemu_io(daemon, "disk@first", "read -P 0 0 1M", options=["-r"])


def test_requests_beyond_the_end(daemon: Daemon) -> None:
    daemon.create("disk", MIB + 4096)
    qemu_io(daemon, "disk", f"write -P 1 {MIB + 3584} 512", f"read -P 1 {MIB + 3584} 512")
    info = json.loads(
        qemu_img(daemon, "info", "--output=json", "-f", "raw", daemon.image("disk")).stdout
    )
    assert info["virtual-size"] == MIB + 4096
    beyond = run_qemu_io(daemon, "disk", f"write {MIB + 3584} 1k", check=False)
    assert beyond.returncode != 0


def test_unknown_export(daemon: Daemon) -> None:
    daemon.create("disk", 64 * KIB)
    refused = qemu_img(daemon, "info", "-f", "raw", daemon.image("nothing"), check=False)
    assert refused.returncode == 1
    assert "volume nothing does not exist" in refused.stderr
    qemu_img(daemon, "info", "-f", "raw", daemon.image("disk"))
