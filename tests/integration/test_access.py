"""Who gets in where, with real clients: listeners of several kinds, certificates, lists, limits."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .parts import DIE_WITH_PARENT, MIB, SCRIPTS, Daemon, find_free_port, require, run, run_nbdsh

Start = Callable[..., Daemon]
NOBODY = 65534


@pytest.fixture(autouse=True)
def _clients() -> None:
    require("nbdinfo", "nbdcopy", "nbdsh", "qemu-img", "openssl", "setpriv")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a client's certificates, and one in it of each other client."""
    directory = tmp_path_factory.mktemp("certificates")
    run(SCRIPTS / "make-test-certificates", directory)
    for name in ("backup.example.com", "other.example.com"):
        run(SCRIPTS / "make-test-certificates", "--client", name, directory, directory / name)
    return directory


@pytest.fixture
def start(start_daemon: Start, data_directory: Path) -> Callable[..., Daemon]:
    """Return a function that starts a daemon with a configuration file, on more addresses."""

    def start(content: str, *addresses: str) -> Daemon:
        file = data_directory.with_name("nbdserve.toml")
        file.write_text(content)
        more = [word for address in addresses for word in ("--listen", address)]
        daemon = start_daemon(data_directory, "--config", file, *more)
        deadline = time.monotonic() + 60
        while any(f"listening on {address}\n" not in daemon.read_log() for address in addresses):
            assert time.monotonic() < deadline, daemon.read_log()
            time.sleep(0.02)
        return daemon

    return start


def tls_lines(certificates: Path) -> str:
    return (
        f'tls_certificate = "{certificates}/server-cert.pem"\n'
        f'tls_key = "{certificates}/server-key.pem"\n'
        f'tls_client_ca = "{certificates}/ca-cert.pem"\n'
    )


def tls_uri(port: int, export: str, certificates: Path) -> str:
    return f"nbds://127.0.0.1:{port}/{export}?tls-certificates={certificates}"


def qemu_info(port: int, export: str, certificates: Path) -> subprocess.CompletedProcess[str]:
    return run(
        "qemu-img", "info",
        "--object", f"tls-creds-x509,id=tls,endpoint=client,dir={certificates}",
        "--image-opts", f"driver=nbd,host=127.0.0.1,port={port},export={export},tls-creds=tls",
        check=False,
    )  # fmt: skip


def size(uri: str) -> int | None:
    """Return what nbdinfo finds; None when it is refused."""
    found = run("nbdinfo", "--size", uri, check=False)
    return None if found.returncode else int(found.stdout)


def test_plain_on_a_socket_and_certificates_over_tcp(
    start: Callable[..., Daemon], certificates: Path, tmp_path: Path
) -> None:
    port = find_free_port()
    daemon = start(
        f'[[listener]]\naddress = "127.0.0.1:{port}"\n{tls_lines(certificates)}',
        f"127.0.0.1:{port}",
    )
    daemon.command("volume", "create", "disk", "--size", "1M")
    assert size(daemon.uri("disk")) == MIB
    assert size(daemon.tcp_uri("disk")) == MIB
    assert size(tls_uri(port, "disk", certificates)) == MIB
    assert not qemu_info(port, "disk", certificates).returncode
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    shutil.copy(certificates / "ca-cert.pem", nameless)
    assert size(tls_uri(port, "disk", nameless)) is None
    assert qemu_info(port, "disk", nameless).returncode
    assert size(f"nbd://127.0.0.1:{port}/disk") is None


def test_tls_for_all_but_one_socket(
    start: Callable[..., Daemon], certificates: Path, data_directory: Path
) -> None:
    plain = data_directory.with_name("plain.sock")
    daemon = start(
        f'{tls_lines(certificates)}[[listener]]\naddress = "unix:{plain}"\ntls = "off"\n',
        f"unix:{plain}",
    )
    daemon.command("volume", "create", "disk", "--size", "1M")
    assert size(f"nbd+unix:///disk?socket={plain}") == MIB
    assert size(f"nbd+unix:///disk?socket={daemon.socket}") is None
    assert size(f"nbds+unix:///disk?socket={daemon.socket}&tls-certificates={certificates}") == MIB
    assert size(f"nbd://127.0.0.1:{daemon.port}/disk") is None


