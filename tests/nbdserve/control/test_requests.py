"""The control socket as curl and as somebody hostile sees it."""

import json
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from backends.errors import (
    CorruptError,
    ExistsError,
    InUseError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from nbdserve.control import address
from nbdserve.control.client import Client, path
from nbdserve.control.errors import from_document, to_document


def exchange(data: Path, request: bytes) -> bytes:
    """Send bytes as they are; return all that comes back until the connection ends."""
    with address.connect(data) as connection:
        connection.settimeout(30)
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while True:
            try:
                received = connection.recv(65536)
            except ConnectionResetError:
                return answer
            if not received:
                return answer
            answer += received


def ask(data: Path, method: str, target: str, body: bytes = b"") -> tuple[int, Any]:
    """One request; its status and the JSON of its answer."""
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    request = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with address.connect(data) as connection:
        connection.settimeout(30)
        connection.sendall(request)
        answer = b""
        while received := connection.recv(65536):
            answer += received
    headers, _, content = answer.partition(b"\r\n\r\n")
    assert b"application/json" in headers, answer
    return int(headers.split()[1]), json.loads(content)


def test_only_the_owner_may_connect(client: Client, data: Path) -> None:
    status = (data / "control.sock").stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600


def test_sizes_are_numbers_or_texts(client: Client, data: Path) -> None:
    for name, size in (("a", b"1048576"), ("b", b'"1M"')):
        body = b'{"name": "%s", "size": %s}' % (name.encode(), size)
        status, document = ask(data, "POST", "/v1/volumes", body)
        assert (status, document["size"]) == (201, 1 << 20)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"name": "a"}', b'{"size": 4096}',
        b'{"name": 1, "size": 4096}', b'{"name": ["a"], "size": 4096}',
        b'{"name": "a", "size": true}', b'{"name": "a", "size": 1.5}',
        b'{"name": "a", "size": 1e400}', b'{"name": "a", "size": -4096}',
        b'{"name": "a", "size": "ten"}', b'{"name": "a", "size": 0}',
        b'{"name": "a", "size": ' + b"9" * 5000 + b"}",
        b'{"name": "a", "size": ' + b"9" * 100 + b"}",
        b'{"name": "a", "size": null}', b'{"name": "a/b", "size": 4096}',
        b'{"name": "\\u0000", "size": 4096}', b'{"name": "\\ud800", "size": 4096}',
        b'{"name": "", "size": 4096}', b'{"name": "a", "size": 4096, "other": 1}',
        b'{"name": "a", "from": "b"}', b'{"name": "a", "from": 1}',
        b'{"name": "' + b"a" * 100_000 + b'", "size": 4096}',
    ],
)  # fmt: skip
def test_bodies_that_make_no_volume(client: Client, data: Path, body: bytes) -> None:
    status, document = ask(data, "POST", "/v1/volumes", body)
    assert status == 400
    assert document["kind"] == "invalid"
    assert document["error"]
    assert "\n" not in document["error"]
    assert len(document["error"]) < 1000
    assert client.get(path("volumes")) == {"volumes": [], "unreadable": [], "half_restored": []}


@pytest.mark.parametrize(
    "body",
    [
        {}, {"snapshots": []}, {"snapshots": "a@b"}, {"snapshots": ["a"]}, {"snapshots": [1]},
        {"snapshots": ["a@one"], "labels": ["x"]}, {"snapshots": ["a@one"], "labels": {"x": 1}},
        {"snapshots": ["a@one", "a@two"]}, {"snapshots": ["a@one"], "label": {}},
    ],
)  # fmt: skip
def test_bodies_that_make_no_snapshot(client: Client, data: Path, body: dict[str, Any]) -> None:
    client.post(path("volumes"), {"name": "a", "size": 1 << 20})
    status, document = ask(data, "POST", "/v1/snapshots", json.dumps(body).encode())
    assert (status, document["kind"]) == (400, "invalid")
    assert client.get(path("snapshots")) == {"snapshots": []}


