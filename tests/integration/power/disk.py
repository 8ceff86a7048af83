"""The machine's disk: an NBD server with a volatile cache that a power cut empties.

The protocol is the least that qemu needs: fixed newstyle negotiation, one export, READ, WRITE and
FLUSH with simple replies. FUA is not offered, so the guest's kernel asks for it with a FLUSH.

Two sparse files hold the disk: ``durable`` is what is on the platter, ``current`` what a read
finds. A write goes to ``current`` and is remembered; a FLUSH brings all of it to ``durable``.
Requests are served one after the other, so a FLUSH covers every write answered before it. At a
cut, each sector that was written since the last FLUSH becomes what it was then or any one of the
versions written since: a disk writes its cache back in any order, at any time, more than once.

What a file system does not survive is not done to it:

* The first 4 KiB are not torn. ext4 has its superblock there, two sectors with one checksum, and
  writes it in place: torn, it is refused, and so is everything that the file system holds.
* Under XFS nothing is torn within aligned 4 KiB (``torn_at``). A block of its metadata says at its
  beginning up to where in the log it is current. With only that part there, the log is not
  replayed over it, and it is refused for its checksum.
"""

import contextlib
import mmap
import random
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
BLOCK = 4096

_NBDMAGIC, _IHAVEOPT, _REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_OPTION_EXPORT_NAME, _OPTION_ABORT, _OPTION_INFO, _OPTION_GO = 1, 2, 6, 7
_REPLY_ACK, _REPLY_INFO, _REPLY_UNSUPPORTED = 1, 3, 0x80000001
_FLAGS = 0b101  # HAS_FLAGS and SEND_FLUSH
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC, _SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _WRITE, _DISC, _FLUSH = range(4)
_EINVAL = 22


@dataclass
class Cut:
    """What a power cut did."""

    manner: str
    writes: int  # since the last FLUSH
    sectors: int  # that they touched
    changed: int  # of these, those that did not end as last written


