"""A worker process; the daemon starts it: ``DATA LOG_LEVEL LOG_FORMAT SLOW_SECONDS DESCRIPTOR``."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

from nbdserve.logs import Logs, write_logs
from nbdserve.workers.worker import Worker


async def _run(data: Path, slow_seconds: float, descriptor: int) -> None:
    await Worker(socket.socket(fileno=descriptor), data, slow_seconds).run()


def main() -> None:
    """Serve the daemon until it says stop."""
    # Whoever stops the daemon may send the same to all its processes: the daemon decides.
    # And a log line on a terminal that stops background processes for it must not stop us.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    data, level, form, slow, descriptor = sys.argv[1:]
    write_logs(Logs(level, form), "worker")
    asyncio.run(_run(Path(data), float(slow), int(descriptor)))


if __name__ == "__main__":
    main()
