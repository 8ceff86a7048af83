"""A process that a block device depends on must not wait for that device.

When memory is short the kernel writes to disks and takes pages away; a keeper whose pages, or whose
next allocation, wait for the disk that it keeps would wait for ever.
"""

import ctypes
import os
from pathlib import Path
from typing import Final

_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_PR_SET_IO_FLUSHER: Final = 57
_NEVER_KILLED: Final = "-1000"


def stay_resident() -> list[str]:
    """Keep this process in memory and alive; return what could not be done, in words."""
    libc = ctypes.CDLL(None, use_errno=True)
    problems = []
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        problems.append(f"memory cannot be locked: {os.strerror(ctypes.get_errno())}")
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        problems.append(f"this is no I/O flusher: {os.strerror(ctypes.get_errno())}")
    try:
        Path("/proc/self/oom_score_adj").write_text(_NEVER_KILLED)
    except OSError as error:
        problems.append(f"the out-of-memory killer may come: {error.strerror}")
    return problems
