"""`nbdserve attach` where it cannot be: one line says why."""

from pathlib import Path

import pytest

from backends.errors import InvalidError
from nbdserve.addresses import Address, TcpAddress, UnixAddress
from nbdserve.attach import attaching
from nbdserve.cli import attach as attach_command
from nbdserve.cli.application import run

TLS = """\
tls_certificate = "/tls/cert.pem"
tls_key = "/tls/key.pem"
"""
OPEN = """\
[[listener]]
address = "unix:/b"
tls = "off"
"""


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["attach"], 2, "VOL"),
        (["attach", "no/name"], 1, "no/name"),
        (["attach", "web", "/dev/sda", "--uri", "nbd://h/"], 1, "no nbd device"),
        (["attach", "web", "--uri", "http://h/"], 1, "nbd://"),
        (["attach", "web", "--uri", "nbd://h/", "--tls-ca", "f"], 2, "nbds://"),
        (["attach", "web", "--uri", "nbd://h/", "--block-size", "1024"], 2, "4096"),
        (["attach", "web", "--uri", "nbds://h/", "--tls-ca", "/none"], 1, "/none"),
        (["attach", "web", "--uri", "nbd://h/", "--dead-timeout", "0"], 2, "dead-timeout"),
        (["attach", "web", "--data", "/none"], 1, "does not exist"),
        (["detach"], 2, "VOL"),
    ],
)
def test_wrong(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == status
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("command", [["attach", "web", "--uri", "nbd://h/"], ["detach", "web"]])
def test_without_root(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attaching.os, "geteuid", lambda: 1000)
    assert run(command) == 1
    assert "needs root" in capsys.readouterr().err


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this machine has the nbd driver")
@pytest.mark.parametrize("command", [["attach", "web", "--uri", "nbd://h/"], ["detach", "web"]])
def test_without_the_driver(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attaching.os, "geteuid", lambda: 0)
    assert run(command) == 1
    assert "modprobe nbd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", UnixAddress(Path("/DATA/nbd.sock"))),
        ("data = '/elsewhere'\nlisten = ['unix:/run/n.sock']", UnixAddress(Path("/DATA/nbd.sock"))),
        ("listen = ['127.0.0.1:1', 'unix:/run/n.sock']", UnixAddress(Path("/run/n.sock"))),
        ("data = '/DATA'\nlisten = ['0.0.0.0:1', '[::1]:2']", TcpAddress("::1", 2)),
        (f"{TLS}[[listener]]\naddress = 'unix:/a'\n", None),
        ("listen = ['0.0.0.0:1']", None),
        (f"{TLS}[[listener]]\naddress = 'unix:/a'\n{OPEN}", UnixAddress(Path("/b"))),
    ],
)
def test_the_daemon_of_this_host(
    text: str, expected: Address | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --uri it is found where the configuration file has it listen."""
    data = tmp_path / "data"
    data.mkdir()
    configuration = tmp_path / "nbdserve.toml"
    configuration.write_text(text.replace("/DATA", str(data)))
    monkeypatch.setenv("NBDSERVE_CONFIG", str(configuration))
    monkeypatch.setattr(attach_command, "data_directory", lambda: data)
    if expected is None:
        with pytest.raises(InvalidError, match="give --uri"):
            attach_command._local_server()
        return
    address = attach_command._local_server().address
    assert str(address) == str(expected).replace("/DATA", str(data))
