"""The daemon under a service manager: passed sockets, notifications, the watchdog."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.nbdserve.test_daemon import PROGRAM, Start, command, data, read_addresses, start
from tests.nbdserve.test_reload import Guest, connect, receive

__all__ = ["data", "start"]  # fixtures

# Gives a program the descriptors that it is told, from 3 on, as a service manager does.
LAUNCH = """
import os, sys
descriptors = [int(word) for word in sys.argv[1].split(",") if word]
for number, descriptor in enumerate(os.dup(found) for found in descriptors):
    os.dup2(descriptor, 100 + number)
for number in range(len(descriptors)):
    os.dup2(100 + number, 3 + number)
    os.close(100 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(descriptors)))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """Starts the daemon with sockets of its own, and hears what it tells."""

    def __init__(self, start: Start, data: Path) -> None:
        self._start = start
        self.data = data
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind(str(data.with_name("notify")))
        self.sockets: list[socket.socket] = []
        self.process: subprocess.Popen[str]

    def listen(self, path: Path) -> tuple[str, str]:
        """Open a Unix socket and a TCP port to pass on."""
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(path))
        unix.listen()
        tcp = socket.create_server(("127.0.0.1", 0))
        self.sockets += [unix, tcp]
        return f"unix:{path}", f"127.0.0.1:{tcp.getsockname()[1]}"

    def launch(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        more = {"NOTIFY_SOCKET": str(self.notices.getsockname()), **(environment or {})}
        numbers = [found.fileno() for found in self.sockets]
        for number in numbers:
            os.set_inheritable(number, True)
        words = [f"{name}={value}" for name, value in more.items()]
        launch = [sys.executable, "-c", LAUNCH, ",".join(map(str, numbers))]
        self.process = self._start(
            "env", *words, *launch, *PROGRAM, "serve", "--data", self.data, *arguments, keep=numbers
        )
        return self.process

    def hear(self) -> list[str]:
        """The lines of the next notice."""
        self.notices.settimeout(60)
        return self.notices.recv(4096).decode().splitlines()

    def stop(self) -> str:
        self.process.terminate()
        _, error = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, error
        return str(error)


@pytest.fixture
def manager(start: Start, data: Path) -> Iterator[Manager]:
    manager = Manager(start, data)
    yield manager
    for found in (manager.notices, *manager.sockets):
        found.close()


def test_clients_wait_while_it_is_restarted(manager: Manager, data: Path) -> None:
    """Sockets and file stay; who connects while there is no daemon is served by the next."""
    path = data.with_name("nbd.sock")
    unix, tcp = manager.listen(path)
    own = f"unix:{data}/own.sock"
    listen = ["--listen", unix, "--listen", tcp, "--listen", own, "--workers", "2"]
    command("volume", "create", "disk", "--size", "1M", "--data", data)
    early = connect(unix)
    waiting = [early]
    for _ in range(2):
        process = manager.launch(*listen)
        assert read_addresses(process, 3) == [unix, tcp, own]
        for client in waiting:
            assert receive(client, 18).startswith(b"NBDMAGICIHAVEOPT")
            client.close()
        guests = [Guest(address) for address in (unix, tcp, own)]
        for guest in guests:
            guest.read()
        process.terminate()
        for guest in guests:
            assert guest.client.recv(1) == b""
            guest.client.close()
        assert process.wait(60) == 0
        assert path.exists() and not (data / "own.sock").exists()
        waiting = [connect(address) for address in (unix, tcp)]
    for client in waiting:
        client.close()


def test_sockets_that_the_configuration_does_not_name(manager: Manager, data: Path) -> None:
    unix, tcp = manager.listen(data.with_name("nbd.sock"))
    file = data.with_name("nbdserve.toml")
    file.write_text(f'listen = ["{unix}"]\n')
    process = manager.launch("--config", file, "--workers", "1")
    read_addresses(process, 1)
    command("volume", "create", "disk", "--size", "1M", "--data", data)
    waiting = connect(tcp)
    guest = Guest(unix)
    # A reload takes it, and gives it back.
    file.write_text(f'listen = ["{tcp}"]\n')
    command("reload", "--data", data)
    assert receive(waiting, 8) == b"NBDMAGIC"
    waiting.close()
    waiting = connect(unix)
    file.write_text(f'listen = ["{tcp}", "{unix}"]\n')
    command("reload", "--data", data)
    assert receive(waiting, 8) == b"NBDMAGIC"
    waiting.close()
    guest.read()
    guest.client.close()
    log = manager.stop()
    assert f"the service manager listens on {tcp}, which the configuration does not name" in log
    assert f"the service manager goes on listening on {unix}" in log


def test_what_is_passed_must_be_a_listening_socket(manager: Manager) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram, socket.socket() as idle:
        for found in (datagram, idle):
            manager.sockets = [found]
            out, error = manager.launch().communicate(timeout=60)
            assert (manager.process.returncode, out) == (1, "")
            (line,) = error.splitlines()
            assert "descriptor 3 (without a name)" in line and "no listening stream socket" in line


def test_what_the_service_manager_is_told(manager: Manager, data: Path) -> None:
    unix = f"unix:{data}/nbd.sock"
    before = time.clock_gettime(time.CLOCK_MONOTONIC)
    read_addresses(manager.launch("--listen", unix, "--workers", "1"), 1)
    assert manager.hear()[0] == "READY=1"
    for reload in (
        lambda: command("reload", "--data", data),
        lambda: manager.process.send_signal(signal.SIGHUP),
    ):
        reload()
        reloading, at, _ = manager.hear()
        assert reloading == "RELOADING=1"
        assert at.startswith("MONOTONIC_USEC=")
        now = time.clock_gettime(time.CLOCK_MONOTONIC)
        assert before < int(at.partition("=")[2]) / 1e6 < now
        assert manager.hear()[0] == "READY=1"
    manager.process.terminate()
    assert manager.hear()[0] == "STOPPING=1"
    assert manager.process.wait(60) == 0


def test_a_daemon_that_hangs_tells_nothing(manager: Manager, data: Path) -> None:
    environment = {"WATCHDOG_USEC": "500000"}
    process = manager.launch(
        "--listen", f"unix:{data}/nbd.sock", "--workers", "1", environment=environment
    )
    read_addresses(process, 1)
    while manager.hear() != ["WATCHDOG=1"]:
        pass
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    while select.select([manager.notices], [], [], 0)[0]:
        manager.hear()
    assert not select.select([manager.notices], [], [], 1)[0]
    process.send_signal(signal.SIGCONT)
    while manager.hear() != ["WATCHDOG=1"]:
        pass