def test_exports_for_one_certificate(start: Callable[..., Daemon], certificates: Path) -> None:
    port = find_free_port()
    daemon = start(
        f"""
[[listener]]
address = "127.0.0.1:{port}"
tls = "optional"
{tls_lines(certificates)}
[[export]]
name = "web*"
allow_certificates = ["backup.example.com"]
""",
        f"127.0.0.1:{port}",
    )
    for name in ("web", "free"):
        daemon.command("volume", "create", name, "--size", "1M")
    daemon.command("snapshot", "create", "web@one")
    right, wrong = certificates / "backup.example.com", certificates / "other.example.com"
    for export in ("web", "web@one", "free"):
        limited = export.startswith("web")
        assert size(tls_uri(port, export, right)) == MIB
        assert not qemu_info(port, export, right).returncode
        # Without TLS the specification has a reply of its own; on the socket there is no TLS.
        image = run("qemu-img", "info", f"nbd://127.0.0.1:{port}/{export}", check=False)
        assert bool(image.returncode) is limited
        if limited:
            assert "wants TLS" in image.stderr
        assert size(daemon.uri(export)) == (None if limited else MIB)
        assert size(tls_uri(port, export, certificates)) == (None if limited else MIB)
        found = qemu_info(port, export, wrong)
        assert bool(found.returncode) is limited
        assert ("for clients with certain certificates only" in found.stderr) is limited
    for uri, names in (
        (tls_uri(port, "", right), ["free", "web"]),
        (tls_uri(port, "", wrong), ["free"]),
        (f"nbd://127.0.0.1:{port}", ["free"]),
        (f"nbd+unix:///?socket={daemon.socket}", ["free"]),
    ):
        script = f"""
h.set_uri_allow_local_file(True)
h.set_opt_mode(True)
h.connect_uri({uri!r})
names = []
h.opt_list(lambda name, description: names.append(name) and 0)
print(names)
h.opt_abort()
"""
        assert run_nbdsh(script).strip() == repr(names)


def test_address_lists(start: Callable[..., Daemon]) -> None:
    ports = find_free_port(), find_free_port()
    daemon = start(
        f"""
[[listener]]
address = "127.0.0.1:{ports[0]}"
allow_networks = ["10.0.0.0/8", "127.0.0.0/30"]
[[listener]]
address = "127.0.0.1:{ports[1]}"
allow_networks = ["10.0.0.0/8", "fd00::/8"]
""",
        *(f"127.0.0.1:{port}" for port in ports),
    )
    daemon.command("volume", "create", "disk", "--size", "1M")
    assert size(f"nbd://127.0.0.1:{ports[0]}/disk") == MIB
    assert size(f"nbd://127.0.0.1:{ports[1]}/disk") is None
    for source, greeted in (("127.0.0.3", True), ("127.0.0.4", False)):
        with socket.create_connection(
            ("127.0.0.1", ports[0]), source_address=(source, 0)
        ) as client:
            assert bool(receive(client)) is greeted
    log = daemon.read_log()
    assert f"refused at 127.0.0.1:{ports[1]}: not on the access list" in log
    assert "127.0.0.4:" in log


def receive(client: socket.socket) -> bytes:
    client.settimeout(60)
    with contextlib.suppress(ConnectionError):
        return client.recv(64)
    return b""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users")
