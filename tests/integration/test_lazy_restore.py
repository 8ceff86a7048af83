"""Volumes that are restored lazily, from a real S3 server and from a directory."""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .parts import (
    GIB,
    MIB,
    Daemon,
    S3Server,
    background,
    qemu_img,
    qemu_io,
    require,
    require_root,
    run,
    run_qemu_io,
)
from .test_backup import Repository, directory_repository, s3_repository

SIZE = 100 * GIB
TEXT = "a line of text\n" * 100_000


@pytest.fixture(params=["s3", "file"])
def repository(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Repository]:
    """Yield an empty repository; what daemons need to reach it is in their environment."""
    if request.param == "s3":
        with s3_repository(request.getfixturevalue("s3_server")) as made:
            for name, value in made.env.items():
                monkeypatch.setenv(name, value)
            yield made
    else:
        with directory_repository(tmp_path / "repository") as made:
            yield made


@pytest.fixture
def daemon(
    repository: Repository, start_daemon: Callable[..., Daemon], data_directory: Path
) -> Daemon:
    """Return a running daemon that can reach the repository, with workers or in one process."""
    workers = "2" if repository.url.startswith("s3:") else "1"
    return start_daemon(data_directory, "--workers", workers)


def store_image(daemon: Daemon, repository: Repository, image: Path) -> None:
    """Push a volume of 100 GiB that begins with an image: disk@s."""
    daemon.create("disk", SIZE)
    qemu_img(daemon, "convert", "-n", "-f", "qcow2", "-O", "raw", image, daemon.image("disk"))
    # Far behind it, so that there is more than one region.
    qemu_io(daemon, "disk", f"write -P 7 {SIZE - 3 * MIB} 2M", "flush")
    daemon.take_snapshot("disk@s")
    daemon.command("repo", "init", repository.url)
    daemon.command("repo", "push", "disk@s", repository.url)


def restore(daemon: Daemon, repository: Repository, rate: str, volume: str = "lazy") -> None:
    daemon.command("repo", "restore", repository.url, "disk@s", volume, "--lazy", "--rate", rate)


def compare(daemon: Daemon, volume: str, other: str = "disk") -> None:
    qemu_img(daemon, "compare", "-f", "raw", "-F", "raw", daemon.image(volume), daemon.image(other))


@contextlib.contextmanager
def mounted(daemon: Daemon, volume: str, directory: Path) -> Iterator[Path]:
    """Yield a file that a volume is read from."""
    directory.mkdir()
    with background("nbdfuse", directory, daemon.uri(volume)):
        try:
            deadline = time.monotonic() + 30
            while not (directory / "nbd").exists():
                assert time.monotonic() < deadline, "nbdfuse does not mount"
                time.sleep(0.05)
            yield directory / "nbd"
        finally:
            run("umount", directory)


def fetcher_of(daemon: Daemon) -> int:
    """Return the process id of the daemon's fetcher."""
    assert daemon.process is not None
    children = run("ps", "-o", "pid=,args=", "--ppid", str(daemon.process.pid)).stdout
    (line,) = [line for line in children.splitlines() if "nbdserve.fetcher" in line]
    return int(line.split()[0])


def await_some(daemon: Daemon) -> dict[str, Any]:
    """Return how far the volume "lazy" is, once some of it is said to be there."""
    deadline = time.monotonic() + 60
    while True:
        shown = daemon.json("volume", "show", "lazy")["hydration"]
        if shown["fetched"]:
            return shown
        assert time.monotonic() < deadline, "nothing was fetched"
        time.sleep(0.2)


def test_a_file_system_is_read_and_written_at_once(
    daemon: Daemon, repository: Repository, disk_image: Path, tmp_path: Path
) -> None:
    """Through a restart, a kill and the end of the fetcher, until all of it is there."""
    require_root()
    require("nbdfuse", "debugfs", "qemu-img", "qemu-io")
    store_image(daemon, repository, disk_image)
    restore(daemon, repository, "0")
    qemu_io(daemon, "lazy", f"read -P 7 {SIZE - 3 * MIB} 4k", f"read -P 0 {SIZE - 4096} 4k")
    with mounted(daemon, "lazy", tmp_path / "mount") as image:
        found = run("debugfs", "-R", "cat /text", image).stdout
        assert found == TEXT
    shown = await_some(daemon)
    assert shown["source"] == f"disk@s in {repository.url}"
    assert shown["fetched"] < shown["total"]
    status = daemon.command("status").stdout
    assert f"volume lazy: {100 * shown['fetched'] // shown['total']}" not in status
    assert f"disk@s in {repository.url}" in status
    assert daemon.json("volume", "list")["volumes"][0]["hydration"] is None

    daemon.command("volume", "hydrate", "lazy", "--rate", "4M")
    os.kill(fetcher_of(daemon), signal.SIGKILL)
    qemu_io(daemon, "lazy", "write -P 9 1M 64k", "flush", f"read -P 7 {SIZE - 2 * MIB} 4k")
    daemon.kill()
    daemon.start()
    again = await_some(daemon)
    assert again["fetched"] < again["total"]
    qemu_io(daemon, "lazy", "read -P 9 1M 64k", "write 1M 64k -s /dev/zero", "flush")
    daemon.stop()
    daemon.start()
    qemu_io(daemon, "disk", "write -z 1M 64k", "flush")
    daemon.command("volume", "hydrate", "lazy", "--rate", "unlimited", "--wait")
    assert daemon.json("volume", "show", "lazy")["hydration"] is None
    compare(daemon, "lazy")
    assert daemon.json("check")["findings"] == []
    # It is an ordinary volume now, which can be pushed.
    daemon.take_snapshot("lazy@whole")
    daemon.command("repo", "push", "lazy@whole", repository.url)
    daemon.command("repo", "verify", repository.url, "lazy@whole", "--deep")


