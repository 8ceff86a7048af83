"""The errors that a user may see.

Every one of them carries one clear line: what was wrong, and what to do. The command line prints
that line and exits with 1; the control socket sends it as JSON with the status of its class. All
rooms raise these, so they live in the lowest one.
"""


class StorageError(Exception):
    """Something that was asked for cannot be done; ``str(error)`` is one line for the user."""


class InvalidError(StorageError):
    """The request itself is wrong: a bad name, size or combination."""


class NotFoundError(StorageError):
    """A volume, snapshot, repository or object that was named does not exist."""


class ExistsError(StorageError):
    """The name is taken."""


class InUseError(StorageError):
    """Refused while clients, pushes, clones or another process use the thing."""


class NoSpaceError(StorageError):
    """The file system or the store is full, or too full for what was asked."""


class CorruptError(StorageError):
    """Stored bytes fail their check; the line names the file or object and the offset."""


class UnavailableError(StorageError):
    """A store or daemon did not answer, or refused the credentials."""


def one_line(error: BaseException) -> str:
    """What ``error`` says, without line breaks; its class when it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        line = str(error)
    return " ".join(line.split()) or type(error).__name__
