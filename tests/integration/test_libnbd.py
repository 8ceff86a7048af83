"""libnbd's tools as clients: nbdinfo, nbdcopy and nbdsh."""

import json
import random
from pathlib import Path

import pytest

from .parts import GIB, MIB, Daemon, over_all_transports, require, run, run_nbdsh

pytestmark = over_all_transports


@pytest.fixture(autouse=True)
def _libnbd_tools() -> None:
    require("nbdinfo", "nbdcopy", "nbdsh")


def make_sparse_file(path: Path, size: int) -> None:
    """Write a file of `size` bytes with a row of data runs of odd sizes and holes between them."""
    source = random.Random(7)
    with path.open("wb") as file:
        file.truncate(size)
        offset = 0
        while offset < size:
            length = min(source.randrange(1, 3 * MIB), size - offset)
            if source.random() < 0.5:
                file.seek(offset)
                file.write(source.randbytes(length))
            offset += length


def test_info(daemon: Daemon) -> None:
    daemon.create("disk", 10 * GIB)
    daemon.take_snapshot("disk@first")
    for uri in (daemon.uri("disk"), daemon.tcp_uri("disk")):
        assert run("nbdinfo", "--size", uri).stdout.strip() == str(10 << 30)
        export = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"][0]
        assert export["export-name"] == "disk"
        assert export["export-size"] == 10 << 30
        assert export["is_read_only"] is False
        assert "base:allocation" in export["contexts"]
        for ability in ("flush", "fua", "trim", "zero", "multi_conn", "cache", "df"):
            assert export[f"can_{ability}"] is True, ability
        assert export["block_size_minimum"] == 1
        assert export["block_size_preferred"] == 4096
    for ability in ("flush", "fua", "trim", "zero", "multi-conn"):
        run("nbdinfo", "--can", ability, daemon.uri("disk"))
    assert run("nbdinfo", "--can", "structured-reply", daemon.uri("disk")).returncode == 0
    run("nbdinfo", "--is", "read-only", daemon.uri("disk@first"))
    assert run("nbdinfo", "--is", "read-only", daemon.uri("disk"), check=False).returncode == 2


def test_list(daemon: Daemon) -> None:
    assert json.loads(run("nbdinfo", "--list", "--json", daemon.uri("")).stdout)["exports"] == []
    for name in ("one", "two", "three"):
        daemon.create(name, MIB)
    listing = json.loads(run("nbdinfo", "--list", "--json", daemon.uri("")).stdout)
    assert sorted(export["export-name"] for export in listing["exports"]) == [
        "one",
        "three",
        "two",
    ]


def test_map_follows_writes_and_trims(daemon: Daemon) -> None:
    daemon.create("disk", 16 * MIB)

    def read_map() -> list[tuple[int, int, int]]:
        output = run("nbdinfo", "--map", "--json", daemon.uri("disk")).stdout
        return [(entry["offset"], entry["length"], entry["type"]) for entry in json.loads(output)]

    assert read_map() == [(0, 16 * MIB, 3)]
    run_nbdsh("h.pwrite(b'x' * 2**20, 2**20); h.pwrite(b'x', 8 * 2**20)", daemon.uri("disk"))
    written = [
        (0, MIB, 3),
        (MIB, MIB, 0),
        (2 * MIB, 6 * MIB, 3),
        (8 * MIB, 4096, 0),
        (8 * MIB + 4096, 8 * MIB - 4096, 3),
    ]
    assert read_map() == written
    daemon.take_snapshot("disk@written")
    assert read_map() == written
    run_nbdsh("h.trim(2**20, 2**20); h.zero(4096, 8 * 2**20)", daemon.uri("disk"))
    assert read_map() == [(0, 16 * MIB, 3)]
    assert run("nbdinfo", "--map", "--totals", daemon.uri("disk@written")).returncode == 0


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_copy_both_ways(daemon: Daemon, tmp_path: Path, way: str) -> None:
    size = 96 * MIB + 4096
    daemon.create("disk", size)
    uri = daemon.uri("disk") if way == "unix" else daemon.tcp_uri("disk")
    source, copy = tmp_path / "source", tmp_path / "copy"
    make_sparse_file(source, size)
    run("nbdcopy", "--connections=4", "--flush", source, uri)
    run("nbdcopy", "--connections=4", uri, copy)
    run("cmp", source, copy)
    daemon.create("other", size)
    run("nbdcopy", "--connections=4", uri, daemon.uri("other"))
    run("nbdcopy", "--connections=4", daemon.uri("other"), copy)
    run("cmp", source, copy)