def test_clients_read_what_was_pushed_while_it_is_fetched(
    daemon: Daemon, repository: Repository, disk_image: Path
) -> None:
    require("qemu-img", "qemu-io")
    store_image(daemon, repository, disk_image)
    restore(daemon, repository, "unlimited")
    compare(daemon, "lazy")
    refused = daemon.command("repo", "push", "lazy@none", repository.url, check=False)
    assert refused.returncode == 1
    daemon.command("volume", "hydrate", "lazy", "--wait")
    compare(daemon, "lazy")
    daemon.command("volume", "delete", "lazy")


class Proxy:
    """A TCP proxy that can be shut: nobody gets in, and whoever was in is cut off."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._sockets: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        self._sockets.add(source)
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        self._sockets.discard(source)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        source.close()


def test_an_outage_of_the_store_is_waited_for(
    s3_server: S3Server,
    start_daemon: Callable[..., Daemon],
    data_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("qemu-io")
    proxy = Proxy(s3_server.endpoint)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    with s3_repository(s3_server) as repository:
        daemon = start_daemon(data_directory)
        daemon.create("disk", GIB)
        qemu_io(daemon, "disk", "write -P 5 0 16M", "write -P 6 512M 16M", "flush")
        daemon.take_snapshot("disk@s")
        daemon.command("repo", "init", repository.url)
        daemon.command("repo", "push", "disk@s", repository.url)
        restore(daemon, repository, "0")
        qemu_io(daemon, "lazy", "read -P 5 0 64k")
        proxy.shut()
        image = daemon.image("lazy")
        with background("qemu-io", "-f", "raw", "-c", "read -P 6 512M 64k", image) as reading:
            qemu_io(daemon, "lazy", "read -P 5 0 64k", "write -P 1 600M 1M", "flush")
            daemon.take_snapshot("lazy@during")
            time.sleep(2)
            proxy.open()
            reading()
        daemon.command("volume", "hydrate", "lazy", "--rate", "unlimited", "--wait")
        qemu_io(daemon, "lazy", "read -P 6 512M 16M", "read -P 1 600M 1M", "read -P 5 0 16M")
        proxy.shut()
        daemon.command("volume", "delete", "lazy", "--with-snapshots")
        daemon.stop()
        daemon.start()
        proxy.open()


def test_what_the_daemon_cannot_reach_is_refused_at_once(
    s3_server: S3Server,
    start_daemon: Callable[..., Daemon],
    data_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The daemon has no credentials, whoever runs the command has."""
    for name, value in s3_server.env.items():
        if "KEY" not in name:
            monkeypatch.setenv(name, value)
    daemon = start_daemon(data_directory)
    with s3_repository(s3_server) as repository:
        daemon.command("repo", "init", repository.url, env=s3_server.env)
        for url, mentions in (
            (repository.url, "no usable AWS credentials"),
            (f"file://{tmp_path}/nothing", "there is no directory"),
            ("http://elsewhere", "is not a repository"),
        ):
            result = daemon.command(
                "repo", "restore", url, "disk@s", "new", "--lazy", env=s3_server.env, check=False
            )
            assert result.returncode == 1
            (line,) = result.stderr.splitlines()
            assert mentions in line
        assert daemon.json("volume", "list")["volumes"] == []


def test_without_a_daemon_a_command_does_it(
    repository: Repository, data_directory: Path, tmp_path: Path
) -> None:
    daemon = Daemon(data_directory)
    source = random.Random(2)
    image = tmp_path / "image"
    image.write_bytes(source.randbytes(3 * MIB))
    daemon.command("volume", "create", "disk", "--size", "64M")
    daemon.start()
    try:
        run("nbdcopy", image, daemon.uri("disk"))
    finally:
        daemon.stop()
    daemon.command("snapshot", "create", "disk@s")
    daemon.command("repo", "init", repository.url)
    daemon.command("repo", "push", "disk@s", repository.url)
    restore(daemon, repository, "0")
    assert daemon.json("volume", "show", "lazy")["hydration"]["fetched"] == 0
    assert daemon.json("check")["findings"] == []
    daemon.command("volume", "hydrate", "lazy", "--rate", "unlimited", "--wait")
    daemon.start()
    try:
        compare(daemon, "lazy")
    finally:
        daemon.stop()


def test_reads_that_nothing_comes_for_fail(
    start_daemon: Callable[..., Daemon], data_directory: Path, tmp_path: Path
) -> None:
    require("qemu-io")
    directory = tmp_path / "repository"
    daemon = start_daemon(data_directory)
    daemon.create("disk", 256 * MIB)
    qemu_io(daemon, "disk", "write -P 5 0 1M", "write -P 6 128M 1M", "flush")
    daemon.take_snapshot("disk@s")
    daemon.command("repo", "init", f"file://{directory}")
    daemon.command("repo", "push", "disk@s", f"file://{directory}")
    daemon.command("repo", "restore", f"file://{directory}", "disk@s", "lazy", "--lazy",
                   "--rate", "0")  # fmt: skip
    qemu_io(daemon, "lazy", "read -P 5 0 64k")
    directory.rename(tmp_path / "away")
    failed = run_qemu_io(daemon, "lazy", "read 128M 64k", check=False)
    assert "Input/output error" in failed.stdout + failed.stderr
    assert "of disk@s in file://" in daemon.read_log()
    qemu_io(daemon, "lazy", "read -P 5 0 64k", "write -P 1 64M 64k", "flush")
    (tmp_path / "away").rename(directory)
    qemu_io(daemon, "lazy", "read -P 6 128M 64k")
