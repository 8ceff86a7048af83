"""Listening: addresses, socket files, clear errors, and running out of file descriptors."""

import asyncio
import errno
import os
import socket
import stat
import tempfile
from ipaddress import ip_address
from pathlib import Path

import pytest

from backends.errors import InUseError, InvalidError, StorageError
from nbdserve.server import Server, listening

from .harness import serve
from .memory_export import MemoryExport, MemoryRegistry
from .nbd_client import READ, Client


def new_server():
    return Server(MemoryRegistry(MemoryExport()))


def test_unix_socket_file_is_the_owners_and_goes_with_the_server(tmp_path):
    async def main():
        path = tmp_path / "nbd.sock"
        before = os.umask(0)
        try:
            server = new_server()
            await server.listen_unix(path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert server.addresses == [f"unix:{path}"]
        await server.drain(1)
        assert not path.exists()

    asyncio.run(main())


@pytest.mark.parametrize("mode", [0o660, 0o666, 0o600, 0o200])
def test_socket_file_for_others(tmp_path, mode):
    async def main():
        path = tmp_path / "nbd.sock"
        before = os.umask(0o077)
        try:
            server = new_server()
            await server.listen_unix(path, mode=mode, group=os.getegid())
        finally:
            os.umask(before)
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (mode, os.getegid())
        await server.drain(1)
        assert not path.exists()

    asyncio.run(main())


def test_group_that_may_not_be_given_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def chown(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", chown)
    path = tmp_path / "nbd.sock"
    with pytest.raises(InvalidError, match="mode 0660 and group 4242: Operation not permitted"):
        asyncio.run(new_server().listen_unix(path, mode=0o660, group=4242))
    assert not path.exists()


def test_stale_socket_file_is_replaced(tmp_path):
    path = tmp_path / "nbd.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()

    async def main():
        server = new_server()
        await server.listen_unix(path)
        client = await Client.connect(str(path))
        assert (await client.call(READ, 0, 1)).error == 0
        client.close()
        await server.drain(5)

    asyncio.run(main())


def test_live_socket_file_is_refused_and_left_alone(tmp_path):
    async def main():
        path = tmp_path / "nbd.sock"
        first, second = new_server(), new_server()
        await first.listen_unix(path)
        with pytest.raises(InUseError, match="another server is listening there"):
            await second.listen_unix(path)
        await second.drain(1)
        client = await Client.connect(str(path))
        client.close()
        await first.drain(5)

    asyncio.run(main())


def test_socket_file_that_was_replaced_is_left_alone(tmp_path):
    async def main():
        path = tmp_path / "nbd.sock"
        server = new_server()
        await server.listen_unix(path)
        path.unlink()
        path.write_text("somebody else's")
        await server.drain(1)
        assert path.exists()

    asyncio.run(main())


def occupied(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    return path


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (occupied, "no socket is in the way"),
        (lambda tmp_path: tmp_path / "absent" / "nbd.sock", "No such file"),
        (lambda tmp_path: tmp_path / ("x" * 120), "too long"),
        (lambda tmp_path: Path("nul\0byte"), "NUL"),
    ],
)
def test_socket_files_that_cannot_be(tmp_path, where, reason):
    path = where(tmp_path)
    with pytest.raises(InvalidError, match=reason) as caught:
        asyncio.run(new_server().listen_unix(path))
    assert "\n" not in str(caught.value)
    if path.name == "file":
        assert path.read_text() == "precious"


def test_tcp():
    async def main():
        server = new_server()
        await server.listen_tcp("127.0.0.1", 0)
        (address,) = server.addresses
        host, _, port = address.rpartition(":")
        assert host == "127.0.0.1"
        with pytest.raises(InUseError, match=f"cannot listen on {address}: Address already in use"):
            await new_server().listen_tcp(host, int(port))
        reader, writer = await asyncio.open_connection(host, int(port))
        assert (await reader.readexactly(8)) == b"NBDMAGIC"
        ((_, connection),) = server._connections.items()
        sock = connection._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        writer.close()
        assert await server.drain(5)

    asyncio.run(main())


def test_who_connects():
    """A mapped address is that of IPv4, so that the lists of networks mean what they say."""
    both = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with both:
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, both.getsockname()[1])) as client:
                accepted, _ = both.accept()
                with accepted:
                    identity = listening._identify(accepted)
                assert identity.address == ip_address(host)
                assert identity.peer.endswith(f":{client.getsockname()[1]}")
                assert (identity.user, identity.secure, identity.certificate_names) == (
                    None,
                    False,
                    (),
                )
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{directory}/s")
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{directory}/s")
            accepted, _ = server.accept()
            with accepted:
                identity = listening._identify(accepted)
    assert (identity.user, identity.address) == (os.geteuid(), None)
    assert identity.peer == f"unix:pid={os.getpid()},uid={os.geteuid()}"


def test_all_addresses_of_a_name_share_the_port():
    async def main():
        server = new_server()
        await server.listen_tcp("localhost", 0)
        ports = {address.rpartition(":")[2] for address in server.addresses}
        assert len(ports) == 1
        await server.drain(1)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "port"), [("no.such.host.invalid", 10809), ("192.0.2.1", 10809), ("127.0.0.1", 70000)]
)
def test_addresses_that_cannot_be(host, port):
    with pytest.raises(StorageError, match=f"cannot listen on {host}:{port}: .+") as caught:
        asyncio.run(new_server().listen_tcp(host, port))
    assert "\n" not in str(caught.value)


def test_out_of_file_descriptors(monkeypatch, caplog):
    """The client waits in the queue, the loop does not spin, and goes on when there are some."""
    monkeypatch.setattr(listening, "ACCEPT_PAUSE", 0.05)
    real = socket.socket.accept
    failures = []

    def accept(self):
        if len(failures) < 3:
            failures.append(1)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(self)

    monkeypatch.setattr(socket.socket, "accept", accept)

    async def test(harness):
        client = await harness.raw()
        await asyncio.sleep(0.02)
        assert len(failures) == 1
        assert (await client.reader.readexactly(8)) == b"NBDMAGIC"
        assert len(failures) == 3

    serve(test)
    assert "Too many open files" in caplog.text
