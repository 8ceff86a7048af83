"""`nbdserve reload` and SIGHUP: what is applied to a running daemon, and to whom."""

import json
import os
import signal
import socket
import ssl
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nbdserve.control import address as control
from nbdserve.control.client import Client, path
from tests.nbdserve.test_daemon import (
    MAKE_CERTIFICATES,
    PROGRAM,
    Start,
    command,
    data,
    read_addresses,
    start,
)

__all__ = ["data", "start"]  # fixtures

HELLO = struct.pack(">I", 3)
GO = struct.pack(">8sII", b"IHAVEOPT", 7, 10) + b"\0\0\0\4disk\0\0"
STARTTLS = struct.pack(">8sII", b"IHAVEOPT", 5, 0)


def connect(address: str) -> socket.socket:
    if address.startswith("unix:"):
        client = socket.socket(socket.AF_UNIX)
        client.connect(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        client = socket.create_connection((host, int(port)))
    client.settimeout(30)
    return client


def receive(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = client.recv(size - len(found))
        assert piece, "the daemon closed the connection"
        found += piece
    return found


def greeted(address: str) -> socket.socket:
    client = connect(address)
    assert receive(client, 18).startswith(b"NBDMAGICIHAVEOPT")
    client.sendall(HELLO)
    return client


class Guest:
    """A client that has an export open."""

    def __init__(self, address: str) -> None:
        self.client = greeted(address)
        self.client.sendall(GO)
        reply = -1
        while reply != 1:
            reply, length = struct.unpack(">II", receive(self.client, 20)[12:])
            receive(self.client, length)
            assert reply < 1 << 31, hex(reply)

    def read(self) -> None:
        """Read a block; the answer must come."""
        self.client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 4096))
        assert receive(self.client, 16)[4:8] == bytes(4)
        receive(self.client, 4096)


