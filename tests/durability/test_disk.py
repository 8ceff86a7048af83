"""The simulated file system is like a real one, and loses what a power cut may lose, no more."""

import random

from backends.file_calls import fallocate

from .disk import PAGE, SECTOR, Choice, Directory, Disk, File

PUNCH, ZERO = 0x03, 0x10


def states(disk, count=300):
    return [disk.cut(Choice(number)) for number in range(count)]


def test_a_file_is_like_a_real_one(tmp_path):
    source = random.Random(1)
    for number in range(40):
        file = File({}, 0)
        with (tmp_path / str(number)).open("w+b", buffering=0) as real:
            for _ in range(60):
                offset = source.randrange(6 * PAGE)
                length = source.randrange(1, 3 * PAGE)
                what = source.choice(("write", "write", "punch", "zero", "truncate", "sync"))
                if what == "write":
                    data = source.randbytes(length)
                    real.seek(offset)
                    real.write(data)
                    file.write(offset, data)
                elif what == "punch":
                    fallocate(real.fileno(), PUNCH, offset, length)
                    file.clear(offset, min(length, max(0, file.size - offset)), allocated=False)
                elif what == "zero" and offset + length <= file.size:
                    fallocate(real.fileno(), ZERO, offset, length)
                    file.clear(offset, length, allocated=True)
                elif what == "truncate":
                    real.truncate(offset)
                    file.truncate(offset)
                elif what == "sync":
                    file.sync()
                real.seek(0)
                assert real.read() == file.read(0, file.size)


def test_each_sector_is_the_synced_one_or_one_written_since():
    file = File({}, 0)
    disk = Disk(Directory({"a": file}))
    file.write(0, b"a" * PAGE)
    file.sync()
    file.write(0, b"b" * PAGE)
    file.write(SECTOR, b"c" * SECTOR)
    contents = {state.find("/a").read(0, PAGE) for state in states(disk)}
    seen = [{content[at : at + 1] for content in contents} for at in range(0, PAGE, SECTOR)]
    assert seen[1] == {b"a", b"b", b"c"}
    assert all(sector == {b"a", b"b"} for sector in (seen[0], *seen[2:]))
    assert all(len(set(c[at : at + SECTOR])) == 1 for c in contents for at in range(0, PAGE, 512))
    file.sync()
    assert {state.find("/a").read(0, PAGE) for state in states(disk)} == {file.read(0, PAGE)}


def test_a_hole_hides_what_was_there_before():
    file = File({}, 0)
    disk = Disk(Directory({"a": file}))
    file.write(0, b"a" * PAGE)
    file.sync()
    file.clear(0, PAGE, allocated=False)
    file.write(0, b"b" * PAGE)
    mixtures = {frozenset(state.find("/a").read(0, PAGE)) for state in states(disk)}
    assert mixtures == {frozenset(mix) for mix in (b"a", b"b", b"\0", b"b\0")}


def test_a_size_and_data_come_in_any_order():
    file = File({}, 0)
    disk = Disk(Directory({"a": file}))
    file.write(0, b"a" * PAGE)
    found = {state.find("/a").read(0, PAGE).strip(b"\0")[:1] for state in states(disk)}
    sizes = {state.find("/a").size for state in states(disk)}
    assert found == {b"", b"a"}
    assert sizes == {0, PAGE}


def test_changes_of_directories_come_in_any_order_but_for_those_of_one_name():
    one, other, root = File({}, 0), File({}, 0), Directory({})
    below = Directory({})
    root.entries["below"] = root.stable["below"] = below
    disk = Disk(root)
    disk.change((root, "new", one))
    disk.change((root, "new", None), (root, "name", one))
    disk.change((below, "x", other))

    def names():
        return {(*sorted(s.root.entries), *s.find("/below").entries) for s in states(disk)}

    assert names() == {
        ("below", *more, *rest) for more in ((), ("new",), ("name",)) for rest in ((), ("x",))
    }
    disk.sync_directory(below)
    assert names() == {("below", *more, "x") for more in ((), ("new",), ("name",))}
    disk.sync_directory(root)
    assert names() == {("below", "name", "x")}
