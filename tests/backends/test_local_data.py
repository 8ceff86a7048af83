"""Layer data in rows of local files: borders, errors, syncs."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends import file_calls, local_data, page_cache
from backends.local_data import ROW_SIZE, LocalDataFile, holds_data

BLOCK = 4096


@pytest.fixture
def data(tmp_path: Path) -> LocalDataFile:
    return LocalDataFile(tmp_path, writable=True)


def get(data: LocalDataFile, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    data.read(offset, memoryview(buffer))
    return bytes(buffer)


def test_a_write_across_the_border_of_a_row(data: LocalDataFile, tmp_path: Path) -> None:
    content = os.urandom(8 * BLOCK)
    for border in (ROW_SIZE, 15 * ROW_SIZE):
        start = border - 3 * BLOCK - 100
        data.write(start, content)
        assert get(data, start, len(content)) == content
        buffer = bytearray(len(content))
        assert not data.try_read(start, memoryview(buffer))
        data.write_zeroes(border - BLOCK, 2 * BLOCK)
        data.punch(border - 2 * BLOCK, BLOCK)
        data.cache(border - BLOCK, 2 * BLOCK)
        expected = bytearray(content)
        at = 3 * BLOCK + 100
        expected[at - 2 * BLOCK : at + BLOCK] = bytes(3 * BLOCK)
        assert get(data, start, len(content)) == expected
    # Exactly up to the border, and exactly from it.
    data.write(2 * ROW_SIZE - BLOCK, b"a" * BLOCK)
    data.write(2 * ROW_SIZE, b"b" * BLOCK)
    assert get(data, 2 * ROW_SIZE - BLOCK, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
    data.sync()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"data-{row:05d}" for row in (0, 1, 2, 14, 15)]
    assert data.allocated() < 30 * BLOCK
    data.close()
    again = LocalDataFile(tmp_path, writable=False)
    assert get(again, ROW_SIZE + 3 * BLOCK, BLOCK) == content[6 * BLOCK + 100 : 7 * BLOCK + 100]
    with pytest.raises(OSError):
        again.write(0, b"x")
    again.close()


def test_files_cut_short_or_missing_are_input_output_errors(
    data: LocalDataFile, tmp_path: Path
) -> None:
    data.write(0, b"x" * (4 * BLOCK))
    os.truncate(tmp_path / "data-00000", 2 * BLOCK)
    assert get(data, BLOCK, BLOCK) == b"x" * BLOCK
    buffer = bytearray(2 * BLOCK)
    for offset in (BLOCK, 2 * BLOCK, 3 * BLOCK):
        assert not data.try_read(offset, memoryview(buffer))
        with pytest.raises(OSError, match="data-00000 ends before") as caught:
            data.read(offset, memoryview(buffer))
        assert caught.value.errno == errno.EIO
    assert not data.try_read(3 * ROW_SIZE, memoryview(buffer))
    with pytest.raises(OSError, match="data-00003") as caught:
        data.read(3 * ROW_SIZE, memoryview(buffer))
    assert caught.value.errno == errno.EIO
    # Nothing there to punch or to read ahead.
    data.punch(3 * ROW_SIZE, BLOCK)
    data.cache(3 * ROW_SIZE, BLOCK)
    assert not (tmp_path / "data-00003").exists()


@pytest.mark.parametrize(
    ("raised", "kind"), [(BlockingIOError, 0), (OSError, errno.EOPNOTSUPP), (OSError, errno.EIO)]
)
def test_reads_that_would_wait_are_left_to_threads(
    data: LocalDataFile, monkeypatch: pytest.MonkeyPatch, raised: type[OSError], kind: int
) -> None:
    data.write(0, b"x" * BLOCK)
    real = os.preadv

    def refusing(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise raised(kind, "no")
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", refusing)
    buffer = bytearray(BLOCK)
    if kind == errno.EIO:
        with pytest.raises(OSError):
            data.try_read(0, memoryview(buffer))
    else:
        assert not data.try_read(0, memoryview(buffer))
    assert get(data, 0, BLOCK) == b"x" * BLOCK


def test_short_reads_and_writes_are_carried_on(
    data: LocalDataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:1000], at))
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, at, flags=0: pread(fd, [views[0][:700]], at, flags)
    )
    content = os.urandom(3 * BLOCK + 17)
    data.write(ROW_SIZE - BLOCK, content)
    assert get(data, ROW_SIZE - BLOCK, len(content)) == content
    assert not data.try_read(ROW_SIZE - BLOCK, memoryview(bytearray(BLOCK)))


def test_every_write_is_followed_by_a_sync_of_its_row(
    data: LocalDataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers in threads, a sync now and then: in the end no row is left marked clean wrongly."""
    synced: list[int] = []
    real = os.fdatasync

    def noting(descriptor: int) -> None:
        real(descriptor)
        synced.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", noting)
    data.sync()
    assert synced == []
    data.write(0, b"x")
    data.write(ROW_SIZE, b"x")
    data.sync()
    assert len(set(synced)) == len(synced) == 2
    data.sync()
    assert len(synced) == 2
    data.punch(0, BLOCK)
    data.write_zeroes(ROW_SIZE, BLOCK)
    data.sync()
    assert len(synced) == 4

    # A write that comes while its row is being synced is for the next sync.
    in_sync, go_on = threading.Event(), threading.Event()

    def slow(descriptor: int) -> None:
        in_sync.set()
        go_on.wait(30)
        noting(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    data.write(0, b"y")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(data.sync)
        in_sync.wait(30)
        data.write(0, b"z")
        go_on.set()
        first.result()
    assert len(synced) == 5
    data.sync()
    assert len(synced) == 6


def test_threads_that_write_first_share_one_file(data: LocalDataFile, tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    before = len(list(Path("/proc/self/fd").iterdir()))

    def write(index: int) -> None:
        for row in range(4):
            barrier.wait(30)
            data.write(row * ROW_SIZE + index * BLOCK, bytes([index + 1]) * BLOCK)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(list(Path("/proc/self/fd").iterdir())) - before == 4
    for row in range(4):
        expected = b"".join(bytes([index + 1]) * BLOCK for index in range(8))
        assert get(data, row * ROW_SIZE, 8 * BLOCK) == expected
    data.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_file_systems_without_fallocate(
    data: LocalDataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, mode: int, offset: int, length: int) -> None:
        raise OSError(number, "refused")

    number = errno.EOPNOTSUPP
    data.write(0, b"x" * (2 << 20))
    monkeypatch.setattr(local_data, "fallocate", refuse)
    data.write_zeroes(BLOCK, (1 << 20) + 5 * BLOCK)
    assert get(data, 0, 2 << 20) == b"x" * BLOCK + bytes((1 << 20) + 5 * BLOCK) + b"x" * (
        (1 << 20) - 6 * BLOCK
    )
    data.punch(0, BLOCK)
    number = errno.ENOSPC
    with pytest.raises(OSError):
        data.write_zeroes(0, BLOCK)
    with pytest.raises(OSError):
        data.punch(0, BLOCK)


def test_a_sync_makes_the_directory_entries_of_new_files_durable(
    data: LocalDataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_fdatasync = os.fsync, os.fdatasync

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "no")

    def fsync(descriptor: int) -> None:
        calls.append("directory")
        real_fsync(descriptor)

    def fdatasync(descriptor: int) -> None:
        calls.append("data")
        real_fdatasync(descriptor)

    data.write(0, b"x")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(OSError):
            data.sync()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    data.write(0, b"x")
    data.sync()
    assert calls == ["directory", "data"]
    data.write(0, b"x")
    data.sync()
    assert calls == ["directory", "data", "data"]


def test_prepared_files_hold_no_data_and_the_first_write_makes_none(
    data: LocalDataFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.prepare(ROW_SIZE - BLOCK, 2 * BLOCK)
    data.sync()
    paths = [tmp_path / "data-00000", tmp_path / "data-00001"]
    assert sorted(tmp_path.iterdir()) == paths
    assert not any(map(holds_data, paths))

    def refuse(*arguments: object) -> int:
        raise AssertionError("a write opened a file")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        data.write(ROW_SIZE, b"x" * BLOCK)
    assert [holds_data(path) for path in paths] == [False, True]


def test_what_is_written_back_waits_no_more(data: LocalDataFile, tmp_path: Path) -> None:
    if data.unwritten() is None:
        pytest.skip("cachestat(2) is missing")
    data.sync()
    assert data.unwritten() == 0
    data.write(0, b"x" * (8 * BLOCK))
    data.write(ROW_SIZE, b"x" * BLOCK)
    before = data.unwritten()
    assert before is not None
    assert before <= 9 * BLOCK
    data.write_back()
    for _ in range(10_000):
        if data.unwritten() == 0:
            break
        time.sleep(0.001)
    assert data.unwritten() == 0
    data.sync()
    assert get(data, 0, 8 * BLOCK) == b"x" * (8 * BLOCK)


def test_errors_of_writing_back_are_raised(
    data: LocalDataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError) as caught:
        file_calls.sync_file_range(-1, 0, 0, 2)
    assert caught.value.errno == errno.EBADF
    assert page_cache.count_unwritten(-1) is None


def test_a_file_that_another_process_makes_is_found(data: LocalDataFile, tmp_path: Path) -> None:
    """A merge writes into layers that are open elsewhere."""
    other = LocalDataFile(tmp_path, writable=True)
    other.write(ROW_SIZE, b"x" * BLOCK)
    buffer = bytearray(BLOCK)
    assert not data.try_read(ROW_SIZE, memoryview(buffer))
    data.read(ROW_SIZE, memoryview(buffer))
    assert buffer == b"x" * BLOCK
    assert data.try_read(ROW_SIZE, memoryview(buffer))
    other.close()


def test_where_the_file_system_cannot_tell_all_may_use_space(
    data: LocalDataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    data.write(5 * BLOCK, b"x" * BLOCK)
    piece = 64 << 20
    assert data.allocated_ranges(BLOCK, 2 * piece, 9) == [
        (BLOCK, piece),
        (BLOCK + piece, piece),
    ]
    assert data.allocated_ranges(0, ROW_SIZE, 2) == [(0, piece), (piece, piece)]
    assert data.allocated_ranges(ROW_SIZE, ROW_SIZE, 2) == []
    # What is to be overwritten must be no hole.
    data.write(2 * piece, b"x" * BLOCK)
    data.write(ROW_SIZE, b"x" * BLOCK)
    found = data.occupied_ranges(0, 2 * ROW_SIZE, 9)
    assert found == [(5 * BLOCK, BLOCK), (2 * piece, BLOCK), (ROW_SIZE, BLOCK)]
    assert data.occupied_ranges(0, 2 * ROW_SIZE, 2) == found[:2]
    assert data.occupied_ranges(2 * piece + 4, 2, 2) == [(2 * piece + 4, 2)]
    assert data.occupied_ranges(6 * BLOCK, BLOCK, 2) == []
    data.close()


def test_an_error_while_looking_for_extents_is_told(
    data: LocalDataFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    data.write(0, b"x" * BLOCK)
    monkeypatch.setattr(fcntl, "ioctl", fail)
    with pytest.raises(OSError, match="broken"):
        data.allocated_ranges(0, BLOCK, 1)
    data.close()


def test_a_file_removed_or_cut_short_while_it_is_open_fails_the_next_sync(tmp_path: Path) -> None:
    data = LocalDataFile(tmp_path, writable=True)
    data.write(0, b"a" * 3 * BLOCK)
    data.write(ROW_SIZE, b"b" * BLOCK)
    data.sync()
    first, second = tmp_path / "data-00000", tmp_path / "data-00001"
    os.truncate(first, 2 * BLOCK)
    data.write(ROW_SIZE, b"c" * BLOCK)
    data.sync()  # of the row that was written
    data.write(0, b"d" * BLOCK)
    with pytest.raises(OSError, match=f"{first} was cut short from 12288 to 8192 bytes") as caught:
        data.sync()
    assert caught.value.errno == errno.EIO
    second.unlink()
    data.write(ROW_SIZE, b"e" * BLOCK)
    with pytest.raises(OSError, match=f"{second} was removed while it was open"):
        data.sync()
    data.close()
    # What was cut short between opening and the first sync is seen too.
    data = LocalDataFile(tmp_path, writable=True)
    os.truncate(first, BLOCK)
    with pytest.raises(OSError, match="was cut short"):
        data.sync()
    data.close()


def test_rows_stay_to_be_synced_when_their_directory_could_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = LocalDataFile(tmp_path, writable=True)
    data.write(0, b"a" * BLOCK)

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "no directory")

    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError):
            data.sync()
        assert not synced
    data.sync()
    assert len(synced) == 1
    data.close()
