"""Whether the disk under a path is one that seeks."""

import os

import pytest

from backends.block_device import is_rotational


def add_disk(root, content):
    """A disk in the shape that /sys has, with one partition; returns the two."""
    disk = root / "devices" / "sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "queue").mkdir()
    (disk / "queue" / "rotational").write_text(content)
    return disk, disk / "sda1"


@pytest.mark.parametrize(("content", "expected"), [("1\n", True), ("0\n", False), ("", False)])
@pytest.mark.parametrize("partition", [False, True])
def test_what_the_kernel_says(tmp_path, content, expected, partition):
    number = tmp_path.stat().st_dev
    links = tmp_path / "links"
    links.mkdir()
    link = links / f"{os.major(number)}:{os.minor(number)}"
    link.symlink_to(add_disk(tmp_path, content)[partition])
    assert is_rotational(tmp_path, links) is expected


def test_no_disk_of_its_own(tmp_path):
    assert is_rotational(tmp_path, tmp_path / "nothing") is False
    assert is_rotational(tmp_path / "nothing") is False
