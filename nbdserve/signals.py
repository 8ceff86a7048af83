"""What signals mean to the daemon.

SIGTERM and SIGINT stop it; a second one ends the process and its children at once. SIGHUP reads the
configuration again; one that comes before the daemon serves is kept until it does. But where the
terminal that the daemon runs on is closed, SIGHUP says that, and stops it.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from backends.errors import StorageError
from nbdserve.fetcher.process import FetcherProcess
from nbdserve.workers.host import WorkerHost

log = logging.getLogger(__name__)

_STOP: Final = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """``stop`` is set by the first signal that asks for it; ``started`` is set by the daemon."""

    def __init__(self, workers: Sequence[WorkerHost], fetcher: FetcherProcess) -> None:
        self.stop = asyncio.Event()
        self.started = asyncio.Event()
        self._hangup = asyncio.Event()
        self._workers = workers
        self._fetcher = fetcher
        self._has_terminal = _has_terminal()
        loop = asyncio.get_running_loop()
        for number in _STOP:
            loop.add_signal_handler(number, self._receive_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._receive_hangup)

    async def reload_at_hangup(self, reload: Callable[[], Awaitable[object]]) -> None:
        """Call ``reload`` at each SIGHUP, until this is cancelled."""
        await self.started.wait()
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            try:
                await reload()
            except StorageError:
                pass  # the log says what is wrong
            except Exception:
                log.exception("the configuration could not be read again")

    def _receive_stop(self, number: int) -> None:
        if self.stop.is_set():
            self._fetcher.kill()
            for worker in self._workers:
                worker.kill()
            os._exit(128 + number)
        self.stop.set()

    def _receive_hangup(self) -> None:
        if self._has_terminal and not _has_terminal():
            self.stop.set()
        else:
            self._hangup.set()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
