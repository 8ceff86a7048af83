"""Files of layers that somebody removes, cuts short or replaces under a running daemon.

A client gets EIO for what is not there, never zeroes or other bytes in its place; other volumes and
the daemon go on, and the log names the file and says what is wrong with it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .parts import MIB, Daemon, run_nbdsh

READ = """
import errno
def read(offset, length=2**20):
    try:
        return bytes(h.pread(length, offset))
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
        return None
"""


@pytest.fixture
def served(start_daemon: Callable[..., Daemon], data_directory: Path) -> Daemon:
    """A daemon with a volume of two layers, "disk", and another one, "other"; all is flushed."""
    daemon = start_daemon(data_directory, "--workers", "2")
    for name in ("disk", "other"):
        daemon.create(name, 64 * MIB)
        run_nbdsh("h.pwrite(b'o' * 2**22, 0); h.flush()", daemon.uri(name))
    daemon.take_snapshot("disk@old")
    run_nbdsh("h.pwrite(b'n' * 2**20, 2**20); h.flush()", daemon.uri("disk"))
    return daemon


def layers(daemon: Daemon) -> dict[str, list[Path]]:
    """The layers by the letter that they hold first."""
    found: dict[str, list[Path]] = {}
    for path in sorted((daemon.data / "layers").iterdir()):
        with (path / "data-00000").open("rb") as data:
            content = data.read(2 * MIB)
        letter = content.strip(b"\0")[:1].decode()
        found.setdefault(letter, []).append(path)
    return found


def lives(daemon: Daemon) -> None:
    """The daemon runs, and the other volume is as it was and can be written."""
    assert daemon.is_running()
    run_nbdsh(
        "assert bytes(h.pread(2**20, 0)) == b'o' * 2**20\n"
        "h.pwrite(b'w' * 4096, 2**21); h.flush()\n"
        "assert bytes(h.pread(4096, 2**21)) == b'w' * 4096; h.pwrite(b'o' * 4096, 2**21)",
        daemon.uri("other"),
    )


def old_layer(daemon: Daemon) -> Path:
    """The sealed layer under disk@old: it belongs to "disk", and is not its head."""
    (head,) = layers(daemon)["n"]
    other = {path for path in layers(daemon)["o"] if not (path / "index").exists()}
    (old,) = set(layers(daemon)["o"]) - other
    assert old != head
    return old


def test_data_cut_short_while_it_is_read(served: Daemon) -> None:
    data = old_layer(served) / "data-00000"
    script = f"""
assert read(0) == b"o" * 2**20 and read(2**20) == b"n" * 2**20
import os
os.truncate({str(data)!r}, 2**19)
assert read(2**21) is None, "beyond the end"
assert read(0) is None, "partly beyond the end"
assert read(0, 2**19) == b"o" * 2**19, "what is there"
assert read(2**20) == b"n" * 2**20, "another layer's"
assert read(2**23) == bytes(2**20)
try:
    h.pwrite(b"x", 2**21 + 5)
    raise SystemExit("a part of a block that cannot be read was written")
except nbd.Error as error:
    assert error.errnum == errno.EIO, error
assert read(2**21, 4096) is None
h.pwrite(b"x" * 4096, 2**21)
assert read(2**21, 4096) == b"x" * 4096, "written whole it needs nothing older"
h.flush()
"""
    run_nbdsh(READ + script, served.uri("disk"))
    lives(served)
    assert f"{data} ends before offset" in served.read_log()
    run_nbdsh(READ + "assert read(2**21) is None", served.uri("disk@old"))


def test_data_removed_while_nobody_reads(served: Daemon) -> None:
    data = old_layer(served) / "data-00000"
    data.unlink()
    script = """
assert read(0) is None
assert read(2**20) == b"n" * 2**20
h.pwrite(b"x" * 4096, 0); h.flush()
assert read(0, 4096) == b"x" * 4096
"""
    run_nbdsh(READ + script, served.uri("disk"))
    lives(served)
    assert f"{data} is missing" in served.read_log()
    assert not data.exists(), "reading makes no file"


def test_the_head_cut_short_while_nobody_is_connected(served: Daemon) -> None:
    """Written behind its end, it would have zeroes where data is missing."""
    (head,) = layers(served)["n"]
    data = head / "data-00000"
    with data.open("r+b") as file:
        file.truncate(MIB + 4096)
    script = """
assert read(0) == b"o" * 2**20
assert read(2**20, 4096) == b"n" * 4096
assert read(2**20) is None
for offset in (2**20 + 2**19, 2**23):
    try:
        h.pwrite(b"x" * 4096, offset)
        raise SystemExit("it was written")
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
assert read(2**20 + 4096, 4096) is None
"""
    run_nbdsh(READ + script, served.uri("disk"))
    lives(served)
    assert (
        f"disk is read-only: {data}: cut short at offset {MIB + 4096}, {2 * MIB} bytes expected"
        in served.read_log()
    )


@pytest.mark.parametrize("how", ["cut short", "removed"])
def test_the_head_cut_short_or_removed_while_it_is_written(served: Daemon, how: str) -> None:
    """No FLUSH covers what would be gone when the volume is opened again."""
    (head,) = layers(served)["n"]
    data = head / "data-00000"
    script = f"""
