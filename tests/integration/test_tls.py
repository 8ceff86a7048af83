"""What TLS adds for real clients: certificates, refusals, the end of a connection.

That everything else works over TLS as well is for the other modules: see parts.over_all_transports.
"""

import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .parts import DIE_WITH_PARENT, MIB, SCRIPTS, Daemon, require, run, run_nbdsh, serve_options

Start = Callable[..., Daemon]


@pytest.fixture(autouse=True)
def _clients() -> None:
    require("nbdinfo", "nbdcopy", "nbdsh", "qemu-img")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with certificates of the same names, signed by another CA."""
    directory = tmp_path_factory.mktemp("strangers")
    run(SCRIPTS / "make-test-certificates", directory)
    return directory


@pytest.fixture
def tls_daemon(start_daemon: Start, data_directory: Path, certificates: Path) -> Daemon:
    """Return a running daemon that requires TLS, with a volume `disk` of 64 MiB."""
    daemon = start_daemon(data_directory, *serve_options(certificates))
    daemon.command("volume", "create", "disk", "--size", "64M")
    return daemon


def tls_uris(daemon: Daemon, export: str, certificates: Path) -> list[str]:
    """Both ways in."""
    files = f"tls-certificates={certificates}"
    return [
        f"nbds://127.0.0.1:{daemon.port}/{export}?{files}",
        f"nbds+unix:///{export}?socket={daemon.socket}&{files}",
    ]


def qemu_options(daemon: Daemon, export: str, certificates: Path) -> list[str]:
    """What a qemu tool is told to reach an export over TLS and TCP."""
    return [
        "--object",
        f"tls-creds-x509,id=tls,endpoint=client,dir={certificates}",
        "--image-opts",
        f"driver=nbd,host=127.0.0.1,port={daemon.port},export={export},tls-creds=tls",
    ]


def make_file(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(3).randbytes(size))
    return path


def test_libnbd(tls_daemon: Daemon, certificates: Path, tmp_path: Path) -> None:
    file = make_file(tmp_path / "file", 64 * MIB)
    back = tmp_path / "back"
    for uri in tls_uris(tls_daemon, "disk", certificates):
        assert "with TLS" in run("nbdinfo", uri).stdout
        run("nbdcopy", file, uri)
        run("nbdcopy", "--request-size=33554432", "--connections=4", uri, back)
        run("cmp", file, back)
        run("nbdcopy", "--request-size=65536", uri, back)
        run("cmp", file, back)


def test_qemu(tls_daemon: Daemon, certificates: Path, tmp_path: Path) -> None:
    file = make_file(tmp_path / "file", 64 * MIB)
    options = qemu_options(tls_daemon, "disk", certificates)
    assert "64 MiB" in run("qemu-img", "info", *options).stdout
    credentials = options[:2]
    target = [*credentials, "--target-image-opts", "-f", "raw"]
    run("qemu-img", "convert", "-n", *target, file, options[3])
    source = [*credentials, "--image-opts", f"driver=raw,file.driver=file,file.filename={file}"]
    run("qemu-img", "compare", *source, options[3])
    uri = tls_uris(tls_daemon, "disk", certificates)[1]
    run("nbdcopy", uri, tmp_path / "back")
    run("cmp", file, tmp_path / "back")


def test_pipelined_writes_then_disconnect(tls_daemon: Daemon, certificates: Path) -> None:
    for uri in tls_uris(tls_daemon, "disk", certificates):
        script = f"""
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri({uri!r})
done = []
for i in range(64):
    data = nbd.Buffer.from_bytearray(bytearray([i + 1]) * 262144)
    h.aio_pwrite(data, i * 262144, lambda error, i=i: done.append((i, error.value)) or 1)
h.aio_disconnect()
while not (h.aio_is_closed() or h.aio_is_dead()):
    h.poll(-1)
assert sorted(done) == [(i, 0) for i in range(64)], done
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri({uri!r})
for i in range(64):
    assert h.pread(262144, i * 262144) == bytes([i + 1]) * 262144