def test_user_lists(start: Callable[..., Daemon], data_directory: Path) -> None:
    outside = data_directory.parent
    outside.chmod(0o755)
    (outside / "nbdserve.toml").touch()
    users, group, closed = (outside / name for name in ("users.sock", "group.sock", "closed.sock"))
    daemon = start(
        f"""
[[listener]]
address = "unix:{users}"
socket_mode = "0666"
allow_users = ["nobody", 4242]
[[listener]]
address = "unix:{group}"
socket_mode = "0660"
socket_group = 4243
[[listener]]
address = "unix:{closed}"
""",
        *(f"unix:{path}" for path in (users, group, closed)),
    )
    assert (closed.stat().st_mode & 0o777, closed.stat().st_gid) == (0o600, 0)
    assert (group.stat().st_mode & 0o777, group.stat().st_gid) == (0o660, 4243)
    daemon.command("volume", "create", "disk", "--size", "1M")

    def allowed(path: Path, user: int, group: int = NOBODY) -> bool:
        found = run(
            "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups",
            "nbdinfo", "--size", f"nbd+unix:///disk?socket={path}", check=False,
        )  # fmt: skip
        return found.returncode == 0 and int(found.stdout) == MIB

    assert allowed(users, NOBODY)
    assert allowed(users, 4242)
    assert not allowed(users, 4244)
    assert not allowed(users, 0)
    assert allowed(group, NOBODY, 4243)
    assert not allowed(group, NOBODY)
    assert allowed(closed, 0)
    assert not allowed(closed, NOBODY)
    log = daemon.read_log()
    assert "uid=4244: refused at unix:" in log and "uid=0: refused at unix:" in log
    assert daemon.stop() == 0
    assert not users.exists() and not group.exists()


@contextlib.contextmanager
def holding(uri: str, connections: int) -> Iterator[Callable[[], None]]:
    """Keep connections open in nbdsh; yields what ends them."""
    script = f"""
handles = [nbd.NBD() for _ in range({connections})]
for handle in handles:
    handle.connect_uri({uri!r})
print("open", flush=True)
input()
for handle in handles:
    handle.pread(512, 0)
    handle.shutdown()
print("good")
"""
    environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    with subprocess.Popen(
        [*DIE_WITH_PARENT, "nbdsh", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as client:  # fmt: skip
        assert client.stdout is not None
        assert client.stdout.readline() == "open\n"

        def finish() -> None:
            output, _ = client.communicate("\n", timeout=60)
            assert output == "good\n"

        try:
            yield finish
        finally:
            client.kill()


def test_limits_of_a_listener_and_of_an_export(start: Callable[..., Daemon]) -> None:
    port = find_free_port()
    daemon = start(
        f"""
[[listener]]
address = "127.0.0.1:{port}"
max_connections = 3
[[export]]
name = "few"
max_connections = 2
""",
        f"127.0.0.1:{port}",
    )
    for name in ("few", "many"):
        daemon.command("volume", "create", name, "--size", "1M")
    with holding(daemon.uri("few"), 2) as finish:
        refused = run("qemu-img", "info", daemon.uri("few"), check=False)
        assert "has all the connections that it may have, 2" in refused.stderr
        assert size(daemon.uri("many")) == MIB
        finish()
    wait_for(lambda: size(daemon.uri("few")) == MIB)
    uri = f"nbd://127.0.0.1:{port}/many"
    with holding(uri, 3) as finish:
        assert size(uri) is None
        assert size(daemon.uri("many")) == MIB
        finish()
    wait_for(lambda: size(uri) == MIB)
    assert "all 3 connections are taken" in daemon.read_log()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_silent_clients_are_dropped_and_keep_nobody_out(start: Callable[..., Daemon]) -> None:
    port = find_free_port()
    daemon = start(
        f'handshake_timeout = 2\n[[listener]]\naddress = "127.0.0.1:{port}"\n'
        "max_connections = 20\n",
        f"127.0.0.1:{port}",
    )
    daemon.command("volume", "create", "disk", "--size", "1M")
    uri = f"nbd://127.0.0.1:{port}/disk"
    with contextlib.ExitStack() as stack, holding(uri, 4) as finish:
        silent = []
        for number in range(60):
            # Elsewhere than the honest clients, as far as the daemon can tell.
            client = socket.create_connection(
                ("127.0.0.1", port), source_address=(f"127.0.1.{number % 3}", 0)
            )
            silent.append(stack.enter_context(client))
        for _ in range(3):
            run("nbdcopy", uri, "null:")
        for client in silent:
            while receive(client):
                pass
        finish()
    assert "others need the place" in daemon.read_log()
