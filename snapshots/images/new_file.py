"""Making a file that is there whole or not at all.

It is written under another name in the same directory, made durable, and then given its name. What
was there before stays until then, and is never replaced unless that is asked for; its permissions
are then those of the new one. Only a SIGKILL or a power cut leaves the other name behind,
``.nbdserve-….part``.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from backends.errors import (
    ExistsError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    StorageError,
    one_line,
)


class NewFile:
    """Use as a context manager, and ``open`` it inside.

    Leaving it without ``commit`` removes what was written.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        """Refuse at once what cannot become a file: StorageErrors whose line names it."""
        self.path = path
        self.descriptor = -1
        self._replace = replace
        self._mode: int | None = None  # of what is replaced
        self._hidden = path.parent / f".nbdserve-{secrets.token_hex(8)}.part"
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from None
        if not replace:
            raise self._exists()
        if not stat.S_ISREG(found.st_mode):
            raise InvalidError(f"{path} is no regular file, and is not replaced")
        self._mode = stat.S_IMODE(found.st_mode)

    def __enter__(self) -> Self:
        return self  # nothing is made yet: an interruption here would leave it behind

    def open(self) -> int:
        """Begin the file; returns its descriptor, which is closed at the end. StorageError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            if self._mode is None:
                self.descriptor = os.open(self._hidden, flags, 0o666)
            else:
                self.descriptor = os.open(self._hidden, flags, 0o600)
                os.fchmod(self.descriptor, self._mode)
        except FileNotFoundError:
            raise NotFoundError(f"there is no directory {self.path.parent}") from None
        except OSError as error:
            raise self.failure(error) from error
        return self.descriptor

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self._hidden.unlink(missing_ok=True)

    def commit(self) -> None:
        """Make the content durable and give the file its name; OSError, ExistsError."""
        os.fsync(self.descriptor)
        if self._replace:
            self._hidden.rename(self.path)
        else:
            self._link()
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def failure(self, error: OSError) -> StorageError:
        """What to raise for an error while the file was written."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpaceError(f"no space left for {self.path}; nothing was made")
        return StorageError(f"cannot write {self.path}: {error.strerror or one_line(error)}")

    def _link(self) -> None:
        """Take the name only if it is free, which a rename cannot."""
        try:
            self.path.hardlink_to(self._hidden)
        except FileExistsError:
            raise self._exists() from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if os.path.lexists(self.path):  # a file system without links, such as FAT
                raise self._exists() from None
            self._hidden.rename(self.path)

    def _exists(self) -> ExistsError:
        return ExistsError(f"{self.path} exists: choose another name, or replace it with --force")