h.trim(64 * 262144, 0)
h.flush()
h.shutdown()
print("good")
"""
        assert run_nbdsh(script).strip() == "good"


def test_plain_clients_are_refused_unless_tls_is_optional(
    tls_daemon: Daemon, start_daemon: Start, tmp_path: Path, certificates: Path
) -> None:
    for uri in (tls_daemon.uri("disk"), tls_daemon.tcp_uri("disk")):
        assert run("nbdinfo", uri, check=False).returncode
        refused = run("qemu-img", "info", uri, check=False)
        assert refused.returncode
        assert "TLS" in refused.stderr
    assert "export=disk: opened" not in tls_daemon.read_log()
    assert tls_daemon.stop() == 0
    tls_daemon.arguments = (*serve_options(certificates), "--tls", "optional")
    tls_daemon.start()
    for uri in (*tls_uris(tls_daemon, "disk", certificates), tls_daemon.uri("disk")):
        assert run("nbdinfo", "--size", uri).stdout.strip() == str(64 * MIB)


def test_server_of_another_authority_is_refused(tls_daemon: Daemon, strangers: Path) -> None:
    uri = tls_uris(tls_daemon, "disk", strangers)[0]
    assert "certificate" in run("nbdinfo", uri, check=False).stderr
    options = qemu_options(tls_daemon, "disk", strangers)
    assert "certificate" in run("qemu-img", "info", *options, check=False).stderr
    assert "export=disk: opened" not in tls_daemon.read_log()


def test_clients_have_to_show_a_certificate(
    start_daemon: Start,
    data_directory: Path,
    certificates: Path,
    strangers: Path,
    tmp_path: Path,
) -> None:
    client_ca = ["--tls-client-ca", certificates / "ca-cert.pem"]
    daemon = start_daemon(data_directory, *serve_options(certificates), *client_ca)
    daemon.command("volume", "create", "disk", "--size", "1M")
    nameless = tmp_path / "nameless"
    wrong = tmp_path / "wrong"
    for directory in (nameless, wrong):
        directory.mkdir()
        shutil.copy(certificates / "ca-cert.pem", directory)
    for name in ("client-cert.pem", "client-key.pem"):
        shutil.copy(strangers / name, wrong)
    for directory in (nameless, wrong):
        for uri in tls_uris(daemon, "disk", directory):
            assert run("nbdinfo", uri, check=False).returncode
        options = qemu_options(daemon, "disk", directory)
        assert run("qemu-img", "info", *options, check=False).returncode
    assert "export=disk: opened" not in daemon.read_log()
    assert daemon.read_log().count("TLS handshake failed") >= 5
    for uri in tls_uris(daemon, "disk", certificates):
        assert run("nbdinfo", "--size", uri).stdout.strip() == str(MIB)
    run("qemu-img", "info", *qemu_options(daemon, "disk", certificates))


def test_client_that_is_killed_amid_transfers(tls_daemon: Daemon, certificates: Path) -> None:
    tcp, unix = tls_uris(tls_daemon, "disk", certificates)
    run_nbdsh(f"""
h.set_uri_allow_local_file(True)
h.connect_uri({unix!r})
h.pwrite(b'x' * 2**25, 0)
h.shutdown()
""")
    for uri in (tcp, unix):
        # A pipe that nobody reads keeps it at work for as long as we like.
        with subprocess.Popen(
            [*DIE_WITH_PARENT, "nbdcopy", uri, "-"], stdout=subprocess.PIPE
        ) as client:
            assert client.stdout is not None
            assert client.stdout.read(4096) == b"x" * 4096
            client.kill()
    deadline = time.monotonic() + 30
    while tls_daemon.read_log().count("export=disk: closed") < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tls_daemon.read_log().count("export=disk: closed") == 3
    run("nbdinfo", tcp)
    assert tls_daemon.stop() == 0
    tls_daemon.start()


def test_daemon_names_the_file_that_is_wrong(data_directory: Path, certificates: Path) -> None:
    daemon = Daemon(data_directory)
    certificate = ["--tls-certificate", certificates / "server-cert.pem"]
    for options, said in (
        (["--tls", "required"], "--tls-certificate"),
        (certificate, "--tls-key"),
        ([*serve_options(certificates), "--tls-client-ca", "absent.pem"], "absent.pem"),
    ):
        refused = daemon.command("serve", *options, check=False)
        assert refused.returncode == 1
        assert said in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
