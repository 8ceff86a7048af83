"""A client that knows what a volume and its snapshots hold, for test_many_snapshots.py.

It runs under Debian's Python, which has libnbd, as a process of its own:

    snapshots_client.py BEGIN SIZE

It takes a request a line, ["name", argument…] in JSON, and answers each with a line of JSON. From
byte BEGIN to SIZE the volume is its own: it knows the version of each 512-byte sector there, which
the sector's bytes say. What is before BEGIN somebody else writes; of that it knows what a snapshot
held when it was taken.

    connect URI          to the volume; what was flushed before must be there
    change SEED          write, TRIM and zero at random, then FLUSH
    check                compare everything of its own with what it should be
    remember NAME URI    a snapshot was just taken: its own part must be what the volume has now
    compare NAME URI     the same snapshot must hold, in whole, what it held then
    need NAMES           bytes of blocks that these snapshots, in this order, and its own part of
                         the volume now need, when each keeps only what differs from the one before
    trim                 TRIM everything and FLUSH
"""

import hashlib
import json
import random
import struct
import sys

import nbd

SECTOR = 512
BLOCK = 4096
PIECE = 1 << 20
CHANGES = 24
LONGEST = 24  # blocks


def sector_bytes(number, version):
    """Return what a version of a sector holds; version 0 is zeroes."""
    if version == 0:
        return bytes(SECTOR)
    return struct.pack("<II", number, version) * (SECTOR // 8)


def digests_of(content):
    """Return a digest of each block, None where it is all zeroes."""
    empty = bytes(BLOCK)
    view = memoryview(content)
    blocks = (view[start : start + BLOCK] for start in range(0, len(content), BLOCK))
    return [None if block == empty else hashlib.sha1(block).digest() for block in blocks]


def count_changed(old, new):
    """Count the blocks of `new` that hold data which is not in `old`."""
    pairs = zip(old, new, strict=True)
    return sum(1 for before, after in pairs if after is not None and after != before)


class Client:
    """See the module's text."""

    def __init__(self, begin, size):
        self.begin = begin
        self.size = size
        self.versions = [0] * ((size - begin) // SECTOR)
        self.version = 0
        self.snapshots = {}
        self.handle = None

    def content(self):
        """Return what its own part of the volume must hold."""
        first = self.begin // SECTOR
        return b"".join(
            sector_bytes(first + index, version) for index, version in enumerate(self.versions)
        )

    def read(self, handle, begin):
        pieces = range(begin, self.size, PIECE)
        return b"".join(
            bytes(handle.pread(min(PIECE, self.size - start), start)) for start in pieces
        )

    def read_export(self, uri):
        handle = nbd.NBD()
        handle.connect_uri(uri)
        content = self.read(handle, 0)
        handle.shutdown()
        return content

    def connect(self, uri):
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        return self.check()

    def change(self, seed):
        source = random.Random(seed)
        for _ in range(CHANGES):
            unit = source.choice((SECTOR, BLOCK, BLOCK, BLOCK))
            first = source.randrange(len(self.versions)) // (unit // SECTOR) * (unit // SECTOR)
            count = source.randint(1, LONGEST) * (unit // SECTOR)
            count = min(count, len(self.versions) - first)
            offset, length = self.begin + first * SECTOR, count * SECTOR
            kind = source.choice(("write", "write", "write", "trim", "zero"))
            if kind == "write":
                self.version += 1
                start = offset // SECTOR
                data = b"".join(sector_bytes(start + at, self.version) for at in range(count))
                self.handle.pwrite(data, offset)
            elif kind == "trim":
                self.handle.trim(length, offset)
            else:
                self.handle.zero(length, offset)
            version = self.version if kind == "write" else 0
            self.versions[first : first + count] = [version] * count
        self.handle.flush()

    def check(self):
        return self.read(self.handle, self.begin) == self.content()

    def remember(self, name, uri):
        content = self.read_export(uri)
        self.snapshots[name] = digests_of(content)
        return content[self.begin :] == self.content()

    def compare(self, name, uri):
        return digests_of(self.read_export(uri)) == self.snapshots[name]

    def need(self, names):
        states = [self.snapshots[name] for name in names]
        elsewhere = [None] * (self.begin // BLOCK)
        states.append(elsewhere + digests_of(self.content()))
        before = [[None] * (self.size // BLOCK), *states[:-1]]
        return BLOCK * sum(map(count_changed, before, states))

    def trim(self):
        self.handle.trim(self.size, 0)
        self.handle.flush()
        self.versions = [0] * len(self.versions)


def main():
    client = Client(*map(int, sys.argv[1:]))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(client, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
