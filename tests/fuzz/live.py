"""Random clients against a daemon: what they may do is anything but break the machine.

A ``Storm`` plays scenes, one after the other, over the addresses it is given. In each a client of a
random transport negotiates, or does not, sends messages right and wrong, whole and cut, reads the
replies or leaves them, and goes as it likes: politely, silently, with a reset, or not at all. Up to
PARKED connections are left open that way. A ``Regular`` is a client that behaves all the while, in
a thread of its own, and notes what it is denied.
"""

import contextlib
import random
import select
import socket
import ssl
import struct
import threading
import time

from . import messages, wire

PARKED = 16
TIMEOUT = 60  # seconds in which the daemon answers a client that behaves
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Address:
    """One way in: a Unix socket's path or a TCP address; with a context, over TLS."""

    def __init__(self, address, tls=None):
        self.address = address
        self.tls = tls

    def connect(self):
        """A connected socket, before the handshake."""
        unix = isinstance(self.address, str)
        sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        sock.settimeout(TIMEOUT)
        sock.connect(self.address)
        return sock

    def secure(self, sock):
        """The socket once TLS has started on it, the flags sent; the socket itself without TLS."""
        if self.tls is None:
            return sock
        sock.sendall(wire.option(wire.STARTTLS))
        reply = receive(sock, wire.REPLY_HEADER.size)
        assert wire.REPLY_HEADER.unpack(reply)[2] == wire.ACK, reply
        return self.tls.wrap_socket(sock, server_hostname="localhost")


def receive(sock, size):
    """Exactly that many bytes; raises ConnectionError at the end of the stream."""
    found = bytearray()
    while len(found) < size:
        piece = sock.recv(min(size - len(found), 1 << 20))
        if not piece:
            raise ConnectionResetError("the end of the stream")
        found += piece
    return bytes(found)


def exchange(sock, kind, data):
    """One option and its replies; whether it was acknowledged."""
    sock.sendall(wire.option(kind, data))
    while True:
        header = receive(sock, wire.REPLY_HEADER.size)
        payload = receive(sock, wire.REPLY_HEADER.unpack(header)[3])
        reply, _, _ = wire.read_option_reply(header + payload, 0, kind)
        if reply == wire.ACK or reply & wire.ERROR_BIT:
            return reply == wire.ACK


def open_export(address, name, framing, *, contexts=()):
    """A socket in the transmission phase."""
    sock = address.connect()
    try:
        assert receive(sock, 18) == b"NBDMAGICIHAVEOPT\0\3"
        sock.sendall(struct.pack(">I", 3))
        sock = address.secure(sock)
        if framing != wire.SIMPLE_REPLIES:
            extended = framing == wire.EXTENDED_HEADERS
            assert exchange(sock, wire.EXTENDED if extended else wire.STRUCTURED, b"")
            if contexts:
                assert exchange(sock, wire.SET_META, wire.queries(name, *contexts))
        assert exchange(sock, wire.GO, wire.info(name)), f"{name} cannot be opened"
    except BaseException:
        sock.close()
        raise
    return sock


class Regular(threading.Thread):
    """Writes and reads back until it is told to stop; ``failure`` is what went wrong."""

    def __init__(self, address, name, size, seed):
        super().__init__(daemon=True)
        self.failure = None
        self.requests = 0
        self._address = address
        self._name = name
        self._content = bytearray(size)
        self._dice = random.Random(seed)
        self._over = threading.Event()

    def run(self):
        try:
            with open_export(self._address, self._name, wire.EXTENDED_HEADERS) as sock:
                while not self._over.wait(0.002):
                    self._round(sock)
                self._check(sock, 0, len(self._content))
                sock.sendall(wire.pack_request(wire.EXTENDED_HEADERS, 0, wire.DISC, 0, 0, 0))
        except BaseException as error:
            self.failure = error

    def stop(self):
        """Let it compare all that it wrote, and end."""
        self._over.set()
        self.join(TIMEOUT)
        assert not self.is_alive(), "the regular client is stuck"
        if self.failure is not None:
            raise self.failure

    def _round(self, sock):
        length = self._dice.choice((512, 4096, 65536))
        offset = self._dice.randrange(len(self._content) - length + 1)
        data = self._dice.randbytes(length)
        self._content[offset : offset + length] = data
        self._call(sock, wire.WRITE, wire.PAYLOAD_LEN, offset, length, data)
        self._check(sock, offset, length)

    def _check(self, sock, offset, length):
        reply = self._call(sock, wire.READ, wire.DF, offset, length, b"")
        found = b"".join(
            bytes(piece) if isinstance(piece, int) else piece for _, piece in reply.pieces
        )
        assert found == self._content[offset : offset + length], "another client's data"

    def _call(self, sock, command, flags, offset, length, data):
        self.requests += 1
        header = wire.pack_request(
            wire.EXTENDED_HEADERS, flags, command, self.requests, offset, length
        )
        sock.sendall(header + data)
        reader = wire.ReplyReader(wire.EXTENDED_HEADERS, {self.requests})
        while (reply := reader.take()) is None:
            piece = sock.recv(1 << 20)
            assert piece, "the daemon has closed the connection"
            reader.feed(piece)
        assert not reply.error, reply
        return reply


