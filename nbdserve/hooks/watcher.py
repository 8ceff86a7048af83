"""The watcher: ``python -m nbdserve.hooks.watcher DESCRIPTOR``; see the package's text.

It reads a line of instructions, ``{"freeze", "thaw", "seconds", "environment"}``, and writes a line
about the freeze and one about the thaw. In between it waits for the end of what it reads.
"""

import json
import select
import signal
import socket
import sys
import time
from typing import Any

from nbdserve.hooks.commands import Outcome, run_hook, say, still_frozen, thaw


def watch(backup: socket.socket) -> None:
    """Freeze and thaw as the other end of the socket says."""
    with backup.makefile("rb") as reader:
        line = reader.readline()
    if not line.endswith(b"\n"):
        return
    told = json.loads(line)
    environment, seconds = told["environment"], told["seconds"]
    deadline = time.monotonic() + seconds
    frozen = run_hook("freeze", told["freeze"], environment, seconds, backup.fileno())
    _tell(backup, frozen)
    late = False
    if frozen.error is None:
        left = max(0.0, deadline - time.monotonic())
        late = not select.select([backup], [], [], left)[0]
    thawed = thaw(told["thaw"], environment, seconds)
    heard = _tell(backup, thawed, late=late)
    if frozen.lingers is not None:
        frozen.lingers.wait()
        thawed = thaw(told["thaw"], environment, seconds)
        heard = False
    if thawed.error is not None and not heard:
        say(still_frozen(thawed.error, thawed.attempts))


def _tell(backup: socket.socket, outcome: Outcome, **more: Any) -> bool:
    """Whether there is somebody to tell."""
    try:
        backup.sendall(json.dumps({**outcome.document(), **more}).encode() + b"\n")
    except OSError:
        return False
    return True


def main() -> None:
    """Watch, whoever wants it to end: the same may be sent to all processes of a backup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTTOU):
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, the hooks do not inherit it
    with socket.socket(fileno=int(sys.argv[1])) as backup:
        watch(backup)


if __name__ == "__main__":
    main()
