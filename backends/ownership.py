"""Whose the files of a data directory are, when root works in one that is another user's.

The daemon of a package runs as a user of its own, and its administrator runs commands as root. What
they make in the data directory is given to whoever owns that, or the daemon could not open it.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path


def give_to_owner(directory: Path) -> None:
    """Give all that is root's below ``directory`` to the directory's owner; OSError.

    For root alone: nothing is done by others, or where the directory is root's itself. Symbolic
    links are not followed, and files with a second name are left alone: that may be elsewhere.
    """
    owner = directory.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        return
    for _, directories, files, descriptor in os.fwalk(directory, follow_symlinks=False):
        for name in (*directories, *files):
            with suppress(FileNotFoundError):  # the daemon is at work, too
                found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if found.st_uid != 0 or (not stat.S_ISDIR(found.st_mode) and found.st_nlink > 1):
                    continue
                os.chown(name, owner.st_uid, owner.st_gid, dir_fd=descriptor, follow_symlinks=False)
