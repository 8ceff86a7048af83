"""The blocking client of the control socket.

Every call is a connection of its own: claims are connections, and a server that wants to leave
waits for connections. The caller gives the way to connect, so that it may look for the daemon
anew, or become the server itself, at each call.
"""

import http.client
import json
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlencode

from backends.errors import UnavailableError
from nbdserve.control.errors import from_document

Document = dict[str, Any]
Connect = Callable[[], socket.socket]

_LETTING_GO = 10.0
"""Seconds that a server may take to see that a stream is no longer wanted."""

_CUT_OFF = "the daemon closed the connection before it had answered; look whether it still runs"


def path(*parts: str, **query: str | None) -> str:
    """A path under /v1 with every part quoted; queries that are None are left out."""
    quoted = "/".join(quote(part, safe="") for part in parts)
    given = {name: value for name, value in query.items() if value is not None}
    return f"/v1/{quoted}" + (f"?{urlencode(given)}" if given else "")


class _Connection(http.client.HTTPConnection):
    def __init__(self, connect: Connect) -> None:
        super().__init__("localhost")
        self._open = connect

    def connect(self) -> None:
        self.sock = self._open()


class Answer:
    """An answer of JSON lines, read as they come; use it as a context manager."""

    def __init__(self, response: http.client.HTTPResponse, monitor: socket.socket) -> None:
        self._response = response
        self._monitor = monitor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._give_up()
        self._response.close()
        self._monitor.close()

    def lines(self) -> Iterator[Document]:
        """The lines up to the end; raises the error that the last line says."""
        while True:
            document = self._line()
            if document is None:
                return
            yield document

    def first(self) -> Document:
        """The first line, which says what was claimed."""
        document = self._line()
        if document is None:
            raise UnavailableError(_CUT_OFF)
        return document

    def check_held(self) -> None:
        """Raise UnavailableError when the server has ended the claim that this answer is."""
        if select.select([self._monitor], [], [], 0)[0]:
            raise UnavailableError(
                "the daemon stopped meanwhile and has given up what this command needs of it; "
                "run the command again"
            )

    def _give_up(self) -> None:
        """Say that nothing more is wanted, and wait until the server has let go of the claim."""
        try:
            self._monitor.settimeout(_LETTING_GO)
            self._monitor.shutdown(socket.SHUT_WR)
            while self._monitor.recv(1 << 16):
                pass
        except OSError:
            return  # the server has gone already, or is stuck

    def _line(self) -> Document | None:
        try:
            line = self._response.readline()
        except (http.client.HTTPException, OSError) as error:
            raise UnavailableError(_CUT_OFF) from error
        if not line:
            return None
        return _checked(_parse(line))


class Client:
    """Requests over the sockets that ``connect`` returns."""

    def __init__(self, connect: Connect) -> None:
        self._open = connect

    def get(self, path: str) -> Document:
        return self._whole("GET", path, None)

    def post(self, path: str, body: Mapping[str, object]) -> Document:
        return self._whole("POST", path, body)

    def delete(self, path: str) -> Document:
        return self._whole("DELETE", path, None)

    def stream(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Answer:
        """An answer that comes in lines; errors before the first line are raised here."""
        connection = _Connection(self._open)
        connection.connect()
        monitor = connection.sock.dup()  # the response takes over the socket itself
        try:
            response = _send(connection, method, path, body)
            if response.status >= http.client.BAD_REQUEST:
                _checked(_parse(_read(response)))
            return Answer(response, monitor)
        except BaseException:
            monitor.close()
            connection.close()
            raise

    def _whole(self, method: str, path: str, body: Mapping[str, object] | None) -> Document:
        connection = _Connection(self._open)
        connection.connect()
        try:
            return _checked(_parse(_read(_send(connection, method, path, body))))
        finally:
            connection.close()


def _send(
    connection: _Connection, method: str, path: str, body: Mapping[str, object] | None
) -> http.client.HTTPResponse:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Connection": "close"} | (
        {} if data is None else {"Content-Type": "application/json"}
    )
    try:
        connection.request(method, path, data, headers)
        return connection.getresponse()
    except (http.client.HTTPException, OSError) as error:
        raise UnavailableError(_CUT_OFF) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read()
    except (http.client.HTTPException, OSError) as error:
        raise UnavailableError(_CUT_OFF) from error


def _parse(text: bytes) -> Document:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UnavailableError("the control socket answered something that is not nbdserve's")
    return document


def _checked(document: Document) -> Document:
    if "error" in document and "kind" in document:
        raise from_document(document)
    return document
