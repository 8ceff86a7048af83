"""The tests of faults find what they are there for: mistakes, put in one at a time, are seen."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends import local_data, local_layers
from backends.local_data import LocalDataFile
from backends.local_layers import LocalLogFile
from snapshots.manifest_store import ManifestStore
from snapshots.volume import Volume
from tests.durability.faults_script import Stage
from tests.durability.test_faults import Job, every_fault, new_directory

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def jobs_and_stage() -> Iterator[tuple[list[Job], Stage]]:
    with new_directory() as directory:
        stage = Stage(Path(directory))
        yield every_fault(stage), stage


def a_failed_sync_is_tried_again(patch: Patch) -> None:
    patch.setattr(Volume, "fail", lambda self, why: None)


def a_failed_sync_is_forgotten(patch: Patch) -> None:
    sync = LocalDataFile.sync

    def forget(self: LocalDataFile) -> None:
        with contextlib.suppress(OSError):
            sync(self)

    patch.setattr(LocalDataFile, "sync", forget)


def lost_pages_stay_in_the_cache(patch: Patch) -> None:
    patch.setattr(local_data, "drop_cache", lambda descriptor: None)
    patch.setattr(local_layers, "drop_cache", lambda descriptor: None)


def a_commit_in_doubt_is_taken_for_failed(patch: Patch) -> None:
    async def never(*_: Any) -> bool:
        return False

    patch.setattr(ManifestStore, "_may_be", never)


def what_a_failed_write_left_is_owned(patch: Patch) -> None:
    """The write's blocks are taken before they are written."""
    put = Volume._put

    def take_first(self: Volume, head: Any, offset: int, data: Any, first: int, last: int) -> None:
        self.owners.set(first, last, head.slot)
        put(self, head, offset, data, first, last)

    patch.setattr(Volume, "_put", take_first)


def a_full_disk_makes_the_volume_read_only(patch: Patch) -> None:
    reserve = LocalLogFile.reserve

    def reserve_or_fail(self: LocalLogFile, length: int) -> None:
        try:
            reserve(self, length)
        except OSError as error:
            raise OSError(errno.EIO, "no space") from error

    patch.setattr(LocalLogFile, "reserve", reserve_or_fail)


def a_read_that_fails_gives_zeroes(patch: Patch) -> None:
    read = LocalDataFile.read

    def or_zeroes(self: LocalDataFile, offset: int, buffer: memoryview) -> None:
        try:
            read(self, offset, buffer)
        except OSError:
            buffer[:] = bytes(len(buffer))

    patch.setattr(LocalDataFile, "read", or_zeroes)


def descriptors_are_left_open(patch: Patch) -> None:
    patch.setattr(LocalLogFile, "close", lambda self: None)


@pytest.mark.parametrize(
    "mistake, act, calls",
    [
        (a_failed_sync_is_tried_again, 0, "fdatasync"),
        (a_failed_sync_is_forgotten, 0, "fdatasync"),
        (lost_pages_stay_in_the_cache, 0, "fdatasync"),
        (lost_pages_stay_in_the_cache, 5, "fdatasync"),
        (a_commit_in_doubt_is_taken_for_failed, 2, "fsync volumes"),
        (what_a_failed_write_left_is_owned, 1, "pwrite layers"),
        (a_full_disk_makes_the_volume_read_only, 0, "posix_fallocate"),
        (a_read_that_fails_gives_zeroes, 1, "preadv"),
        (descriptors_are_left_open, 1, "fdatasync"),
    ],
)
def test_a_mistake_is_found(
    mistake: Callable[[Patch], None],
    act: int,
    calls: str,
    jobs_and_stage: tuple[list[Job], Stage],
    monkeypatch: Patch,
) -> None:
    jobs, stage = jobs_and_stage
    mistake(monkeypatch)
    tried = [fault for found, fault in jobs if found == act and fault.name.startswith(calls)]
    for fault in tried:
        try:
            stage.play(act, fault)
        except (AssertionError, TimeoutError):
            return
    pytest.fail(f"none of {len(tried)} faults found it")


def test_the_same_faults_find_nothing_where_there_is_no_mistake(
    jobs_and_stage: tuple[list[Job], Stage],
) -> None:
    jobs, stage = jobs_and_stage
    for act, fault in [job for job in jobs if job[0] == 0 and "fdatasync" in job[1].name][:6]:
        assert stage.play(act, fault).fired
