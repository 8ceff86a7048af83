"""A command's connection to its data directory: the daemon's, or its own.

Each request looks for the control socket. With nobody there the command takes the lock and serves
the directory itself until it ends; when another process has just taken the lock, it waits for that
one's socket.
"""

import time
from pathlib import Path
from socket import socket
from types import TracebackType
from typing import Self

from backends.errors import InUseError, NotFoundError, UnavailableError, one_line
from nbdserve.control import address
from nbdserve.control.client import Client
from nbdserve.control.offline import OfflineServer

_PATIENCE = 15.0
"""Seconds to wait for a process that has the lock and does not serve yet."""


class Session:
    """Use as a context manager; ``client`` speaks to whoever serves ``data``."""

    def __init__(self, data: Path, *, create: bool = False) -> None:
        """``create`` makes a data directory where there is none."""
        self.data = data.absolute()
        self.client = Client(self._connect)
        self._offline: OfflineServer | None = None
        if not self.data.is_dir():
            if self.data.exists():
                raise NotFoundError(f"data directory {data} is not a directory")
            if not create:
                raise NotFoundError(f"data directory {data} does not exist")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._offline is not None:
            interrupted = error is not None and not isinstance(error, Exception)
            self._offline.stop(at_once=interrupted)

    def _connect(self) -> socket:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return address.connect(self.data)
            except (FileNotFoundError, ConnectionRefusedError):
                pass
            except PermissionError:
                raise UnavailableError(
                    f"no permission to use {self.data / address.NAME}: "
                    "run the command as the user who runs the daemon"
                ) from None
            except OSError as error:
                raise UnavailableError(f"{self.data / address.NAME}: {one_line(error)}") from None
            try:
                self._offline = OfflineServer(self.data)
            except InUseError as error:
                if time.monotonic() > deadline:
                    raise InUseError(
                        f"{error}, which does not answer at its control socket"
                    ) from None
                time.sleep(0.05)
