"""A process of the daemon's: a fresh program with one end of a channel as its way to the daemon.

It has the locked descriptor of the data directory too: while any such process of a killed daemon
lives, no other one can own the directory. That it has ended is known from the process itself (a
pidfd), whatever becomes of the channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nbdserve.workers.channel import Channel, Receiver


class Child:
    """One process from its start to its end; ``on_end`` is told its status, before ``ended`` is.

    ``python -m module`` gets ``arguments`` and the number of its end of the channel. OSError.
    """

    def __init__(
        self,
        module: str,
        arguments: tuple[str, ...],
        lock: int,
        receiver: Receiver,
        on_end: Callable[[int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lock),
                env={**os.environ, "PYTHONPATH": _module_path()},
                process_group=0,  # a terminal's Ctrl-C is for the daemon, which tells them
            )
            self._pidfd = os.pidfd_open(self._process.pid)
        except BaseException:
            ours.close()  # which ends a process that was started
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self.begun = self._loop.time()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self.channel = Channel(ours, receiver)
        self._loop.add_reader(self._pidfd, self._has_ended)

    def kill(self) -> None:
        """End it; ``on_end`` comes when it has ended."""
        self._process.kill()

    async def wait(self, seconds: float) -> bool:
        """Wait for its end, and kill it when that does not come; whether it came by itself."""
        try:
            await asyncio.wait_for(asyncio.shield(self.ended), seconds)
        except TimeoutError:
            self.kill()
            await self.ended
            return False
        return True

    def _has_ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        self.channel.close()
        self._on_end(status)
        self.ended.set_result(status)


def _module_path() -> str:
    """Where this process finds modules, for one that shall find the same."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
