"""Just enough of HTTP/1.1 to pass requests and replies of S3 on, each as a whole.

Bodies are delimited by Content-Length or chunked; what has neither, in a reply, ends with the
connection. ``Expect: 100-continue`` is answered here, as soon as the head was read.
"""

import socket
import struct
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, unquote, urlsplit

LONGEST_LINE = 1 << 16
PIECE = 1 << 16


class EndOfStreamError(OSError):
    """The peer has gone."""


@dataclass(frozen=True)
class Message:
    """``first`` is the request line or status line; names of ``headers`` are as they came."""

    first: bytes
    headers: tuple
    body: bytes = b""

    def header(self, name):
        """Return the value of a header, b"" when there is none."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), b"")

    def without(self, name):
        """Return the message without a header."""
        kept = tuple(pair for pair in self.headers if pair[0].lower() != name.lower())
        return replace(self, headers=kept)

    @property
    def method(self):
        """Of a request."""
        return self.first.split(b" ")[0].decode()

    @property
    def status(self):
        """Of a reply."""
        return int(self.first.split(b" ")[1])

    @property
    def is_chunked(self):
        """Whether the body comes in chunks."""
        return self.header(b"Transfer-Encoding").lower() == b"chunked"

    @property
    def must_close(self):
        """Whether the connection ends with this message."""
        return self.header(b"Connection").lower() == b"close"

    def head(self):
        """Return what comes before the body."""
        lines = [self.first, *(name + b": " + value for name, value in self.headers)]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def wire_body(self):
        """Return the body as it is sent."""
        if not self.is_chunked:
            return self.body
        pieces = [self.body[at : at + PIECE] for at in range(0, len(self.body), PIECE)]
        return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])


def name_of(request, folders):
    """Return what a request is about: (method, folder of the repository), LIST being a method."""
    target = urlsplit(request.first.split(b" ")[1].decode())
    query = parse_qs(target.query)
    listing = request.method == "GET" and "list-type" in query
    key = query.get("prefix", [""])[0] if listing else unquote(target.path)
    found = [part for part in key.split("/") if part in folders]
    return "LIST" if listing else request.method, found[0] if found else "-"


class Wire:
    """One connection, read and written by one thread."""

    def __init__(self, sock):
        self.sock = sock
        self._buffer = bytearray()

    def read_head(self):
        """Return a message without its body."""
        first = self._line()
        while not first:  # RFC 9112, 2.2: empty lines before a request are to be ignored
            first = self._line()
        headers = []
        while line := self._line():
            name, _, value = line.partition(b":")
            headers.append((name.strip(), value.strip()))
        return Message(first, tuple(headers))

    def read_body(self, head, *, of_reply_to=None):
        """Return the message with its body; ``of_reply_to`` is the method that it answers."""
        if of_reply_to is not None and (
            of_reply_to == "HEAD" or head.status in (204, 304) or head.status < 200
        ):
            return head
        if head.is_chunked:
            return replace(head, body=self._chunks())
        length = head.header(b"Content-Length")
        if length:
            return replace(head, body=self.exactly(int(length)))
        if of_reply_to is None:
            return head
        return replace(head, body=self._rest())

    def exactly(self, count):
        """Return so many bytes."""
        while len(self._buffer) < count:
            self._receive()
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def send(self, data):
        """Send all of it."""
        self.sock.sendall(data)

    def reset(self):
        """Close so that the peer gets a reset, whatever is under way."""
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            self.sock.close()

    def close(self):
        """Close; the peer reads what was sent, and then the end."""
        self.sock.close()

    def _line(self):
        while b"\n" not in self._buffer:
            if len(self._buffer) > LONGEST_LINE:
                raise ValueError("a line of HTTP is too long")
            self._receive()
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line.rstrip(b"\r")

    def _chunks(self):
        body = bytearray()
        while length := int(self._line().split(b";")[0], 16):
            body += self.exactly(length)
            self._line()
        while self._line():
            pass  # trailers
        return bytes(body)

    def _rest(self):
        try:
            while True:
                self._receive()
        except EndOfStreamError:
            body = bytes(self._buffer)
            self._buffer.clear()
            return body

    def _receive(self):
        data = self.sock.recv(1 << 18)
        if not data:
            raise EndOfStreamError("the peer closed the connection")
        self._buffer += data
