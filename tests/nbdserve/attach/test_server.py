"""URIs of servers."""

from pathlib import Path

import pytest

from backends.errors import InvalidError
from nbdserve.addresses import TcpAddress, UnixAddress
from nbdserve.attach.device import parse_device
from nbdserve.attach.server import ServerUri, parse_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://h/", ServerUri(TcpAddress("h", 10809), False)),
        ("nbd://h:1/web", ServerUri(TcpAddress("h", 1), False)),
        ("nbds://[::1]:2", ServerUri(TcpAddress("::1", 2), True)),
        ("nbd+unix:///?socket=/a%20b", ServerUri(UnixAddress(Path("/a b")), False)),
        ("nbds+unix:///web?socket=/s", ServerUri(UnixAddress(Path("/s")), True)),
    ],
)
def test_right(text: str, expected: ServerUri) -> None:
    server = parse_uri(text, "web")
    assert server == expected
    assert parse_uri(server.export("web"), "web") == server


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h:10809", "begins with none"),
        ("http://h/", "begins with none"),
        ("nbd://h/other", "another export"),
        ("nbd://", "no host"),
        ("nbd://h:99999/", "[Pp]ort"),
        ("nbd+unix:///web", "socket=PATH"),
        ("nbd+unix://h/?socket=/s", "socket=PATH"),
        ("nbd://h/?socket=/s", "unix"),
        ("nbd://u@h/", "do not have"),
        ("nbd://h/#x", "do not have"),
        ("nbds://h/?tls-certificates=d", "tls-certificates"),
    ],
)
def test_wrong(text: str, words: str) -> None:
    with pytest.raises(InvalidError, match=words):
        parse_uri(text, "web")


def test_devices() -> None:
    assert parse_device("/dev/nbd0") == 0
    assert parse_device("nbd15") == 15
    for text in ("/dev/sda", "/dev/nbd0p1", "nbd01", "nbd", "/dev/nbd-1", "/tmp/nbd0", "nbd²"):
        with pytest.raises(InvalidError, match="no nbd device"):
            parse_device(text)
