"""The daemon's configuration: addresses, the file, and which source wins."""

import os
from pathlib import Path

import pytest

from backends.errors import InvalidError, NotFoundError
from nbdserve.configuration import (
    KEYS,
    Address,
    Settings,
    TcpAddress,
    TlsConfiguration,
    TlsSettings,
    UnixAddress,
    combine,
    parse_address,
    read_file,
)
from nbdserve.protocol.handshake import TlsMode


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10809", TcpAddress("127.0.0.1", 10809)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("[::1]:65535", TcpAddress("::1", 65535)),
        ("unix:/run/nbd.sock", UnixAddress(Path("/run/nbd.sock"))),
        ("unix:relative:name", UnixAddress(Path("relative:name"))),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "127.0.0.1", "127.0.0.1:", ":10809", "host:port", "host:-1", "host:65536",
        "host:1_0", "host:\u0661", "::1:10809", "unix:", "unix:\0", "10809", "[]:1",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidError) as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("example.org", False),
    ],
)  # fmt: skip
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert TcpAddress(host, 1).is_loopback is loopback


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('data = "/from/file"\nlisten = ["unix:/a", "[::1]:1"]\nlog_level = "error"\n')
    file = read_file(path)
    alone = combine(Settings(), file)
    assert alone.data == Path("/from/file")
    assert alone.listen == (UnixAddress(Path("/a")), TcpAddress("::1", 1))
    assert alone.log_level == "error"
    both = combine(Settings(Path("/from/line"), ("unix:/b",), "debug"), file)
    assert both.data == Path("/from/line")
    assert both.listen == (UnixAddress(Path("/b")),)
    assert both.log_level == "debug"


def test_defaults() -> None:
    configuration = combine(Settings(data=Path("/data")), Settings())
    assert [str(address) for address in configuration.listen] == [
        "127.0.0.1:10809",
        "unix:/data/nbd.sock",
    ]
    assert configuration.log_level == "info"
    with pytest.raises(InvalidError, match="--data"):
        combine(Settings(), Settings())


FILES = TlsSettings(certificate=Path("/cert"), key=Path("/key"))


def with_tls(command_line: TlsSettings, file: TlsSettings) -> TlsConfiguration | None:
    return combine(Settings(Path("/data"), tls=command_line), Settings(tls=file)).tls


def test_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text('data = "/x"\nworkers = 7\n')
    assert combine(Settings(), read_file(path)).workers == 7
    assert combine(Settings(workers=1), read_file(path)).workers == 1
    for cores, workers in ((1, 1), (2, 2), (4, 4), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert combine(Settings(Path("/x")), Settings()).workers == workers


def test_tls_is_required_once_there_is_a_certificate(tmp_path: Path) -> None:
    nothing = TlsSettings()
    assert with_tls(nothing, nothing) is None
    required = TlsConfiguration(TlsMode.REQUIRED, Path("/cert"), Path("/key"), None)
    assert with_tls(FILES, nothing) == with_tls(nothing, FILES) == required
    path = tmp_path / "file"
    path.write_text(
        'tls = "optional"\ntls_certificate = "/cert"\ntls_key = "/key"\ntls_client_ca = "/ca"\n'
    )
    file = read_file(path).tls
    assert with_tls(nothing, file) == TlsConfiguration(
        TlsMode.OPTIONAL, Path("/cert"), Path("/key"), Path("/ca")
    )
    line = TlsSettings("required", key=Path("/other"))
    assert with_tls(line, file) == TlsConfiguration(
        TlsMode.REQUIRED, Path("/cert"), Path("/other"), Path("/ca")
    )
    assert with_tls(TlsSettings("off"), file) is None


@pytest.mark.parametrize(
    "settings",
    [
        TlsSettings("required"),
        TlsSettings("optional"),
        TlsSettings(certificate=Path("/cert")),
        TlsSettings(key=Path("/key")),
        TlsSettings(client_ca=Path("/ca")),
        TlsSettings("required", key=Path("/key"), client_ca=Path("/ca")),
    ],
)
def test_tls_without_a_certificate_or_key_says_what_to_give(settings: TlsSettings) -> None:
    with pytest.raises(InvalidError, match="--tls-certificate and --tls-key"):
        with_tls(settings, TlsSettings())


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        ("port = 1", ["'port'", *KEYS]),
        ("data = 1", ["'data'", "string"]),
        ('data = ""', ["'data'"]),
        ('listen = "127.0.0.1:1"', ["'listen'", "list"]),
        ("listen = []", ["'listen'"]),
        ("listen = [1]", ["'listen'"]),
        ("workers = 0", ["'workers'", "from 1 to 64"]),
        ("workers = 65", ["'workers'", "from 1 to 64"]),
        ("workers = true", ["'workers'", "from 1 to 64"]),
        ('workers = "2"', ["'workers'", "from 1 to 64"]),
        ("log_level = true", ["'log_level'", "debug, info, warning, error"]),
        ('log_level = "loud"', ["'log_level'", "debug, info, warning, error"]),
        ('tls = "yes"', ["'tls'", "off, optional, required"]),
        ("tls = true", ["'tls'", "off, optional, required"]),
        ("tls_key = 1", ["'tls_key'", "file"]),
        ("data = ", ["TOML"]),
        ("[data]\nx = 1", ["'data'"]),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, content: str, mentions: list[str]) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(InvalidError) as caught:
        read_file(path)
    for word in [str(path), *mentions]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        read_file(tmp_path / "absent")
    with pytest.raises(InvalidError, match=str(tmp_path)):
        read_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidError, match="binary"):
        read_file(tmp_path / "binary")
