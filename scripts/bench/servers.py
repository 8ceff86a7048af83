"""The servers: nbdserve's daemon with its command line, and the peers it is compared with."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nbdserve.control import address
from nbdserve.control.client import Client as Control
from nbdserve.control.client import path
from scripts.bench.process import read_resident_bytes, run, server

NBDSERVE = Path(sys.executable).with_name("nbdserve")
MAKE_CERTIFICATES = Path(__file__).resolve().parents[1] / "make-test-certificates"
EXPORT = "bench"
_STARTING_SECONDS = 10.0
_STANDSTILL = 0.5


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, and the root of its processes."""

    socket: Path
    pid: int

    def uri(self, export: str, *, tls: bool = False) -> str:
        """For libnbd, which does not ask for certificates when the socket is a Unix socket."""
        return f"nbd{'s' if tls else ''}+unix:///{export}?socket={self.socket}"


class Nbdserve:
    """A data directory of nbdserve; ``serving`` runs the daemon on it."""

    def __init__(self, data: Path, sockets: Path) -> None:
        self.data = data
        self.socket = sockets / "nbdserve.sock"
        self._log = sockets / "nbdserve.log"
        self.pid = 0

    @contextlib.contextmanager
    def serving(self, certificates: Path | None = None) -> Iterator[Server]:
        """The daemon, until the block ends; with certificates, for clients with and without TLS."""
        command: list[str | Path] = [
            "serve",
            "--data",
            self.data,
            "--listen",
            f"unix:{self.socket}",
        ]
        if certificates is not None:
            command += [
                "--tls", "optional", "--tls-certificate", certificates / "server-cert.pem",
                "--tls-key", certificates / "server-key.pem",
            ]  # fmt: skip
        with server(
            NBDSERVE, *command, log=self._log, is_ready=lambda: _accepts(self.socket)
        ) as process:
            self.pid = process.pid
            yield Server(self.socket, process.pid)

    def command(self, *arguments: str) -> None:
        """Run a command of the command line on it."""
        run(NBDSERVE, "--data", self.data, *arguments)

    def take_snapshot(self, volume: str, snapshot: str) -> None:
        """The same as the command does, without starting a Python for it."""
        control = Control(lambda: address.connect(self.data))
        control.post(path("snapshots"), {"snapshots": [f"{volume}@{snapshot}"]})

    def resident(self) -> int:
        """Bytes of memory of all its processes."""
        return read_resident_bytes(self.pid)

    def wait_until_started(self) -> None:
        """It listens before its workers have imported what they need: until memory stands still."""
        deadline = time.monotonic() + _STARTING_SECONDS
        before = 0
        while (now := self.resident()) != before and time.monotonic() < deadline:
            before = now
            time.sleep(_STANDSTILL)


class Peer:
    """A server that is to have TLS or not when it starts: started again when the other is wanted.

    ``start`` gets the directory of certificates, None for no TLS.
    """

    def __init__(
        self, certificates: Path, start: Callable[[Path | None], AbstractContextManager[Server]]
    ) -> None:
        self._certificates = certificates
        self._start = start
        self._running = contextlib.ExitStack()
        self._tls = False
        self._server: Server | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def serving(self, tls: bool) -> Server:
        """The server, running as wanted."""
        if self._server is None or tls != self._tls:
            self._running.close()
            self._server = self._running.enter_context(
                self._start(self._certificates if tls else None)
            )
            self._tls = tls
        return self._server


def make_certificates(directory: Path) -> Path:
    """A CA and a server's certificate; returns the directory."""
    run(MAKE_CERTIFICATES, directory)
    return directory


@contextlib.contextmanager
def nbdkit(image: Path, sockets: Path, certificates: Path | None = None) -> Iterator[Server]:
    """nbdkit's file plugin on a raw image, as it is without options."""
    where = sockets / "nbdkit.sock"
    where.unlink(missing_ok=True)  # which it leaves behind
    tls: list[str | Path] = (
        [] if certificates is None else ["--tls=require", f"--tls-certificates={certificates}"]
    )
    command = ("nbdkit", "--foreground", *tls, "--unix", where, "file", image)
    log = sockets / "nbdkit.log"
    with server(*command, log=log, is_ready=lambda: _accepts(where)) as process:
        yield Server(where, process.pid)


@contextlib.contextmanager
def qemu_nbd(
    image: Path, image_format: str, sockets: Path, certificates: Path | None = None
) -> Iterator[Server]:
    """qemu-nbd on an image; ``--persistent`` and ``--shared`` only let clients come and go."""
    where = sockets / f"{image_format}.sock"
    tls: list[str | Path] = [] if certificates is None else [
        "--object", f"tls-creds-x509,id=tls,dir={certificates},endpoint=server,verify-peer=no",
        "--tls-creds=tls",
    ]  # fmt: skip
    command = (
        "qemu-nbd", f"--socket={where}", f"--format={image_format}", f"--export-name={EXPORT}",
        "--persistent", "--shared=8", *tls, image,
    )  # fmt: skip
    log = sockets / f"{image_format}.log"
    with server(*command, log=log, is_ready=lambda: _accepts(where)) as process:
        yield Server(where, process.pid)


def _accepts(where: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(where))
        except OSError:
            return False
    return True