class Storm:
    """Plays scenes; ``played`` counts them by name."""

    def __init__(self, addresses, exports, seed):
        self.dice = random.Random(seed)
        self.played = {}
        self._addresses = addresses
        self._exports = exports  # name: size
        self._parked = []
        self._scenes = (
            [self.noise, self.options, self.long_option, self.half_tls, self.crowd]
            + [self.requests] * 5
            + [self.unread, self.half_write, self.whole]
        )

    def play(self, scenes):
        """Play that many."""
        for _ in range(scenes):
            scene = self.dice.choice(self._scenes)
            self.played[scene.__name__] = self.played.get(scene.__name__, 0) + 1
            scene()
            while len(self._parked) > PARKED or (self._parked and self.dice.random() < 0.1):
                self._leave(self._parked.pop(self.dice.randrange(len(self._parked))), park=False)

    def end(self):
        """Let go of all connections."""
        while self._parked:
            self._leave(self._parked.pop(), park=False)

    # How a client goes

    def _leave(self, sock, *, park=True):
        how = self.dice.choice(("close", "close", "reset", "half", "park"))
        if how == "park" and park:
            self._parked.append(sock)
            return
        with contextlib.suppress(OSError):
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "half":
                sock.shutdown(socket.SHUT_WR)
                self._glance(sock)
        sock.close()

    @staticmethod
    def _glance(sock):
        """Take some of the replies, if there are any."""
        sock.settimeout(0.02)
        with contextlib.suppress(OSError):
            sock.recv(1 << 20)

    def _send(self, sock, data):
        """Send in pieces, until the daemon takes no more, or has enough of this client."""
        sock.settimeout(0.2)
        cut = self.dice.choice((1 << 20, 1 << 20, 1000, 28, 7))
        cut = max(cut, len(data) // 200)
        with contextlib.suppress(OSError):
            for at in range(0, len(data), cut):
                sock.sendall(data[at : at + cut])

    # Scenes

    def noise(self):
        """What is no NBD."""
        sock = self.dice.choice(self._addresses).connect()
        self._send(sock, self.dice.randbytes(self.dice.choice((1, 4, 100, 10_000))))
        self._leave(sock)

    def options(self):
        """Options in any order, some wrong; the replies are left unread."""
        sock = self.dice.choice(self._addresses).connect()
        self._send(sock, messages.handshake(self.dice, self.dice.choice(list(self._exports))))
        self._leave(sock)

    def long_option(self):
        """An option that announces more than it brings."""
        sock = self.dice.choice(self._addresses).connect()
        length = self.dice.choice((1 << 16, (1 << 16) + 1, 1 << 20, (1 << 32) - 1))
        kind = self.dice.randrange(1, 13)
        self._send(sock, struct.pack(">I", 3) + wire.option(kind, bytes(100_000), length))
        self._leave(sock)

    def half_tls(self):
        """TLS that does not come to be."""
        address = self.dice.choice(self._addresses)
        sock = address.connect()
        receive(sock, 18)
        start = struct.pack(">I", 3) + wire.option(wire.STARTTLS)
        if self.dice.random() < 0.5:
            self._send(sock, start + self.dice.randbytes(50))
        else:
            sock.sendall(start)
            receive(sock, 20)
            hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
            self._send(sock, self.dice.choice((hello, b"", b"\0" * 5)) + self.dice.randbytes(40))
        self._leave(sock)

    def crowd(self):
        """Many at once, most of which say nothing."""
        crowd = [self.dice.choice(self._addresses).connect() for _ in range(30)]
        for sock in crowd:
            if self.dice.random() < 0.3:
                self._send(sock, struct.pack(">I", 3))
        for sock in crowd:
            self._leave(sock, park=False)

    def requests(self):
        """Requests of every kind, without a look at the replies."""
        sock, framing, size = self._open()
        self._send(sock, self._messages(framing, size, self.dice.choice((1, 5, 30, 100))))
        if self.dice.random() < 0.3:
            self._glance(sock)
        self._leave(sock)

    def unread(self):
        """Many megabytes are asked for, and not taken."""
        sock, framing, size = self._open()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        length = min(size, self.dice.choice((1 << 16, 1 << 20, 32 << 20)))
        read = wire.pack_request(framing, 0, wire.READ, 1, 0, length)
        self._send(sock, read * self.dice.choice((10, 100, 3000)))
        self._leave(sock)

    def half_write(self):
        """A long WRITE of which little comes."""
        sock, framing, size = self._open()
        length = self.dice.choice((100, 300_000, 32 << 20, (32 << 20) + 1, (1 << 32) - 1))
        flags = wire.PAYLOAD_LEN if framing == wire.EXTENDED_HEADERS else 0
        offset = self.dice.choice((0, size - 100))
        header = wire.pack_request(framing, flags, wire.WRITE, 1, offset, length)
        self._send(sock, header + bytes(min(length - 1, self.dice.choice((0, 1000, 2_000_000)))))
        self._leave(sock)

    def whole(self):
        """Requests of which every one is answered, and DISC: nothing but replies comes back."""
        sock, framing, size = self._open()
        expected = {}
        reader = wire.ReplyReader(framing, expected)
        data = []
        for cookie in range(self.dice.choice((1, 10, 40))):
            request, header = messages.request(self.dice, framing, size, cookie, 1 << 16)
            if request.command == wire.READ:
                reader.lengths[cookie] = request.length
            expected[cookie] = request
            data.append(header + self.dice.randbytes(request.payload))
        data.append(wire.pack_request(framing, 0, wire.DISC, 0, 0, 0))
        for piece in self._converse(sock, b"".join(data)):
            reader.feed(piece)
            while (reply := reader.take()) is not None:
                del expected[reply.cookie]
        wire.check(not expected and not reader.amid, f"no reply to {expected}")
        sock.close()

    @staticmethod
    def _converse(sock, data):
        """Send and receive at the same time until the stream ends; yields what comes.

        In one thread: two must not use one TLS connection.
        """
        rest = memoryview(data)
        sock.setblocking(False)
        last = time.monotonic()
        while True:
            moved = False
            if rest:
                with contextlib.suppress(*_WOULD_BLOCK):
                    rest = rest[sock.send(rest[: 1 << 16]) :]
                    moved = True
            with contextlib.suppress(*_WOULD_BLOCK):
                piece = sock.recv(1 << 20)
                if not piece:
                    return
                moved = True
                yield piece
            if moved:
                last = time.monotonic()
            else:
                wire.check(time.monotonic() < last + TIMEOUT, "the daemon is silent")
                select.select([sock], [], [], 0.002)

    def _open(self):
        name, size = self.dice.choice(list(self._exports.items()))
        framing = self.dice.choice(wire.FRAMINGS)
        contexts = ("base:allocation", "qemu:allocation-depth")[: self.dice.randrange(3)]
        sock = open_export(self.dice.choice(self._addresses), name, framing, contexts=contexts)
        return sock, framing, size

    def _messages(self, framing, size, number):
        """Requests, of which the last may be cut; something else among them, now and then."""
        data = []
        for cookie in range(number):
            request, header = messages.request(self.dice, framing, size, cookie, 1 << 18)
            data += [header, self.dice.randbytes(min(request.payload, 1 << 20))]
            if self.dice.random() < 0.01:
                data.append(messages.spoiled(self.dice, header))
        whole = b"".join(data)
        return whole if self.dice.random() < 0.5 else whole[: self.dice.randrange(len(whole) + 1)]
