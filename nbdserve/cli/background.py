"""Letting guests go first: what works on a repository has time, and they wait for the daemon.

A nice value counts between the processes of one session only, where the kernel groups processes by
session (autogroup, sched(7)): there the session as a whole has one, too. It is lowered where the
session is the command's own, as under cron, systemd and setsid(1), not that of somebody's shell.
"""

import os
from contextlib import suppress
from pathlib import Path

_NICE = 19
_SESSION_NICE = 10  # a tenth of the processors is left to it where others want all of them


def let_guests_go_first() -> None:
    """Lower the priority of this process; of its threads, of those that begin after this."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):  # a kernel without sessions' groups
            Path("/proc/self/autogroup").write_text(str(_SESSION_NICE))
