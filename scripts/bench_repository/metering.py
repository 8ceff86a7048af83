"""Run a command, and write what it took to a file as JSON.

    python -I -S metering.py FILE COMMAND [ARGUMENT...]

``seconds`` it ran, ``cpu`` seconds of its threads and of the children that it waited for, ``peak``
bytes of resident memory of the largest of these processes. Exits as the command did.

This is a program of its own because the kernel counts, in a process's peak, the memory of the one
that started it: so that one has to be small. It imports nothing but the standard library.
"""

import json
import os
import sys
import time


def main() -> int:
    """Run it; returns its exit status, 128 + N for signal N."""
    where, *command = sys.argv[1:]
    begin = time.monotonic()
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, used = os.wait4(child, 0)
    taken = {
        "seconds": time.monotonic() - begin,
        "cpu": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss << 10,
    }
    with open(where, "w", encoding="ascii") as file:
        json.dump(taken, file)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
