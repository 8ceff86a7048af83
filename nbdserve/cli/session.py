"""A command's connection to its data directory: the daemon's, or its own.

Each request looks for the control socket. With nobody there the command takes the lock and serves
the directory itself until it ends; when another process has just taken the lock, it waits for that
one's socket.
"""

import time
from pathlib import Path
from socket import socket
from types import TracebackType
from typing import TYPE_CHECKING, Self

from backends.errors import InUseError, NotFoundError, UnavailableError, one_line
from nbdserve.control import address
from nbdserve.control.client import Client

if TYPE_CHECKING:
    from nbdserve.control.offline import OfflineServer

PATIENCE = 15.0
"""Seconds to wait for a process that has the lock and does not serve yet."""


class Session:
    """Use as a context manager; ``client`` speaks to whoever serves ``data``."""

    def __init__(self, data: Path, *, create: bool = False) -> None:
        """``create`` makes a data directory where there is none."""
        self.data = data.absolute()
        self.client = Client(self._connect)
        self._offline: OfflineServer | None = None
        if self.data.exists() or not create:
            check_directory(data)

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
        deadline: float | None = None
        while True:
            connection = connect(self.data)
            if connection is not None:
                return connection
            # A server takes longer to import than all else, and most often there is a daemon.
            from nbdserve.control.offline import OfflineServer  # noqa: PLC0415

            try:
                self._offline = OfflineServer(self.data)
            except InUseError as error:
                if deadline is None:
                    deadline = time.monotonic() + PATIENCE
                wait_for_lock(error, deadline)


def check_directory(data: Path) -> None:
    """NotFoundError when there is no directory of that name."""
    if not data.is_dir():
        what = "is not a directory" if data.exists() else "does not exist"
        raise NotFoundError(f"data directory {data} {what}")


def connect(data: Path) -> socket | None:
    """A connection to whoever serves a data directory; None when nobody does. UnavailableError."""
    try:
        return address.connect(data)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except PermissionError:
        raise UnavailableError(
            f"no permission to use {data / address.NAME}: "
            "run the command as the user who runs the daemon"
        ) from None
    except OSError as error:
        raise UnavailableError(f"{data / address.NAME}: {one_line(error)}") from None


def wait_for_lock(error: InUseError, deadline: float) -> None:
    """Give who has the lock time to serve, or to let go of it; InUseError when it had enough."""
    if time.monotonic() > deadline:
        raise InUseError(f"{error}, which does not answer at its control socket") from None
    time.sleep(0.05)
