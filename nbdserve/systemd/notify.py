"""What the daemon tells its service manager: datagrams to NOTIFY_SOCKET (sd_notify(3))."""

import logging
import os
import socket
import time
from collections.abc import MutableMapping

_PATIENCE = 1.0  # seconds that a full queue of the service manager's is waited for

log = logging.getLogger(__name__)


class Notifier:
    """``address`` None, or no one there: nothing is told, and nothing else happens."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """``ready`` follows, whatever becomes of it."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}", "STATUS=Reading the configuration")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", f"STATUS={status}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_PATIENCE)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("the service manager was not told %s: %s", lines[0], error.strerror)


def take_notifier(environment: MutableMapping[str, str] = os.environ) -> Notifier:
    """For the socket that the environment names, which then says nothing more."""
    address = environment.pop("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        return Notifier("\0" + address[1:])
    return Notifier(address if address.startswith("/") else None)