@dataclass
class Disk:
    """``size`` bytes in ``directory``, made anew unless they are there, served on ``socket``.

    A cut tears writes at multiples of ``torn_at`` bytes: SECTOR or BLOCK.
    """

    directory: Path
    size: int
    torn_at: int = SECTOR
    flushes: int = 0
    writes: int = 0
    _volatile: list[tuple[int, bytes]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _connection: socket.socket | None = None
    _powered: bool = False

    def __post_init__(self):
        self.socket = self.directory / "disk.sock"
        self.path = self.directory / "durable"
        self._durable = _map(self.path, self.size)
        self._current = _map(self.directory / "current", self.size)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen()

    def power_on(self):
        """Serve those who connect, one after the other, in a thread."""
        self._powered = True
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def cut(self, source):
        """Stop at once; keep any of what was not flushed, as the random ``source`` has it."""
        self._stop()
        return self._settle(source)

    def close(self):
        """Forget the files; they stay, as they are."""
        if self._powered:
            self._stop()
        self._listener.close()
        self._durable.close()
        self._current.close()

    def _stop(self):
        with self._lock:
            self._powered = False
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with socket.socket(socket.AF_UNIX) as nobody:  # for a thread that waits for somebody
            nobody.connect(str(self.socket))
        self._thread.join()

    def _settle(self, source):
        versions = {}  # sector: the numbers of the writes to it
        for number, (offset, data) in enumerate(self._volatile):
            for sector in range(offset // SECTOR, (offset + len(data)) // SECTOR):
                versions.setdefault(sector, []).append(number)
        manner, choose = _choose_manner(source, len(self._volatile))
        changed = 0
        together = {}  # a unit that is not torn: the numbers of all writes to it
        for sector, numbers in versions.items():
            together.setdefault(self._unit(sector), set()).update(numbers)
        edges = {unit: choose(sorted(numbers)) for unit, numbers in together.items()}
        for sector, numbers in versions.items():
            edge = edges[self._unit(sector)]
            kept = [number for number in numbers if edge is not None and number <= edge]
            number = kept[-1] if kept else None
            changed += number != numbers[-1]
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if number is not None:
                offset, data = self._volatile[number]
                start = sector * SECTOR - offset
                self._durable[place] = data[start : start + SECTOR]
            self._current[place] = self._durable[place]
        cut = Cut(manner, len(self._volatile), len(versions), changed)
        self._volatile.clear()
        return cut

    def _unit(self, sector):
        """The first sector of the aligned bytes that are not torn."""
        within_first = sector < BLOCK // SECTOR
        return sector - sector % ((BLOCK if within_first else self.torn_at) // SECTOR)

    def _serve(self):
        while self._powered:
            self._connection, _ = self._listener.accept()
            # A machine that is killed goes without a word.
            with contextlib.suppress(OSError, EOFError), self._connection as connection:
                self._negotiate(connection)
                while self._answer(connection):
                    pass
            self._connection = None

    def _negotiate(self, connection):
        connection.sendall(struct.pack(">QQH", _NBDMAGIC, _IHAVEOPT, 0b11))
        _receive(connection, 4)
        while True:
            _, option, length = struct.unpack(">QII", _receive(connection, 16))
            _receive(connection, length)

            def reply(kind, data=b"", option=option):
                header = struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data))
                connection.sendall(header + data)

            if option == _OPTION_EXPORT_NAME:
                connection.sendall(struct.pack(">QH", self.size, _FLAGS))
                return
            if option in (_OPTION_INFO, _OPTION_GO):
                reply(_REPLY_INFO, struct.pack(">HQH", 0, self.size, _FLAGS))
                # Block sizes: the sector that a cut tears at is the least.
                reply(_REPLY_INFO, struct.pack(">HIII", 3, SECTOR, 4096, 1 << 25))
                reply(_REPLY_ACK)
                if option == _OPTION_GO:
                    return
            elif option == _OPTION_ABORT:
                reply(_REPLY_ACK)
                raise EOFError
            else:
                reply(_REPLY_UNSUPPORTED)

    def _answer(self, connection):
        """Serve one request; whether to go on."""
        magic, _, command, cookie, offset, length = _REQUEST.unpack(
            _receive(connection, _REQUEST.size)
        )
        if magic != _REQUEST_MAGIC:
            raise EOFError
        data = _receive(connection, length) if command == _WRITE else b""
        error, answer = 0, b""
        with self._lock:
            if not self._powered:
                return False
            if command == _READ:
                answer = self._current[offset : offset + length]
            elif command == _WRITE:
                self._current[offset : offset + length] = data
                self._volatile.append((offset, data))
                self.writes += 1
            elif command == _FLUSH:
                for start, written in self._volatile:
                    self._durable[start : start + len(written)] = written
                self._volatile.clear()
                self.flushes += 1
            elif command == _DISC:
                return False
            else:
                error = _EINVAL
        connection.sendall(struct.pack(">IIQ", _SIMPLE_REPLY_MAGIC, error, cookie) + answer)
        return True


def _choose_manner(source: random.Random, writes: int):
    """What a cut keeps of the cache: a name, and a function from the numbers of the writes to a
    sector, oldest first, to the one that it keeps, or to None for none of them.
    """
    manner = source.choice(
        ["none", "all", "sectors", "sectors", "writes", "the earlier", "all but one"]
    )
    if manner == "none":
        return manner, lambda _: None
    if manner == "all":
        return manner, lambda numbers: numbers[-1]
    if manner == "sectors":  # each for itself, torn within writes
        share = source.choice([0.1, 0.5, 0.9])
        return (
            manner,
            lambda numbers: (
                source.choice([None, *numbers[:-1]]) if source.random() < share else numbers[-1]
            ),
        )
    if manner == "the earlier":  # what was written last is not there yet, with a ragged border
        edge, width = source.uniform(0, writes), 1 + writes / 10
        kept = {n for n in range(writes) if n < source.gauss(edge, width)}
    elif manner == "all but one":
        kept = set(range(writes)) - {source.randrange(writes)} if writes else set()
    else:  # each write as a whole
        kept = {number for number in range(writes) if source.random() < 0.5}
    return manner, lambda numbers: max((n for n in numbers if n in kept), default=None)


def _map(path, size):
    with path.open("a+b") as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


def _receive(connection, length):
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)
