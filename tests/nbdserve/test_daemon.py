"""`nbdserve serve` as a process: what it says, what it refuses, how it ends."""

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

Start = Callable[..., subprocess.Popen[str]]
PROGRAM = [sys.executable, "-m", "nbdserve"]
PROJECT = Path(__file__).resolve().parents[2]
MAKE_CERTIFICATES = PROJECT / "scripts" / "make-test-certificates"


@pytest.fixture
def data() -> Iterator[Path]:
    """A path short enough for a socket's address."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "data"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs, which get the descriptors to ``keep``; all of them are ended."""
    processes: list[subprocess.Popen[str]] = []

    def start(*command: str | Path, keep: Sequence[int] = ()) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "NBDSERVE_DATA"}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=keep,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def serve(start: Start, data: Path, *listen: str) -> list[str]:
    """Start a daemon; return where it says that it listens."""
    arguments = [word for address in listen for word in ("--listen", address)]
    process = start(*PROGRAM, "serve", "--data", data, *arguments)
    return read_addresses(process, len(listen))


def read_addresses(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(count)]
    assert all(line.startswith("listening on ") for line in said), (said, process.poll())
    return [line.removeprefix("listening on ").strip() for line in said]


def command(*arguments: str | Path) -> str:
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def refusal(process: subprocess.Popen[str]) -> str:
    """The one line of a daemon that does not start."""
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1, (out, error)
    assert out == ""
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("nbdserve: ")
    return lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_leaves_nothing(
    start: Start, data: Path, number: signal.Signals
) -> None:
    unix = f"unix:{data}/nbd.sock"
    process = start(*PROGRAM, "serve", "--data", data, "--listen", "127.0.0.1:0", "--listen", unix)
    tcp, second = read_addresses(process, 2)
    assert second == unix
    host, port = tcp.split(":")
    with socket.create_connection((host, int(port))) as client:
        assert client.recv(16) == b"NBDMAGICIHAVEOPT"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{data}/nbd.sock")
        assert client.recv(16) == b"NBDMAGICIHAVEOPT"
    status = json.loads(command("status", "--data", data, "--json"))
    assert status["daemon"] is True
    assert status["pid"] == process.pid
    assert status["listening"] == [tcp, unix]
    assert f"runs as process {process.pid}" in command("status", "--data", data)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in error
    assert not [entry for entry in data.iterdir() if "sock" in entry.name]


