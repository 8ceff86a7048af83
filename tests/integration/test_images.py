"""Disk images that qemu made are imported, and what is exported is sound in qemu's eyes."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.errors import InvalidError
from snapshots.images.qcow2_reader import Qcow2Image
from snapshots.images.qcow2_writer import CLUSTER, Qcow2Writer

from .parts import MIB, NBDSERVE, Daemon, S3Server, require, run

# name, options of qemu-img create or convert
VARIANTS = [
    ("compressed", ["-c"]),
    ("version-2", ["-o", "compat=0.10"]),
    ("version-2-compressed", ["-c", "-o", "compat=0.10,cluster_size=4k"]),
    ("clusters-of-2M", ["-c", "-o", "cluster_size=2M"]),
    ("preallocated", ["-o", "preallocation=metadata"]),
]


@pytest.fixture
def nbdserve(tmp_path: Path) -> Callable[..., str]:
    """Return what runs nbdserve, without a data directory."""
    environment = {name: value for name, value in os.environ.items() if name != "NBDSERVE_DATA"}

    def command(*arguments: str | Path) -> str:
        return run(NBDSERVE, *arguments, env=environment).stdout

    return command


@pytest.fixture
def url(tmp_path: Path, nbdserve: Callable[..., str]) -> str:
    """Make a repository; return its URL."""
    where = f"file://{tmp_path}/repository"
    nbdserve("repo", "init", where)
    return where


def compare(one: Path | str, one_format: str, other: Path | str, other_format: str) -> None:
    run("qemu-img", "compare", "-f", one_format, "-F", other_format, one, other)


def check_exports(nbdserve: Callable[..., str], url: str, snapshot: str, image: Path) -> None:
    """Export in both formats and compare with the image, which is raw."""
    raw, qcow2 = image.parent / "exported.raw", image.parent / "exported.qcow2"
    nbdserve("repo", "export", url, snapshot, raw)
    nbdserve("repo", "export", url, snapshot, qcow2)
    compare(raw, "raw", image, "raw")
    run("qemu-img", "check", "-f", "qcow2", qcow2)
    compare(qcow2, "qcow2", image, "raw")
    run("/sbin/fsck.ext4", "-fn", raw)
    assert raw.stat().st_blocks <= 1.1 * image.stat().st_blocks
    raw.unlink()
    qcow2.unlink()


def read_with_our_reader(image: Path, raw: Path) -> None:
    """Make a raw image of a qcow2 image, in this process."""
    descriptor = os.open(image, os.O_RDONLY)
    try:
        reader = Qcow2Image(descriptor, image.name)
        with raw.open("wb") as file:
            file.truncate(reader.size)
            for offset, length in reader.extents():
                piece = bytearray(length)
                reader.read_into(offset, memoryview(piece))
                file.seek(offset)
                file.write(piece)
    finally:
        os.close(descriptor)


def test_a_file_system_goes_round(
    nbdserve: Callable[..., str], url: str, disk_image: Path, tmp_path: Path
) -> None:
    """From raw and from every kind of qcow2, which stores nothing new."""
    require("qemu-img", "fsck.ext4")
    image = tmp_path / "image"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk_image, image)
    nbdserve("repo", "import", image, url, "disk@raw")
    check_exports(nbdserve, url, "disk@raw", image)
    for name, options in VARIANTS:
        variant = tmp_path / f"{name}.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, image, variant)
        read_with_our_reader(variant, tmp_path / "read")
        compare(tmp_path / "read", "raw", image, "raw")
        variant.unlink()
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", image, tmp_path / "c.qcow2")
    imported = nbdserve("repo", "import", tmp_path / "c.qcow2", url, "disk@compressed")
    assert "since raw: 0 changed" in imported


def test_an_image_with_a_history(nbdserve: Callable[..., str], url: str, tmp_path: Path) -> None:
    """Random writes, zeroes and discards of qemu-io, with an internal snapshot in between."""
    require("qemu-img", "qemu-io")
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", image, "192M")
    source = random.Random(7)
    for number in range(3):
        commands = []
        for _ in range(60):
            offset, length = (
                source.randrange(190 * MIB) // 512 * 512,
                source.randrange(1, 900) * 512,
            )
            what = source.choice([f"write -P {source.randrange(1, 256)}", "write -z", "write -z -u",
                                  "discard"])  # fmt: skip
            commands += ["-c", f"{what} {offset} {length}"]
        run("qemu-io", "-f", "qcow2", "-d", "unmap", *commands, image)
        if number == 0:
            run("qemu-img", "snapshot", "-c", "old", image)
        read_with_our_reader(image, tmp_path / "read")
        compare(tmp_path / "read", "raw", image, "qcow2")
    nbdserve("repo", "import", image, url, "disk@one")
    nbdserve("repo", "export", url, "disk@one", tmp_path / "out")
    compare(tmp_path / "out", "raw", image, "qcow2")


def test_images_that_do_not_stand_by_themselves_are_refused(url: str, tmp_path: Path) -> None:
    require("qemu-img")
    base = tmp_path / "base.raw"
    base.write_bytes(b"secret" * 10000)
    for name, options in {
        "data": ["-o", f"data_file={tmp_path}/data.raw"],
        "subclusters": ["-o", "extended_l2=on"],
        "zstd": ["-o", "compression_type=zstd"],
        "backing": ["-b", base, "-F", "raw"],
    }.items():
        image = tmp_path / f"{name}.qcow2"
        run("qemu-img", "create", "-f", "qcow2", *options, image, "4M")
        with pytest.raises(InvalidError, match="qemu-img convert"):
            read_with_our_reader(image, tmp_path / "read")
    refused = run(NBDSERVE, "repo", "import", image, url, "disk@one", check=False)
    assert refused.returncode == 1
    assert "backing file" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_refcounts_of_a_large_image(tmp_path: Path) -> None:
    """More than one refcount block and several L2 tables; sparse, so it takes little space."""
    require("qemu-img")
    image = tmp_path / "large.qcow2"
    descriptor = os.open(image, os.O_RDWR | os.O_CREAT)
    writer = Qcow2Writer(descriptor, 16 << 40)
    clusters = 40_000
    for number in range(clusters):
        # Dense at first, then over the whole volume.
        guest = number if number < 33_000 else number * 6_000
        writer.write(guest * CLUSTER, b"x")
    writer.finish()
    os.close(descriptor)
    checked = run("qemu-img", "check", "-f", "qcow2", image).stdout
    assert f"{clusters}/" in checked


def test_from_backup_to_image_and_back_to_a_volume(daemon: Daemon, disk_image: Path) -> None:
    require("qemu-img")
    directory = daemon.data.parent
    url = f"file://{directory}/repository"
    daemon.command("repo", "init", url)
    daemon.create("disk", 256 * MIB)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", disk_image, daemon.uri("disk"))
    name = daemon.json("backup", "disk", "--repo", url)["backups"][0]["snapshot"]
    exported = directory / "disk.qcow2"
    daemon.command("repo", "export", url, f"disk@{name}", exported)
    compare(exported, "qcow2", disk_image, "qcow2")
    report = daemon.json("repo", "import", exported, url, "copy@one")
    assert report["parent"] is None
    daemon.command("repo", "restore", url, "copy@one", "restored")
    compare(daemon.uri("restored"), "raw", daemon.uri(f"disk@{name}"), "raw")


def test_over_s3(s3_server: S3Server, disk_image: Path, tmp_path: Path) -> None:
    require("qemu-img")
    bucket = s3_server.new_bucket()
    url = f"s3://{bucket}/images"
    environment = {**os.environ, **s3_server.env}
    run(NBDSERVE, "repo", "init", url, env=environment)
    run(NBDSERVE, "repo", "import", disk_image, url, "disk@one", env=environment)
    with (tmp_path / "raw").open("wb") as file:
        subprocess.run(
            [NBDSERVE, "repo", "export", url, "disk@one", "-"],
            stdout=file, stderr=subprocess.PIPE, env=environment, check=True, timeout=120,
        )  # fmt: skip
    compare(tmp_path / "raw", "raw", disk_image, "qcow2")
    run(NBDSERVE, "repo", "prune", url, "disk", "--keep-daily", "1", env=environment)
    run(NBDSERVE, "repo", "protect", url, "disk@one", env=environment)
    refused = run(
        NBDSERVE, "repo", "delete", url, "disk@one", env=environment, check=False
    )  # fmt: skip
    assert "protected" in refused.stderr
    s3_server.empty_bucket(bucket)


def test_an_export_that_is_killed_leaves_no_image(
    nbdserve: Callable[..., str], url: str, tmp_path: Path
) -> None:
    image, out = tmp_path / "image", tmp_path / "out" / "disk.raw"
    image.write_bytes(random.Random(8).randbytes(64 * MIB))
    nbdserve("repo", "import", image, url, "disk@one")
    out.parent.mkdir()
    out.write_text("old")
    for how, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        command = subprocess.Popen(
            [NBDSERVE, "repo", "export", url, "disk@one", out, "--force"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while len(list(out.parent.iterdir())) == 1:
                assert command.poll() is None
                time.sleep(0.001)
            command.send_signal(how)
        finally:
            ended = command.wait(timeout=60)
        assert ended == status
        assert out.read_text() == "old"
        left = [path.name for path in out.parent.iterdir() if path != out]
        assert len(left) == (how is signal.SIGKILL)
        assert all(name.endswith(".part") for name in left)
