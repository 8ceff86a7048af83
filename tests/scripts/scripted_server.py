"""A small NBD server in memory, correct as it is; what tests make of it breaks one rule at a time.

One thread a connection, one request at a time. Fixed newstyle, structured replies, base:allocation;
no TLS, no extended headers: those are checked against real servers.
"""

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

SIZE = 8 << 20
BLOCK = 4096
NAME = b"disk"
OPTION_MAGIC = 0x49484156454F5054
FLAGS = 0b1_0110_1101  # HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN
DF, FLAG_CACHE = 1 << 7, 1 << 10
ACK, SERVER, INFO, META_CONTEXT = 1, 2, 3, 4
UNSUP, INVALID, UNKNOWN, TOO_BIG = ((1 << 31) + number for number in (1, 3, 6, 9))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
EPERM, EINVAL, ENOSPC, EOVERFLOW = 1, 22, 28, 75
MAX_PAYLOAD = 1 << 22
ALLOWED_FLAGS = {READ: 0b101, WRITE_ZEROES: 0b11, BLOCK_STATUS: 0b1001}


class Ended(Exception):  # noqa: N818
    """The connection is over."""


class Session:
    """One connection; a wrong server overrides one of its methods."""

    def __init__(self, sock: socket.socket, server: "Server") -> None:
        self.sock = sock
        self.server = server
        self.structured = False
        self.context = False
        self.client_flags = 0

    def run(self) -> None:
        with suppress(Ended, OSError):
            self.greet()
            while not self.haggle():
                pass
            while True:
                self.serve_request()
        self.sock.close()

    def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self.sock.recv(min(length - len(data), 1 << 20))
            if not piece:
                raise Ended
            data += piece
        return bytes(data)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    # Handshake

    def greet(self) -> None:
        self.send(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        (self.client_flags,) = struct.unpack(">I", self.receive(4))
        if self.client_flags & ~3:
            raise Ended

    def haggle(self) -> bool:
        """Serve one option; True when the transmission phase has begun."""
        magic, option, length = struct.unpack(">QII", self.receive(16))
        if magic != OPTION_MAGIC:
            raise Ended
        if length > 1 << 16:
            left = length
            while left:
                left -= len(self.receive(min(left, 1 << 16)))
            self.reply(option, TOO_BIG)
            return False
        return self.on_option(option, self.receive(length))

    def on_option(self, option: int, data: bytes) -> bool:
        if option == 1:
            if data not in (NAME, b""):
                raise Ended
            self.send(struct.pack(">QH", SIZE, self.flags()))
            if not self.client_flags & 2:
                self.send(bytes(124))
            return True
        if option == 2:
            self.on_abort()
        elif option in (3, 8) and data:
            self.reply(option, INVALID)
        elif option == 3:
            self.reply(option, SERVER, struct.pack(">I", len(NAME)) + NAME)
            self.reply(option, ACK)
        elif option in (6, 7):
            return self.on_info(option, data)
        elif option == 8:
            self.structured = True
            self.reply(option, ACK)
        elif option in (9, 10):
            self.on_context(option, data)
        else:
            self.reply(option, UNSUP)
        return False

    def on_abort(self) -> None:
        self.reply(2, ACK)
        raise Ended

    def on_info(self, option: int, data: bytes) -> bool:
        try:
            (length,) = struct.unpack_from(">I", data)
            name = data[4 : 4 + length]
            (count,) = struct.unpack_from(">H", data, 4 + length)
            if len(data) != 6 + length + 2 * count:
                raise struct.error
        except struct.error:
            self.on_malformed(option)
            return False
        wanted = struct.unpack_from(f">{count}H", data, 6 + length)
        if name not in (NAME, b""):
            self.reply(option, UNKNOWN)
            return False
        self.reply(option, INFO, struct.pack(">HQH", 0, SIZE, self.flags()))
        if 3 in wanted:
            self.reply(option, INFO, struct.pack(">HIII", 3, 1, BLOCK, MAX_PAYLOAD))
        self.reply(option, ACK)
        return option == 7

    def on_malformed(self, option: int) -> None:
        self.reply(option, INVALID, b"malformed")

    def on_context(self, option: int, data: bytes) -> None:
        if option == 10:
            self.context = False
        queries = self.parse_queries(data)
        if queries is None or not self.structured:
            self.reply(option, INVALID)
            return
        name, wanted = queries
        if name not in (NAME, b""):
            self.reply(option, UNKNOWN)
            return
        found = b"base:allocation" in wanted
        if option == 9:
            found = found or not wanted or b"base:" in wanted
        else:
            self.context = found
        if found:
            number = 0 if option == 9 else 5
            self.reply(option, META_CONTEXT, struct.pack(">I", number) + b"base:allocation")
        self.reply(option, ACK)

    def parse_queries(self, data: bytes) -> tuple[bytes, list[bytes]] | None:
        fields: list[bytes] = []
        position = 0
        try:
            for _ in range(2):
                (length,) = struct.unpack_from(">I", data, position)
                if not fields:
                    fields.append(data[position + 4 : position + 4 + length])
                    position += 4 + length
            count = length
            position += 4
            if count * 4 > len(data):
                return None
            for _ in range(count):
                (length,) = struct.unpack_from(">I", data, position)
                fields.append(data[position + 4 : position + 4 + length])
                position += 4 + length
        except struct.error:
            return None
        return (fields[0], fields[1:]) if position == len(data) else None

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

    def flags(self) -> int:
        return FLAGS | FLAG_CACHE | (DF if self.structured else 0)

    # Transmission

    def serve_request(self) -> None:
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        if magic != 0x25609513 or command == DISC:
            raise Ended
        payload = self.receive(length) if command == WRITE else b""
        error = self.judge(flags, command, offset, length)
        if error:
            self.fail(cookie, command, error)
        elif command == READ:
            self.on_read(cookie, flags, offset, length)
        elif command == BLOCK_STATUS:
            self.on_status(cookie, flags, offset, length)
        else:
            self.change(command, offset, length, payload)
            self.finish(cookie)

    def judge(self, flags: int, command: int, offset: int, length: int) -> int:
        allowed = ALLOWED_FLAGS.get(command, 1)
        if command > BLOCK_STATUS or flags & ~allowed or (flags & 4 and not self.structured):
            return EINVAL
        if command == FLUSH:
            return EINVAL if offset or length else 0
        if offset + length > SIZE:
            return ENOSPC if command in (WRITE, WRITE_ZEROES) else EINVAL
        if length > MAX_PAYLOAD and command in (READ, WRITE):
            return EINVAL
        return EINVAL if command == BLOCK_STATUS and not (self.context and length) else 0

    def change(self, command: int, offset: int, length: int, payload: bytes) -> None:
        content = self.server.content
        if command == WRITE:
            content[offset : offset + length] = payload
        elif command in (TRIM, WRITE_ZEROES):
            content[offset : offset + length] = bytes(length)

    def finish(self, cookie: int) -> None:
        self.send(struct.pack(">IIQ", 0x67446698, 0, cookie))

    def fail(self, cookie: int, command: int, error: int) -> None:
        if self.structured:
            text = b"no"
            self.chunk(cookie, 1 << 15 | 1, struct.pack(">IH", error, len(text)) + text)
        else:
            self.send(struct.pack(">IIQ", 0x67446698, error, cookie))

    def chunk(self, cookie: int, kind: int, payload: bytes = b"", done: bool = True) -> None:
        head = struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(payload))
        self.send(head + payload)

    def on_read(self, cookie: int, flags: int, offset: int, length: int) -> None:
        data = bytes(self.server.content[offset : offset + length])
        if not self.structured:
            self.send(struct.pack(">IIQ", 0x67446698, 0, cookie) + data)
        elif not length:
            self.chunk(cookie, 0)
        else:
            self.read_in_chunks(cookie, flags, offset, data)

    def read_in_chunks(self, cookie: int, flags: int, offset: int, data: bytes) -> None:
        """Two chunks where that is allowed, so that there is something to be put together."""
        half = 0 if flags & 4 else len(data) // 2 // 512 * 512
        if half:
            self.chunk(cookie, 1, struct.pack(">Q", offset) + data[:half], done=False)
        self.chunk(cookie, 1, struct.pack(">Q", offset + half) + data[half:])

    def on_status(self, cookie: int, flags: int, offset: int, length: int) -> None:
        self.status(cookie, self.runs(offset, length, one=bool(flags & 8)))

    def runs(self, offset: int, length: int, one: bool) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        position = offset
        while position < offset + length:
            end = min(position - position % BLOCK + BLOCK, offset + length)
            state = 0 if any(self.server.content[position:end]) else 3
            if runs and runs[-1][1] == state:
                runs[-1] = (runs[-1][0] + end - position, state)
            else:
                if runs and one:
                    break
                runs.append((end - position, state))
            position = end
        return runs

    def status(self, cookie: int, runs: Sequence[tuple[int, int]]) -> None:
        descriptors = b"".join(struct.pack(">II", *run) for run in runs)
        self.chunk(cookie, 5, struct.pack(">I", 5) + descriptors)


class Server:
    """Serves connections on a Unix socket with sessions of one kind."""

    def __init__(self, path: Path, session: type[Session]) -> None:
        self.path = path
        self.content = bytearray(SIZE)
        self._session = session
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{NAME.decode()}?socket={self.path}"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(sock)
            threading.Thread(target=self._session(sock, self).run, daemon=True).start()

    def disconnect_all(self) -> None:
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.disconnect_all()
        self._thread.join()
        self.path.unlink(missing_ok=True)


@contextmanager
def serving(directory: Path, session: type[Session] = Session) -> Iterator[Server]:
    """A server that runs until the block ends."""
    server = Server(directory / "nbd.sock", session)
    try:
        yield server
    finally:
        server.stop()
