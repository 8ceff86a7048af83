from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from backends.directory_objects import DirectoryObjectStore
from backends.errors import (
    CorruptError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
)
from backends.object_urls import open_object_store


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_open_by_url(tmp_path: Path) -> None:
    made = open_object_store(f"file://{tmp_path}/new", create=True)
    made.put("key", b"x")
    assert open_object_store(f"file://{tmp_path}/new").get("key", 1) == b"x"
    spaced = open_object_store(f"file://localhost{tmp_path}/with%20space", create=True)
    spaced.put("key", b"x")
    assert (tmp_path / "with space" / "key").read_bytes() == b"x"
    with pytest.raises(NotFoundError, match=f"{tmp_path}/none"):
        open_object_store(f"file://{tmp_path}/none")
    with pytest.raises(NotFoundError, match=r"no directory .*/none: create it"):
        open_object_store(f"file://{tmp_path}/none/deeper", create=True)
    with pytest.raises(InvalidError, match="not a directory"):
        open_object_store(f"file://{tmp_path}/new/key")


@pytest.mark.parametrize(
    "url",
    ["", "dir", "/dir", "http://x/y", "file:dir", "file://host/dir", "s3:", "s3://", "s3:///prefix",
     "s3://bucket/../x", "s3://bucket/a?b=c", "file:///d#x", "s3://bucket/a b"],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(InvalidError) as caught:
        open_object_store(url)
    assert "\n" not in str(caught.value)


def test_a_secret_in_a_url_is_not_repeated() -> None:
    for url in ("s3://me:hunter2@bucket/p", "https://me:hunter2@host/p", "file://a:hunter2@b/p"):
        with pytest.raises(InvalidError) as caught:
            open_object_store(url)
        assert "hunter2" not in str(caught.value)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryObjectStore(tmp_path)
    store.put("old", b"kept")
    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(NoSpaceError, match=str(tmp_path)):
            store.put("new", bytes(1000))
        with pytest.raises(NoSpaceError):
            store.put_if_absent("dir/new", bytes(1000))
    assert files(tmp_path) == ["old"]
    store.put("new", bytes(1000))
    assert store.get("new", 1000) == bytes(1000)


def test_failure_to_make_durable_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryObjectStore(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UnavailableError, match="input/output error"):
        store.put_if_absent("key", b"x")
    assert files(tmp_path) == []


def test_a_directory_that_is_gone_is_not_an_empty_one(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    store = DirectoryObjectStore(root)
    root.rmdir()
    for use in (
        lambda: store.put("a/b", b""),
        lambda: store.get("a", 1),
        lambda: store.size("a"),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
    ):
        with pytest.raises(NotFoundError, match="mounted"):
            use()
    assert not root.exists()


def test_what_is_no_object_is_not_listed_and_links_are_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.write_bytes(b"secret")
    store = DirectoryObjectStore(root)
    store.put("key", b"x")
    (root / "link").symlink_to(outside)
    (root / "lost+found").mkdir()
    (root / "with space").write_bytes(b"")
    os.mkfifo(root / "fifo")
    assert list(store.list("")) == [("key", 1)]
    with pytest.raises(CorruptError, match="link"):
        store.get("link", 100)


def test_what_a_crash_left_is_removed_in_time(tmp_path: Path) -> None:
    incoming = tmp_path / "incoming~"
    incoming.mkdir()
    for name, hours in (("old", 30), ("young", 1)):
        path = incoming / name
        path.write_bytes(b"half")
        then = path.stat().st_mtime - hours * 3600
        os.utime(path, (then, then))
    store = DirectoryObjectStore(tmp_path)
    assert [path.name for path in incoming.iterdir()] == ["young"]
    assert list(store.list("")) == []