class Served:
    """A daemon with a configuration file."""

    def __init__(self, start: Start, data: Path, workers: str = "1") -> None:
        self.data = data
        self.file = data.with_name("nbdserve.toml")
        self.unix = f"unix:{data}/nbd.sock"
        self.workers = workers
        self._start = start

    def start(self, content: str, count: int) -> list[str]:
        self.write(content)
        command("volume", "create", "disk", "--size", "1M", "--data", self.data)
        self.process = self._start(
            *PROGRAM, "serve", "--config", self.file, "--data", self.data, "--workers", self.workers
        )
        return read_addresses(self.process, count)

    def write(self, content: str) -> None:
        self.file.write_text(content)

    def reload(self, content: str) -> dict[str, Any]:
        self.write(content)
        found: dict[str, Any] = json.loads(command("reload", "--data", self.data, "--json"))
        return found

    def refuse(self, content: str | None) -> str:
        if content is None:
            self.file.unlink()
        else:
            self.write(content)
        done = subprocess.run(
            [*PROGRAM, "reload", "--data", self.data], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        return line

    @property
    def listening(self) -> list[str]:
        found: list[str] = json.loads(command("status", "--data", self.data, "--json"))["listening"]
        return found

    def stop(self) -> str:
        self.process.terminate()
        _, error = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, error
        assert "Traceback" not in error
        return str(error)


@pytest.fixture
def served(start: Start, data: Path) -> Served:
    return Served(start, data)


def free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


def test_listeners_come_and_go_and_connections_stay(served: Served, data: Path) -> None:
    other = f"unix:{data}/other.sock"
    first, tcp = served.start(f'listen = ["{served.unix}", "127.0.0.1:0"]\n', 2)
    guests = [Guest(first), Guest(tcp)]
    inode = (data / "nbd.sock").stat().st_ino
    outcome = served.reload(
        f'listen = ["{other}"]\n'
        f'[[listener]]\naddress = "{first}"\nsocket_mode = "0660"\nmax_connections = 3\n'
    )
    assert outcome == {
        "changed": [
            "127.0.0.1:0: not listened on any more; its connections stay",
            f"{other}: listened on",
            f"{first}: 3 connections instead of 2048, mode or group of the file changed",
        ],
        "needs_restart": [],
    }
    assert sorted(served.listening) == sorted([first, other])
    with pytest.raises(ConnectionRefusedError):
        connect(tcp)
    guests.append(Guest(other))
    found = (data / "nbd.sock").stat()
    assert (found.st_ino, found.st_mode & 0o777) == (inode, 0o660)
    guests.append(Guest(first))
    # The place of the guest that was there before counts, too.
    guests.append(Guest(first))
    with connect(first) as refused:
        assert refused.recv(1) == b""
    for guest in guests:
        guest.read()
    served.reload(f'listen = ["{first}"]\n')
    assert not (data / "other.sock").exists()
    assert (data / "nbd.sock").stat().st_mode & 0o777 == 0o600
    for guest in guests:
        guest.read()
    assert command("reload", "--data", data) == "nothing has changed that the daemon goes by\n"
    for guest in guests:
        guest.client.close()
    assert "all requests that had come were answered" in served.stop()


def test_what_is_not_valid_changes_nothing(served: Served, data: Path) -> None:
    (first,) = served.start(f'listen = ["{served.unix}"]\n', 1)
    guest = Guest(first)
    new = data.with_name("new.sock")
    taken = data.with_name("taken.sock")
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind(str(taken))
        holder.listen()
        for content, mentions in (
            ("workers = 0\nx = 1\n", f"{served.file}:2: unknown key 'x'"),
            ("listen = [", f"{served.file}:1: not TOML"),
            (f'listen = ["unix:{new}", "unix:{taken}"]\n', "another server is listening there"),
            (
                f'listen = ["unix:{new}"]\ntls_certificate = "/absent"\ntls_key = "/absent"\n',
                "TLS certificate /absent: No such file",
            ),
            (
                f'[[listener]]\naddress = "{first}"\nsocket_mode = "0666"\n'
                f'[[listener]]\naddress = "unix:{taken}"\n',
                "another server is listening there",
            ),
        ):
            assert mentions in served.refuse(content)
            assert served.listening == [first]
            assert not new.exists()
            assert (data / "nbd.sock").stat().st_mode & 0o777 == 0o600
            guest.read()
            Guest(first).client.close()
    assert "does not exist" in served.refuse(None)
    guest.client.close()
    assert served.stop().count("the configuration stays as it was") == 7


def test_an_address_that_takes_the_place_of_another_on_its_port(served: Served) -> None:
    port = free_port()
    (loopback,) = served.start(f'listen = ["127.0.0.1:{port}"]\n', 1)
    guest = Guest(loopback)
    for address in (f"0.0.0.0:{port}", f"127.0.0.1:{port}"):
        outcome = served.reload(f'listen = ["{address}"]\n')
        assert f"{address}: listened on" in outcome["changed"]
        assert served.listening == [address]
        Guest(loopback).read()
        guest.read()
        # The port is shared with nobody else.
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("0.0.0.0", port))
    guest.client.close()
    served.stop()


