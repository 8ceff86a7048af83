"""The servers: nbdserve's daemon with its command line, and the peers it is compared with."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdserve.control import address
from nbdserve.control.client import Client as Control
from nbdserve.control.client import path
from scripts.bench.process import read_resident_bytes, run, server

NBDSERVE = Path(sys.executable).with_name("nbdserve")
EXPORT = "bench"


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, and the root of its processes."""

    socket: Path
    pid: int

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"


class Nbdserve:
    """A data directory of nbdserve; ``serving`` runs the daemon on it."""

    def __init__(self, data: Path, sockets: Path) -> None:
        self.data = data
        self.socket = sockets / "nbdserve.sock"
        self._log = sockets / "nbdserve.log"
        self.pid = 0

    @contextlib.contextmanager
    def serving(self) -> Iterator[Server]:
        """The daemon, until the block ends."""
        command = ("serve", "--data", self.data, "--listen", f"unix:{self.socket}")
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


@contextlib.contextmanager
def nbdkit(image: Path, sockets: Path) -> Iterator[Server]:
    """nbdkit's file plugin on a raw image, as it is without options."""
    where = sockets / "nbdkit.sock"
    command = ("nbdkit", "--foreground", "--unix", where, "file", image)
    log = sockets / "nbdkit.log"
    with server(*command, log=log, is_ready=lambda: _accepts(where)) as process:
        yield Server(where, process.pid)


@contextlib.contextmanager
def qemu_nbd(image: Path, image_format: str, sockets: Path) -> Iterator[Server]:
    """qemu-nbd on an image; ``--persistent`` and ``--shared`` only let clients come and go."""
    where = sockets / f"{image_format}.sock"
    command = (
        "qemu-nbd", f"--socket={where}", f"--format={image_format}", f"--export-name={EXPORT}",
        "--persistent", "--shared=8", image,
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