def test_commands_speak_to_the_daemon(start: Start, data: Path) -> None:
    serve(start, data, f"unix:{data}/nbd.sock")
    command("volume", "create", "a", "--size", "1M", "--data", data)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{data}/control.sock")
        client.sendall(b"GET /v1/volumes/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = client.makefile("rb").read()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["size"] == 1 << 20


def test_what_is_no_http_is_one_line_of_the_log(start: Start, data: Path) -> None:
    unix = f"unix:{data}/nbd.sock"
    process = start(*PROGRAM, "serve", "--data", data, "--log-level", "warning", "--listen", unix)
    read_addresses(process, 1)
    for request in (b"NBDMAGICIHAVEOPT\0\0", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{data}/control.sock")
            client.sendall(request)
            assert client.recv(65536).startswith(b"HTTP/1.0 400 ")
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = error.splitlines()
    assert 2 <= len(lines) <= 3  # a method that does not exist is no more than a debug line
    assert all("control socket: 400" in line for line in lines), error


def test_one_daemon_a_directory(start: Start, data: Path) -> None:
    serve(start, data, f"unix:{data}/nbd.sock")
    second = start(*PROGRAM, "serve", "--data", data, "--listen", "127.0.0.1:0")
    assert "in use" in refusal(second)
    assert command("volume", "list", "--data", data)


def test_it_waits_for_a_command_that_works_on_the_directory(start: Start, data: Path) -> None:
    """A cron job that holds the lock for a moment must not keep the daemon from starting."""
    data.mkdir()
    holder = subprocess.Popen(
        ["flock", data / "lock", "sh", "-c", "echo held; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    process = start(*PROGRAM, "serve", "--data", data, "--listen", f"unix:{data}/nbd.sock")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    holder.communicate("go\n")
    assert read_addresses(process, 1)


def test_a_port_in_use(start: Start, data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refusal(start(*PROGRAM, "serve", "--data", data, "--listen", address))
    assert address in line
    assert "in use" in line


def test_a_socket_in_use_and_one_that_a_killed_daemon_left(start: Start, data: Path) -> None:
    unix = f"unix:{data}/nbd.sock"
    killed = start(*PROGRAM, "serve", "--data", data, "--listen", unix)
    read_addresses(killed, 1)
    other = data.with_name("other")
    assert "listening" in refusal(start(*PROGRAM, "serve", "--data", other, "--listen", unix))
    killed.kill()
    killed.wait()
    assert (data / "nbd.sock").exists()
    assert (data / "control.sock").exists()
    assert serve(start, data, unix) == [unix]


@pytest.mark.parametrize(
    "address",
    ["nonsense", "127.0.0.1", "127.0.0.1:99999", "unix:", ":1", "192.0.2.1:1", "unix:/absent/x"],
)
def test_addresses_that_cannot_be_listened_on(start: Start, data: Path, address: str) -> None:
    line = refusal(start(*PROGRAM, "serve", "--data", data, "--listen", address))
    assert address in line


def test_a_directory_that_cannot_be_used(start: Start, data: Path) -> None:
    data.write_text("a file")
    for path in (data, data / "deeper", Path("/proc/nbdserve")):
        line = refusal(start(*PROGRAM, "serve", "--data", path, "--listen", "127.0.0.1:0"))
        assert str(path) in line


def test_a_configuration_file(start: Start, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "nbdserve.toml"
    unix = f"unix:{data.with_name('from-file.sock')}"
    path.write_text(f'data = "{data}"\nlisten = ["{unix}"]\nlog_level = "warning"\n')
    process = start(*PROGRAM, "serve", "--config", path)
    assert read_addresses(process, 1) == [unix]
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")

    path.write_text(f'data = "{data}"\nlisten = "{unix}"\n')
    assert "'listen'" in refusal(start(*PROGRAM, "serve", "--config", path))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_lines_about_a_connection_have_its_number(start: Start, data: Path, workers: str) -> None:
    """From whichever process they come; as JSON, every line of the log is an object."""
    unix = f"unix:{data}/nbd.sock"
    process = start(
        *PROGRAM, "serve", "--data", data, "--listen", unix, "--workers", workers,
        "--log-format", "json",
    )  # fmt: skip
    read_addresses(process, 1)
    command("volume", "create", "disk", "--size", "1M", "--data", data)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{data}/nbd.sock")
            client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, 10) + b"\0\0\0\4disk\0\0")
            client.sendall(b"no request".ljust(28))
            while client.recv(4096):
                pass
    process.terminate()
    _, error = process.communicate(timeout=60)
    lines = [json.loads(line) for line in error.splitlines()]
    peer = f"unix:pid={os.getpid()},uid={os.geteuid()}"
    for number in (1, 2):
        found = [line for line in lines if line.get("connection") == number]
        assert [line["message"] for line in found] == [
            "opened", "bad request magic 0x6e6f2072, connection dropped", "closed",
        ]  # fmt: skip
        for line in found:
            assert (line["client"], line["export"], line["level"]) == (peer, "disk", "info")
        opened, dropped, closed = found
        assert opened["process"] == closed["process"] == "daemon"
        assert opened["pid"] == closed["pid"] == process.pid
        assert dropped["process"] == ("daemon" if workers == "1" else "worker")
        assert (dropped["pid"] == process.pid) == (workers == "1")


def test_a_warning_when_the_network_can_connect(start: Start, data: Path) -> None:
    process = start(
        *PROGRAM, "serve", "--data", data, "--log-level", "warning", "--listen", "0.0.0.0:0",
        "--listen", "127.0.0.1:0", "--listen", f"unix:{data}/nbd.sock",
    )  # fmt: skip
    read_addresses(process, 3)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert len(error.splitlines()) == 1
    assert "0.0.0.0:0 is open to the network without encryption" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tls", "optional"], "without encryption or authentication, or an access list"),
        ([], "without authentication (tls_client_ca), or an access list"),
        (["--tls-client-ca", "ca-cert.pem"], ""),
        (["--config", "with-list.toml"], ""),
    ],
)
def test_what_tls_leaves_to_warn_of(
    start: Start, data: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    subprocess.run([MAKE_CERTIFICATES, tmp_path], check=True)
    table = '[[listener]]\naddress = "0.0.0.0:0"\ntls = "off"\nallow_networks = ["10.0.0.0/8"]\n'
    (tmp_path / "with-list.toml").write_text(table)
    process = start(
        "env", "--chdir", tmp_path, "PYTHONPATH=" + str(PROJECT),
        *PROGRAM, "serve", "--data", data, "--log-level", "warning", "--listen", "0.0.0.0:0",
        "--tls-certificate", "server-cert.pem", "--tls-key", "server-key.pem", *options,
    )  # fmt: skip
    read_addresses(process, 1)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert len(error.splitlines()) == bool(said)
    assert said in error


def test_it_may_open_as_many_files_as_it_is_allowed(start: Start, data: Path) -> None:
    process = start(
        "prlimit", "--nofile=200:700",
        *PROGRAM, "serve", "--data", data, "--listen", f"unix:{data}/nbd.sock",
    )  # fmt: skip
    read_addresses(process, 1)
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (700, 700)


def test_silent_clients_leave_descriptors_for_everything_else(start: Start, data: Path) -> None:
    unix = f"unix:{data}/nbd.sock"
    process = start("prlimit", "--nofile=200:200", *PROGRAM, "serve", "--data", data,
                    "--log-level", "error", "--listen", unix)  # fmt: skip
    read_addresses(process, 1)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(300):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(f"{data}/nbd.sock")
            assert client.recv(16) == b"NBDMAGICIHAVEOPT"
            clients.append(client)
        command("volume", "create", "a", "--size", "1M", "--data", data)
        command("snapshot", "create", "a@one", "--data", data)
        # The last one was not dropped.
        abort = bytes.fromhex("00000003") + b"IHAVEOPT" + bytes.fromhex("0000000200000000")
        clients[-1].sendall(abort)
        assert clients[-1].makefile("rb").read()[-8:] == bytes.fromhex("0000000100000000")
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")


def test_a_second_signal_ends_it_at_once(start: Start, data: Path) -> None:
    """The first one drains, here without end."""
    program = (
        "import asyncio, nbdserve.daemon as daemon\n"
        "async def drain(self, timeout):\n"
        "    print('draining', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "daemon.Server.drain = drain\n"
        "from nbdserve.cli import main\n"
        "main()\n"
    )
    process = start(
        sys.executable, "-c", program, "serve", "--data", data, "--listen", f"unix:{data}/x"
    )
    read_addresses(process, 1)
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.readline() == "draining\n"
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_stopping_ends_claims_and_keeps_changes(start: Start, data: Path) -> None:
    """A pin is open, and a change was just made, when the daemon is told to stop."""
    unix = f"unix:{data}/nbd.sock"
    process = start(*PROGRAM, "serve", "--data", data, "--listen", unix)
    read_addresses(process, 1)
    command("volume", "create", "a", "--size", "1M", "--data", data)
    command("snapshot", "create", "a@one", "--data", data)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{data}/control.sock")
        client.sendall(
            b"POST /v1/volumes/a/snapshots/one/pin HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        )
        stream = client.makefile("rb")
        while b'"source"' not in stream.readline():
            pass
        process.terminate()
        rest: list[bytes] = []
        reader = threading.Thread(target=lambda: rest.append(stream.read()))
        reader.start()
        assert process.wait(timeout=60) == 0
        reader.join(30)
    assert b"the daemon stops" in rest[0]
    assert "a@one" in command("snapshot", "list", "--data", data)


def test_http_is_served_where_asked(start: Start, data: Path) -> None:
    process = start(
        *PROGRAM, "serve", "--data", data, "--listen", "127.0.0.1:0", "--workers", "2",
        "--http", "127.0.0.1:0",
    )  # fmt: skip
    _, where = read_addresses(process, 2)
    assert where.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(f"{where}/health", timeout=20) as answer:
        assert json.load(answer) == {"status": "ok", "reasons": []}
    with urllib.request.urlopen(f"{where}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    assert 'nbdserve_worker_up{worker="1"} 1.0' in lines
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