def test_a_body_without_bound_is_refused(client: Client, data: Path) -> None:
    status, document = ask(data, "POST", "/v1/volumes", b" " * (1 << 20))
    assert status == 413
    assert document["error"]


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v2/volumes", 404),
        ("GET", "/v1/volumes/", 404),
        ("GET", "/v1/volumes/nothing", 404),
        ("GET", "/v1/volumes/..%2F..%2Fetc", 404),
        ("GET", "/v1/volumes/%00", 404),
        ("GET", "/v1/volumes/nothing/snapshots", 404),
        ("GET", "/v1/volumes/nothing/diff", 400),
        ("GET", "/v1/volumes/nothing/diff?from=a", 404),
        ("DELETE", "/v1/volumes/nothing", 404),
        ("DELETE", "/v1/volumes/nothing?with_snapshots=perhaps", 400),
        ("DELETE", "/v1/volumes/nothing/snapshots/one", 404),
        ("POST", "/v1/volumes/nothing/snapshots/one/pin", 404),
        ("POST", "/v1/imports/nothing/commit", 404),
        ("PUT", "/v1/volumes", 405),
        ("DELETE", "/v1/status", 405),
    ],
)
def test_what_is_not_there(
    client: Client, data: Path, method: str, target: str, status: int
) -> None:
    answered, document = ask(data, method, target)
    assert answered == status
    assert document["error"]
    assert document["kind"] in ("not-found", "invalid")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"", b"\r\n\r\n", b"\0" * 1000, b"NBDMAGICIHAVEOPT", b"GET", b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\n" + b"X: y\r\n" * 100_000,
        b"GET /" + b"a" * 1_000_000,
        b"POST /v1/volumes HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/volumes HTTP/1.1\r\nContent-Length: 100\r\n\r\nshort",
        b"POST /v1/volumes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
    ],
)  # fmt: skip
def test_what_is_not_http(client: Client, data: Path, request_bytes: bytes) -> None:
    try:
        answer = exchange(data, request_bytes)
    except BrokenPipeError:
        answer = b""  # it was refused before all of it was sent
    assert b"Traceback" not in answer
    assert b" 200 " not in answer
    assert client.get(path("status"))["volumes"] == 0


def test_a_diff_is_lines(client: Client) -> None:
    client.post(path("volumes"), {"name": "a", "size": 1 << 20})
    client.post(path("snapshots"), {"snapshots": ["a@one"]})
    with client.stream("GET", path("volumes", "a", "diff", **{"from": "one"})) as answer:
        compared, *extents = answer.lines()
    assert extents == []
    snapshot = client.get(path("volumes", "a", "snapshots"))["snapshots"][0]
    assert compared == {
        "volume": "a",
        "block_size": 4096,
        "from": {"snapshot": "one", **{key: snapshot[key] for key in ("id", "created", "size")}},
        "to": {"snapshot": None, "id": None, "created": None, "size": 1 << 20},
    }


def test_a_deletion_ends_with_a_line_that_says_so(client: Client) -> None:
    client.post(path("volumes"), {"name": "a", "size": 1 << 20})
    client.post(path("snapshots"), {"snapshots": ["a@one"]})
    with client.stream("DELETE", path("volumes", "a", "snapshots", "one")) as answer:
        *progress, last = answer.lines()
    assert last == {"deleted": "a@one"}
    assert all(set(line) == {"done", "total"} for line in progress)
    with pytest.raises(NotFoundError, match="a@one"):
        client.stream("DELETE", path("volumes", "a", "snapshots", "one"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidError, 400), (NotFoundError, 404), (ExistsError, 409), (InUseError, 409),
        (CorruptError, 500), (UnavailableError, 503), (NoSpaceError, 507), (StorageError, 500),
    ],
)  # fmt: skip
def test_errors_are_the_same_at_both_ends(error: type[StorageError], status: int) -> None:
    sent, document = to_document(error("what was\nwrong"))
    assert sent == status
    received = from_document(json.loads(json.dumps(document)))
    assert type(received) is error
    assert str(received) == "what was wrong"


def test_something_else_at_the_socket(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    there.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
    with there, pytest.raises(UnavailableError, match="not nbdserve's"):
        Client(lambda: here).get(path("status"))


def test_a_server_that_dies_before_it_answers() -> None:
    here, there = socket.socketpair()
    there.close()
    with pytest.raises(UnavailableError, match="closed the connection"):
        Client(lambda: here).get(path("status"))


def test_a_map_of_layers(client: Client, data: Path) -> None:
    client.post(path("volumes"), {"name": "a", "size": "1G"})
    empty = client.get(path("volumes", "a", "map"))
    assert (empty["cells"], empty["cell_size"], empty["changed"]) == ([], 1 << 20, None)
    assert [(layer["mapped"], layer["changed"]) for layer in empty["layers"]] == [(0, False)]
    client.post(path("snapshots"), {"snapshots": ["a@s"], "labels": {"backup": "<b>&"}})
    found = client.get(path("volumes", "a", "map", cells="1"))
    assert (found["cell_size"], found["changed"]) == (1 << 30, 0)
    assert (found["since"]["snapshot"], found["since"]["repository_id"]) == ("s", "<b>&")
    assert [layer["snapshots"] for layer in found["layers"]] == [["s"], []]
    assert [layer["changed"] for layer in found["layers"]] == [False, True]
    for query, what in (
        ("cells=x", "'cells' must be a whole number"),
        ("cells=", "'cells' must be a whole number"),
        ("cells=%D9%A3", "'cells' must be a whole number"),
        ("cells=0", "a map has 1 to 4096 cells, not 0"),
        ("cells=4097", "a map has 1 to 4096 cells, not 4097"),
        ("cells=" + "9" * 5000, "'cells' must be a whole number"),
    ):
        status, answer = ask(data, "GET", f"/v1/volumes/a/map?{query}")
        assert (status, answer["error"]) == (400, what)
    status, answer = ask(data, "GET", "/v1/volumes/b/map")
    assert (status, answer["error"]) == (404, "volume b does not exist")