def test_structured_replies_carry_holes(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    output = run_nbdsh(
        """
h.pwrite(b"a" * 4096, 0)
h.pwrite(b"b" * 8192, 65536)
assert h.get_structured_replies_negotiated()
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
data = h.pread_structured(2**20, 0, chunk)
assert bytes(data) == b"a" * 4096 + bytes(61440) + b"b" * 8192 + bytes(2**20 - 73728)
chunks.sort()
position = 0
for offset, length, status in chunks:
    assert offset == position, chunks
    if status == nbd.READ_DATA:
        position += length
    else:
        assert status == nbd.READ_HOLE
        following = [start for start, _, _ in chunks if start > offset]
        position = following[0] if following else 2**20
assert sum(length for _, length, status in chunks if status == nbd.READ_DATA) == 12288, chunks

# DF: one chunk, whatever is in it.
chunks.clear()
data = h.pread_structured(131072, 0, chunk, nbd.CMD_FLAG_DF)
assert len(chunks) == 1 and chunks[0] == (0, 131072, nbd.READ_DATA), chunks
assert bytes(data[65536:65536 + 8192]) == b"b" * 8192
print("done")
""",
        daemon.uri("disk"),
    )
    assert output == "done\n"


def test_simple_replies(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    output = run_nbdsh(
        f"""
h.set_request_structured_replies(False)
h.connect_uri({daemon.uri("disk")!r})
assert not h.get_structured_replies_negotiated()
h.pwrite(b"z" * 10000, 5)
assert bytes(h.pread(10010, 0)) == bytes(5) + b"z" * 10000 + bytes(5)
h.zero(100, 50)
assert bytes(h.pread(10010, 0)) == bytes(5) + b"z" * 45 + bytes(100) + b"z" * 9855 + bytes(5)
h.flush()
h.shutdown()
print("done")
"""
    )
    assert output == "done\n"


def test_block_status(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    output = run_nbdsh(
        f"""
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri({daemon.uri("disk")!r})
h.pwrite(b"a" * 8192, 8192)
h.pwrite(b"b" * 4096, 20480)
runs = []
def extent(context, offset, entries, error):
    assert context == nbd.CONTEXT_BASE_ALLOCATION
    runs.append((offset, list(entries)))
h.block_status(2**20, 0, extent)
hole = nbd.STATE_HOLE | nbd.STATE_ZERO
assert runs == [(0, [8192, hole, 8192, 0, 4096, hole, 4096, 0, 2**20 - 24576, hole])], runs
runs.clear()
h.block_status(4096, 12288, extent, nbd.CMD_FLAG_REQ_ONE)
assert runs == [(12288, [4096, 0])], runs
runs.clear()
h.block_status(2**20 - 100, 100, extent, nbd.CMD_FLAG_REQ_ONE)
assert runs == [(100, [8092, hole])], runs
print("done")
"""
    )
    assert output == "done\n"


def test_flags_and_unaligned_ranges(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    output = run_nbdsh(
        """
model = bytearray(2**20)
def check():
    assert bytes(h.pread(2**20, 0)) == bytes(model)
def write(data, offset, flags=0):
    h.pwrite(data, offset, flags)
    model[offset:offset + len(data)] = data
def zero(length, offset, flags=0):
    h.zero(length, offset, flags)
    model[offset:offset + length] = bytes(length)
write(b"1" * 100000, 3, nbd.CMD_FLAG_FUA)
check()
write(b"2", 4095)
write(b"3" * 2, 8191, nbd.CMD_FLAG_FUA)
check()
zero(5000, 10001)
zero(1, 20000, nbd.CMD_FLAG_FUA)
zero(65536, 30001, nbd.CMD_FLAG_NO_HOLE)
check()
h.trim(40960, 40960, nbd.CMD_FLAG_FUA)
model[40960:81920] = bytes(40960)
check()
h.cache(65536, 0)
h.flush()
write(b"4" * 10, 2**20 - 10)
check()
print("done")
""",
        daemon.uri("disk"),
    )
    assert output == "done\n"


def test_errors_leave_the_connection_usable(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    daemon.take_snapshot("disk@first")
    output = run_nbdsh(
        f"""
import errno
def expect(number, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == number, (error, error.errnum)
    else:
        raise AssertionError(f"{{call}} succeeded")
h.set_strict_mode(0)
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri({daemon.uri("disk")!r})
size = 2**20
expect(errno.ENOSPC, h.pwrite, b"x" * 4096, size)
expect(errno.ENOSPC, h.pwrite, b"x" * 4096, size - 1)
expect(errno.ENOSPC, h.zero, 4096, size - 1)
expect(errno.EINVAL, h.pread, 4096, size - 1)
expect(errno.EINVAL, h.trim, 4096, size)
expect(errno.EINVAL, h.cache, 4096, size)
expect(errno.EINVAL, h.block_status, 4096, size, lambda *arguments: None)
expect(errno.EINVAL, h.pread, 1, 2**63)
h.pwrite(b"still here", size - 10)
assert bytes(h.pread(10, size - 10)) == b"still here"
h.shutdown()

snapshot = nbd.NBD()
snapshot.set_strict_mode(0)
snapshot.connect_uri({daemon.uri("disk@first")!r})
assert snapshot.is_read_only()
expect(errno.EPERM, snapshot.pwrite, b"x" * 5000, 0)
expect(errno.EPERM, snapshot.zero, 4096, 0)
expect(errno.EPERM, snapshot.trim, 4096, 0)
assert bytes(snapshot.pread(10, size - 10)) == bytes(10)
snapshot.shutdown()
print("done")
"""
    )
    assert output == "done\n"


def test_options_before_an_export_is_chosen(daemon: Daemon) -> None:
    daemon.create("disk", MIB)
    output = run_nbdsh(
        f"""
def refused(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return error.string
    raise AssertionError(f"{{call}} succeeded")
h.set_opt_mode(True)
h.connect_uri({daemon.uri("")!r})
names = []
assert h.opt_list(lambda name, description: names.append(name)) == 1
assert names == ["disk"]
for name in ("nothing", "../disk", "disk/..", "disk@nothing", "", "x" * 4000):
    h.set_export_name(name)
    refused(h.opt_info)
    refused(h.opt_go)
h.set_export_name("disk")
h.add_meta_context("base:allocation")
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ["base:allocation"]
h.opt_info()
assert h.get_size() == 2**20
h.opt_go()
assert h.can_meta_context("base:allocation")
h.pwrite(b"x", 0)
h.shutdown()

other = nbd.NBD()
other.set_opt_mode(True)
other.connect_uri({daemon.uri("")!r})
other.opt_abort()
print("done")
"""
    )
    assert output == "done\n"


def test_many_requests_in_flight_on_many_connections(daemon: Daemon) -> None:
    daemon.create("disk", 64 * MIB)
    output = run_nbdsh(
        f"""
import random
source = random.Random(3)
handles = []
for _ in range(4):
    handle = nbd.NBD()
    handle.connect_uri({daemon.uri("disk")!r})
    handles.append(handle)
# Each piece has its own place, so the order of requests does not matter.
pieces = [(index * 65536 + source.randrange(60000), source.randbytes(source.randrange(1, 5000)))
          for index in range(1024)]
source.shuffle(pieces)
def complete(make_request):
    pending = []
    for index, piece in enumerate(pieces):
        handle = handles[index % len(handles)]
        pending.append((handle, make_request(handle, *piece)))
    for handle, cookie in pending:
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
buffers = {{}}
def write(handle, offset, data):
    return handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset)
def read(handle, offset, data):
    buffers[offset] = nbd.Buffer(len(data))
    return handle.aio_pread(buffers[offset], offset)
complete(write)
complete(read)
for offset, data in pieces:
    assert bytes(buffers[offset].to_bytearray()) == data, offset
# MULTI_CONN: a flush on one connection covers what another one wrote.
assert all(handle.can_multi_conn() for handle in handles)
handles[0].flush()
for handle in handles:
    handle.shutdown()
print("done")
"""
    )
    assert output == "done\n"