import os
def refused(what):
    try:
        what()
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
        return True
    return False
h.pwrite(b"m" * 4096, 2**20)
{f"os.truncate({str(data)!r}, 2**20 + 4096)" if how == "cut short" else f"os.unlink({str(data)!r})"}
h.pwrite(b"x" * 4096, 2**20)
assert refused(lambda: h.flush())
assert refused(lambda: h.pwrite(b"x" * 4096, 2**23))
assert read(2**20, 4096) == b"x" * 4096
assert (read(2**20 + 4096, 4096) is None) == {how == "cut short"}
assert read(0) == b"o" * 2**20
"""
    run_nbdsh(READ + script, served.uri("disk"))
    lives(served)
    assert "volume disk is read-only from now on: a sync failed: " in served.read_log()
    assert f"{data} was {how}" in served.read_log()


def test_a_layer_cut_short_is_not_merged(served: Daemon) -> None:
    """What is left of it stays as it is; and it is merged when the file is whole again."""
    data = old_layer(served) / "data-00000"
    served.take_snapshot("disk@new")
    whole = data.read_bytes()
    with data.open("r+b") as file:
        file.truncate(MIB)
    refused = served.command("snapshot", "delete", "disk@old", check=False)
    assert refused.returncode == 1
    assert f"{data}: cut short at offset {MIB}, {4 * MIB} bytes expected" in refused.stderr
    run_nbdsh(READ + "assert read(2**21) is None; assert read(0)", served.uri("disk"))
    with data.open("r+b") as file:
        file.write(whole)
    script = """
assert read(0) == b"o" * 2**20 and read(2**20) == b"n" * 2**20 and read(2**21) == b"o" * 2**20
"""
    run_nbdsh(READ + script, served.uri("disk"))
    lives(served)


@pytest.mark.parametrize("what", ["index", "layer"])
def test_what_a_volume_cannot_be_opened_without(served: Daemon, what: str) -> None:
    layer = old_layer(served)
    gone = layer / "index" if what == "index" else layer
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    with pytest.raises(pytest.fail.Exception):
        run_nbdsh("h.pread(512, 0)", served.uri("disk"))
    lives(served)
    assert str(layer) in served.read_log()
    assert "is missing" in served.read_log()
    listed = served.json("volume", "list")
    assert [(found["name"], found["mapped"]) for found in listed["volumes"]] == [("other", 4 * MIB)]
    (unreadable,) = listed["unreadable"]
    assert unreadable["name"] == "disk"
    assert str(layer) in unreadable["problem"]
    shown = served.command("volume", "show", "disk", check=False)
    assert shown.returncode == 1
    assert str(layer) in shown.stderr
    assert "volume disk cannot be read" in served.command("volume", "list").stderr


def test_a_journal_replaced_by_another_layers(served: Daemon) -> None:
    (head,) = layers(served)["n"]
    good = (head / "journal").read_bytes()
    (other,) = {path for path in layers(served)["o"] if not (path / "index").exists()}
    for bad in ((other / "journal").read_bytes(), good[:100], b"", b"\xff" + good[1:]):
        (head / "journal").write_bytes(bad)
        with pytest.raises(pytest.fail.Exception):
            run_nbdsh("h.pread(512, 0)", served.uri("disk"))
        shown = served.command("volume", "show", "disk", check=False)
        assert shown.returncode == 1
        assert f"{head / 'journal'}: " in shown.stderr
        lives(served)
    assert f"{head / 'journal'}: cut short at offset 100" in served.read_log()
    (head / "journal").write_bytes(good)
    run_nbdsh(READ + 'assert read(2**20) == b"n" * 2**20', served.uri("disk"))


def test_a_manifest_removed_while_the_volume_is_served(served: Daemon) -> None:
    """Nothing on the data path needs it; the next commit writes it again, whole."""
    volume = next(v for v in served.json("volume", "list")["volumes"] if v["name"] == "disk")
    manifest = served.data / "volumes" / volume["id"]
    saved = manifest.read_bytes()
    manifest.unlink()
    run_nbdsh(READ + 'assert read(0) == b"o" * 2**20', served.uri("disk"))
    served.take_snapshot("disk@new")
    assert manifest.exists()
    assert manifest.read_bytes() != saved
    assert served.stop() == 0
    served.start()
    snapshots = served.json("snapshot", "list", "disk")["snapshots"]
    assert [found["name"] for found in snapshots] == ["old", "new"]
    run_nbdsh(READ + 'assert read(2**20) == b"n" * 2**20', served.uri("disk@new"))
    lives(served)
