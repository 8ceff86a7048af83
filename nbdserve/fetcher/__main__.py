"""The fetcher process; the daemon starts it: ``DATA LOG_LEVEL LOG_FORMAT DESCRIPTOR``."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

from nbdserve.fetcher.service import Service
from nbdserve.logs import Logs, write_logs


async def _run(data: Path, descriptor: int) -> None:
    await Service(socket.socket(fileno=descriptor), data).run()


def main() -> None:
    """Serve the daemon until it says stop."""
    # As for workers: the daemon decides when to end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    data, level, form, descriptor = sys.argv[1:]
    write_logs(Logs(level, form), "fetcher")
    asyncio.run(_run(Path(data), int(descriptor)))


if __name__ == "__main__":
    main()
