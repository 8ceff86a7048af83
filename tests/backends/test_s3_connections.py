"""What arrives from an S3 server is acknowledged at once."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from backends import s3_connections
from backends.s3_objects import S3ObjectStore


class Replies(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replies) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in (
            ("AWS_ENDPOINT_URL", url),
            ("AWS_ACCESS_KEY_ID", "someone"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_CONFIG_FILE", "/nonexistent"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent"),
            ("NO_PROXY", "127.0.0.1"),
        ):
            monkeypatch.setenv(name, value)
        yield url
        server.shutdown()


def test_each_reply_is_waited_for_with_quick_acknowledgements(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = []
    prepare = s3_connections._acknowledge_at_once

    def note(connection: s3_connections._Connection) -> None:
        prepare(connection)
        waiting.append(connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK))

    monkeypatch.setattr(s3_connections, "_acknowledge_at_once", note)
    store = S3ObjectStore("bucket")
    for _ in range(3):
        assert store.get("key", 10) == b"hello"
    assert waiting == [1, 1, 1]


def test_encrypted_connections_do_it_too(endpoint: str) -> None:
    client = S3ObjectStore("bucket")._client
    manager = client._endpoint.http_session._manager  # type: ignore[attr-defined]
    for url, expected in (
        ("http://host", s3_connections._Connection),
        ("https://host", s3_connections._SecureConnection),
    ):
        assert manager.connection_from_url(url).ConnectionCls is expected


def test_a_client_of_another_make_is_left_alone() -> None:
    s3_connections.use_prompt_connections(object())
