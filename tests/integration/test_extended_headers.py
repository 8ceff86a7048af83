"""qemu 10 as a client: it asks for extended headers, whose requests may mean a whole volume.

Its discards are as short as ever: qemu-io bounds them itself, and nothing else sends long ones.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_FLAG_FAST_ZERO,
    CMD_READ,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
)

from .parts import KIB, MIB, TIB, Daemon, over_all_transports, require, run, unpacked
from .recording import Recorder, Sent

SIZE = 8 * TIB


@pytest.fixture
def qemu_io() -> Path:
    return unpacked("qemu", "qemu-io")


@pytest.fixture
def qemu_img() -> Path:
    return unpacked("qemu", "qemu-img")


@pytest.fixture
def recorder(daemon: Daemon) -> Iterator[Recorder]:
    """Yield what keeps the requests that are sent to its socket instead of the daemon's."""
    recorder = Recorder(daemon.data.with_name("recorder"), daemon.socket)
    yield recorder
    recorder.close()


def uri(recorder: Recorder) -> str:
    return f"nbd+unix:///disk?socket={recorder.path}"


def select(requests: list[Sent], *commands: int) -> list[tuple[int, int, int]]:
    """Return (command, offset, length) of the requests of these commands."""
    return [
        (sent.command, sent.offset, sent.length) for sent in requests if sent.command in commands
    ]


def test_zeroes_over_a_whole_volume_are_one_request(
    daemon: Daemon, recorder: Recorder, qemu_io: Path
) -> None:
    daemon.create("disk", SIZE)
    places = ["0", "3T", str(SIZE - 128 * KIB)]
    commands = [
        *(f"write -P 5 {place} 64k" for place in places),
        f"write -z -u -n 0 {SIZE}",
        *(f"read -P 0 {place} 64k" for place in places),
    ]
    words = [word for command in commands for word in ("-c", command)]
    output = run(qemu_io, "-f", "raw", *words, uri(recorder)).stdout
    assert "failed" not in output, output
    recorder.close()
    (requests,) = recorder.requests()
    assert all(sent.extended for sent in requests)
    assert select(requests, CMD_WRITE_ZEROES) == [(CMD_WRITE_ZEROES, 0, SIZE)]
    assert all(
        sent.flags & CMD_FLAG_FAST_ZERO for sent in requests if sent.command == CMD_WRITE_ZEROES
    )
    assert len(select(requests, CMD_READ, CMD_WRITE)) == 2 * len(places)
    assert daemon.json("volume", "show", "disk")["mapped"] == 0


def test_map_of_a_whole_volume_is_a_request_for_each_run(
    daemon: Daemon, recorder: Recorder, qemu_io: Path, qemu_img: Path
) -> None:
    daemon.create("disk", SIZE)
    start, end = SIZE - 64 * KIB, SIZE
    empty = json.loads(run(qemu_img, "map", "--output=json", "-f", "raw", uri(recorder)).stdout)
    run(qemu_io, "-f", "raw", "-c", f"write -P 5 {start} 64k", uri(recorder))
    written = json.loads(run(qemu_img, "map", "--output=json", "-f", "raw", uri(recorder)).stdout)
    recorder.close()
    assert [(run["start"], run["length"], run["zero"]) for run in empty] == [(0, SIZE, True)]
    assert [(run["start"], run["length"], run["zero"]) for run in written] == [
        (0, start, True),
        (start, end - start, False),
    ]
    of_empty, _, of_written = recorder.requests()
    assert all(sent.extended for sent in of_empty)
    assert select(of_empty, CMD_BLOCK_STATUS) == [(CMD_BLOCK_STATUS, 0, SIZE)]
    # qemu asks for one run at a time.
    assert select(of_written, CMD_BLOCK_STATUS) == [
        (CMD_BLOCK_STATUS, 0, SIZE),
        (CMD_BLOCK_STATUS, start, end - start),
    ]


def test_an_older_client_is_served_without(daemon: Daemon, recorder: Recorder) -> None:
    require("nbdinfo", "nbdcopy")
    daemon.create("disk", 16 * MIB)
    run("nbdinfo", "--map", uri(recorder))
    recorder.close()
    sent = [sent for requests in recorder.requests() for sent in requests]
    assert select(sent, CMD_BLOCK_STATUS)
    assert not any(request.extended for request in sent)


@over_all_transports
def test_data_both_ways(
    daemon: Daemon, qemu_io: Path, qemu_img: Path, disk_image: Path, tmp_path: Path
) -> None:
    daemon.create("disk", 256 * MIB)
    image, objects = daemon.image("disk"), daemon.qemu_objects
    run(qemu_img, "convert", *objects, "-n", "-f", "qcow2", "-O", "raw", disk_image, image)
    run(qemu_img, "compare", *objects, "-f", "qcow2", "-F", "raw", disk_image, image)
    copy = tmp_path / "copy.raw"
    run(qemu_img, "convert", *objects, "-f", "raw", "-O", "raw", image, copy)
    run("/sbin/e2fsck", "-f", "-n", copy)
    commands = [
        "write -P 0x33 513 1",
        "write -P 0x44 4095 2",
        "write -f -P 0x55 70001 5000000",
        "write -z 1048577 1048577",
        "discard 4M 64k",
        "write -z -u 5M 64k",
        "flush",
        "read -P 0x33 513 1",
        "read -P 0x44 4095 2",
        "read -P 0x55 70001 978576",
        "read -P 0 1048577 1048577",
        "read -P 0x55 2097154 2097150",
        "read -P 0x55 4259840 810161",
    ]
    words = [word for command in commands for word in ("-c", command)]
    output = run(qemu_io, *objects, "-f", "raw", *words, image).stdout
    assert "failed" not in output, output
