"""Letting guests go first: what works on a repository has time, and they wait for the daemon.

That is for commands whose session is their own, as under cron, systemd and setsid(1); in the
session of somebody's shell it is theirs to say. Where the kernel compares sessions first
(autogroup, sched(7)), the session as a whole gets a tenth of what others get that want a processor,
and its processes are preempted at once; elsewhere the process gets that.
"""

import os
from contextlib import suppress
from pathlib import Path

_TENTH = 10  # as a nice value
_PREEMPTED = 19  # as a nice value, within a session


def let_guests_go_first() -> None:
    """Lower the priority of this process; of its threads, of those that begin after this."""
    if os.getsid(0) != os.getpid():
        return
    try:
        Path("/proc/self/autogroup").write_text(str(_TENTH))
        nice = _PREEMPTED
    except OSError:  # the kernel does not group by session
        nice = _TENTH
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