def test_tls_files_are_read_again(served: Served, tmp_path: Path) -> None:
    for name in ("old", "new"):
        subprocess.run([MAKE_CERTIFICATES, tmp_path / name], check=True)

    def shown(address: str) -> bytes:
        """The certificate that a new client is shown."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client = greeted(address)
        client.sendall(STARTTLS)
        receive(client, 20)
        with context.wrap_socket(client) as encrypted:
            found = encrypted.getpeercert(binary_form=True)
        assert found is not None
        return found

    def certificate(name: str) -> bytes:
        return ssl.PEM_cert_to_DER_cert(
            (tmp_path / name / "server-cert.pem").read_text().partition("-----END")[0]
            + "-----END CERTIFICATE-----\n"
        )

    content = (
        f'tls = "optional"\nlisten = ["{served.unix}"]\n'
        f'tls_certificate = "{tmp_path}/used-cert.pem"\ntls_key = "{tmp_path}/used-key.pem"\n'
    )

    def use(name: str, *parts: str) -> None:
        for part in parts:
            text = (tmp_path / name / f"server-{part}.pem").read_text()
            (tmp_path / f"used-{part}.pem").write_text(text)

    use("old", "cert", "key")
    (first,) = served.start(content, 1)
    guest = Guest(first)
    assert shown(first) == certificate("old")
    use("new", "cert")
    assert "does not belong to the certificate" in served.refuse(content)
    assert shown(first) == certificate("old")
    use("new", "key")
    assert served.reload(content)["changed"] == [f"{first}: TLS files read again"]
    assert shown(first) == certificate("new")
    guest.read()
    guest.client.close()
    served.stop()


def test_sighup_and_what_needs_a_restart(start: Start, data: Path) -> None:
    """The logs of workers change, too; SIGHUP reaches all processes when a unit is told of it."""
    served = Served(start, data, workers="2")
    (first,) = served.start(f'listen = ["{served.unix}"]\n', 1)
    guest = Guest(first)
    served.write(
        f'listen = ["{served.unix}"]\nlog_format = "json"\nhandshake_timeout = 7\n'
        '[[export]]\nname = "other*"\nmax_connections = 1\n'
    )
    workers = json.loads(command("status", "--data", data, "--json"))["workers"]
    for process in (served.process.pid, *(worker["pid"] for worker in workers)):
        os.kill(process, signal.SIGHUP)
    assert served.process.stderr is not None
    for line in served.process.stderr:
        if "the configuration" in line or '"changed: logs' in line:
            break
    guest.client.sendall(b"no request".ljust(28))
    while guest.client.recv(4096):
        pass
    lines = [json.loads(line) for line in served.stop().splitlines()]
    (dropped,) = [line for line in lines if "connection dropped" in line["message"]]
    assert dropped["process"] == "worker"


def test_without_a_daemon(data: Path) -> None:
    command("volume", "create", "disk", "--size", "1M", "--data", data)
    done = subprocess.run(
        [*PROGRAM, "reload", "--data", data], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"nbdserve: no daemon serves {data}\n")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_end_tells_what_was_not_answered(start: Start, data: Path, workers: str) -> None:
    """A client that does not take its replies has them until drain_seconds are over."""
    served = Served(start, data, workers)
    (first,) = served.start(f'listen = ["{served.unix}"]\n', 1)
    assert served.reload(f'listen = ["{served.unix}"]\ndrain_seconds = 1\n')["changed"] == [
        "drain_seconds: 1 instead of 30"
    ]
    guest = Guest(first)
    guest.read()
    guest.client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 1 << 20) * 64)
    receive(guest.client, 4096)
    served.process.terminate()
    _, error = served.process.communicate(timeout=60)
    assert served.process.returncode == 1
    lines = error.splitlines()
    line = "nbdserve: stopped, but some requests were not answered within 1 seconds"
    assert lines[-1] == line
    assert "export=disk: dropped, its requests took too long" in error
    assert "Traceback" not in error
    guest.client.close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_limits_hold_for_open_connections_and_what_watches_needs_a_restart(
    start: Start, data: Path, workers: str
) -> None:
    served = Served(start, data, workers)
    listen = f'listen = ["{served.unix}"]\n'
    (address,) = served.start(listen, 1)
    guest = Guest(address)
    guest.read()
    outcome = served.reload(
        f'{listen}http = "127.0.0.1:0"\nslow_request_seconds = 1\n'
        '[[export]]\nname = "d*"\niops = 2\niops_burst = 2\n[space]\nmax_overcommit = 0.5\n'
    )
    assert outcome == {
        "changed": ["exports", "space"],
        "needs_restart": [
            "http: 127.0.0.1:0 instead of none",
            "slow_request_seconds: 1.0 instead of 10.0",
        ],
    }
    limits = json.loads(command("volume", "limit", "disk", "--data", data, "--json"))
    assert (limits["iops"], limits["source"]) == (2, "configuration")
    for _ in range(4):
        guest.read()
    measured = Client(lambda: control.connect(data)).get(path("measurements"))
    assert measured["exports"][0]["throttled_seconds"] > 0
    status = json.loads(command("status", "--data", data, "--json"))
    assert status["max_overcommit"] == 0.5
    guest.client.close()
    served.stop()
