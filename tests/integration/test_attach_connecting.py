"""What `nbdserve attach` connects with, against several servers."""

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backends.errors import InvalidError, NotFoundError, UnavailableError
from nbdserve.attach.connecting import Connector, TlsFiles
from nbdserve.attach.server import parse_uri
from nbdserve.protocol.client_handshake import ExportInformation
from nbdserve.protocol.constants import FLAG_READ_ONLY, FLAG_SEND_FLUSH

from .parts import DIE_WITH_PARENT, MIB, Daemon, require, serve_options


def ask(uri: str, name: str, files: TlsFiles | None = None) -> ExportInformation:
    """Describe an export and open it; both must say the same."""
    connector = Connector(parse_uri(uri, name), name, files or TlsFiles())

    async def both() -> tuple[ExportInformation, ExportInformation]:
        described = await connector.describe()
        connection = await connector.open()
        connection.sock.close()
        return described, connection.export

    described, opened = asyncio.run(both())
    assert described == opened
    return opened


@contextmanager
def server(path: Path, *command: str) -> Iterator[str]:
    """Run a server that listens on a socket; yield its URI."""
    with subprocess.Popen([*DIE_WITH_PARENT, *command]) as process:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        try:
            yield f"nbd+unix:///?socket={path}"
        finally:
            process.kill()


def test_nbdkit(tmp_path: Path) -> None:
    require("nbdkit")
    path = tmp_path / "socket"
    with server(path, "nbdkit", "-f", "-r", "-U", str(path), "memory", "8M") as uri:
        found = ask(uri, "whatever")
    assert found.size == 8 * MIB
    assert found.flags & FLAG_READ_ONLY


def test_qemu_nbd(tmp_path: Path) -> None:
    require("qemu-nbd")
    path, image = tmp_path / "socket", tmp_path / "image"
    image.write_bytes(bytes(MIB))
    with server(
        path, "qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-k", str(path), str(image)
    ) as uri:
        assert ask(uri, "disk").size == MIB
        with pytest.raises(NotFoundError, match="no such export"):
            ask(uri, "other")


def test_our_own_with_tls(
    start_daemon: Callable[..., Daemon], data_directory: Path, certificates: Path
) -> None:
    authority = certificates / "ca-cert.pem"
    daemon = start_daemon(
        data_directory, *serve_options(certificates), "--tls-client-ca", authority
    )
    daemon.create("disk", MIB)
    tcp = f"127.0.0.1:{daemon.port}"
    known = TlsFiles(
        authority, certificates / "client-cert.pem", certificates / "client-key.pem", "localhost"
    )
    assert ask(f"nbds://{tcp}", "disk", known).flags & FLAG_SEND_FLUSH
    assert ask(f"nbds+unix:///?socket={daemon.socket}", "disk", known).size == MIB
    with pytest.raises(NotFoundError, match="no such export"):
        ask(f"nbds://{tcp}", "other", known)
    with pytest.raises(UnavailableError, match=r"wants TLS.*nbds://"):
        ask(f"nbd://{tcp}", "disk")
    with pytest.raises(UnavailableError, match="certificate is not trusted"):
        ask(f"nbds://{tcp}", "disk")
    with pytest.raises(UnavailableError, match="certificate"):
        ask(f"nbds://{tcp}", "disk", TlsFiles(authority, hostname="localhost"))
    with pytest.raises(InvalidError, match="TLS file"):
        ask(f"nbds://{tcp}", "disk", TlsFiles(certificates / "none.pem"))
    with pytest.raises(InvalidError, match="--tls-certificate"):
        ask(f"nbds://{tcp}", "disk", TlsFiles(authority, key=certificates / "client-key.pem"))


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="socket"):
        ask(f"nbd+unix:///?socket={tmp_path}/socket", "disk")
    with pytest.raises(UnavailableError, match="refused"):
        ask("nbd://127.0.0.1:1/", "disk")
