"""The fault proxy does what it says, before a small HTTP server that remembers its requests."""

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from .faulty_store.proxy import Fault, FaultProxy

BODY = bytes(range(256)) * 400
KEY = "/bucket/pre/fix/segments/0123/00000000"


class Handler(BaseHTTPRequestHandler):
    """Answers PUT with nothing, GET with BODY, in chunks when it is a listing."""

    protocol_version = "HTTP/1.1"
    puts: ClassVar[list[bytes]] = []

    def do_PUT(self) -> None:
        self.puts.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        if "list-type" in self.path:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
            return
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Handler.puts.clear()
    made = FaultProxy(f"http://127.0.0.1:{server.server_address[1]}")
    yield made
    made.stop()
    server.shutdown()
    server.server_close()


def connect(proxy: FaultProxy) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)


def ask(connection: http.client.HTTPConnection, method: str, path: str = KEY) -> tuple[int, bytes]:
    connection.request(method, path, body=BODY if method == "PUT" else None)
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_without_faults_everything_passes(proxy: FaultProxy) -> None:
    connection = connect(proxy)  # all of it on one connection
    assert ask(connection, "PUT") == (200, b"")
    assert ask(connection, "GET") == (200, BODY)
    assert ask(connection, "HEAD") == (200, b"")
    assert ask(connection, "GET", "/bucket?list-type=2&prefix=pre%2Ffix%2Fpages%2F") == (200, BODY)
    connection.putrequest("PUT", KEY)
    connection.putheader("Content-Length", str(len(BODY)))
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    assert connection.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.send(BODY)
    assert connection.getresponse().read() == b""
    assert Handler.puts == [BODY, BODY]
    assert proxy.counts["passed on", "PUT", "segments"] == 2
    assert proxy.counts["passed on", "LIST", "pages"] == 1
    connection.close()


ERRORS = (OSError, http.client.HTTPException)


@pytest.mark.parametrize("fault", list(Fault))
def test_each_fault(proxy: FaultProxy, fault: Fault) -> None:
    """What becomes of a PUT, a GET and a listing, and of what the server gets."""
    proxy.begin(1.0, weights={fault: 1})
    results: dict[str, tuple[int, bytes] | None] = {}
    listing = "/bucket?list-type=2&prefix=pre%2Ffix%2Fpages%2F"
    for name, method, path in (("put", "PUT", KEY), ("get", "GET", KEY), ("list", "GET", listing)):
        connection = connect(proxy)
        try:
            results[name] = ask(connection, method, path)
        except ERRORS:
            results[name] = None
        connection.close()
    proxy.drain()
    puts = list(Handler.puts)
    answers = {Fault.INTERNAL_ERROR: 500, Fault.SLOW_DOWN: 503}
    if fault in answers:
        assert {found and found[0] for found in results.values()} == {answers[fault]}
        assert puts == []
    elif fault in (Fault.RESET_BEFORE, Fault.RESET_IN_REQUEST):
        assert set(results.values()) == {None}
        assert BODY not in puts
    elif fault in (Fault.LOST_REPLY, Fault.LATE, Fault.RESET_IN_REPLY, Fault.TRUNCATED):
        assert set(results.values()) == {None}
        assert puts == [BODY]
    elif fault is Fault.CORRUPT_REPLY:
        assert results["put"] == (200, b"")
        for name in ("get", "list"):
            status, body = results[name] or (0, b"")
            assert (status, len(body)) == (200, len(BODY))
            assert 1 <= sum(a != b for a, b in zip(body, BODY, strict=True)) <= 3
    elif fault is Fault.CORRUPT_REQUEST:
        assert (results["get"], results["list"]) == ((200, BODY), (200, BODY))
        assert 1 <= sum(a != b for a, b in zip(puts[0], BODY, strict=True)) <= 3
    else:
        assert results == {"put": (200, b""), "get": (200, BODY), "list": (200, BODY)}
    method_and_folder = {key[1:] for key in proxy.counts if key[0] == fault.value}
    assert method_and_folder <= {("PUT", "segments"), ("GET", "segments"), ("LIST", "pages")}
    assert method_and_folder
    proxy.calm()
    connection = connect(proxy)
    assert ask(connection, "GET") == (200, BODY)
    connection.close()


def test_the_same_seed_makes_the_same_choice(proxy: FaultProxy) -> None:
    seen = []
    for _ in range(2):
        proxy.begin(0.5, epoch=7, weights={Fault.INTERNAL_ERROR: 1, Fault.SLOW_DOWN: 1})
        connection = connect(proxy)
        seen.append([ask(connection, "GET")[0] for _ in range(30)])
        connection.close()
    assert seen[0] == seen[1]
    assert set(seen[0]) == {200, 500, 503}


@pytest.mark.parametrize("refuse", [True, False])
def test_an_outage(proxy: FaultProxy, refuse: bool) -> None:
    connection = connect(proxy)
    assert ask(connection, "GET") == (200, BODY)
    proxy.begin_outage(0.3, refuse)
    with pytest.raises(ERRORS):
        ask(connection, "GET")
    connection.close()
    if refuse:
        with pytest.raises(ConnectionError):
            ask(connect(proxy), "GET")
    proxy.end_outage()
    connection = connect(proxy)
    assert ask(connection, "GET") == (200, BODY)
    connection.close()
