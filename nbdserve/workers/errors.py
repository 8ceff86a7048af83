"""Errors as they travel between the daemon and a worker, as plain data."""

import logging
from collections.abc import Sequence
from typing import Any

from backends import errors
from backends.errors import StorageError
from snapshots.host import HostLostError

_CLASSES: dict[str, type[StorageError]] = {
    found.__name__: found
    for found in (
        HostLostError,
        errors.InvalidError,
        errors.NotFoundError,
        errors.ExistsError,
        errors.InUseError,
        errors.NoSpaceError,
        errors.CorruptError,
        errors.UnavailableError,
    )
}

log = logging.getLogger(__name__)


def pack_error(error: BaseException) -> list[Any]:
    """What an error says; one that is no answer is a fault of ours, and logged."""
    if isinstance(error, StorageError):
        return [type(error).__name__, str(error)]
    if isinstance(error, OSError) and error.errno is not None:
        name = None if error.filename is None else str(error.filename)
        return ["OSError", error.strerror, error.errno, name]
    log.error("a call of the daemon failed", exc_info=error)
    return ["", f"internal error of a worker: {error!r}"]


def unpack_error(packed: Sequence[Any]) -> Exception:
    """Inverse of ``pack_error``."""
    kind, line, *rest = packed
    if kind == "OSError":
        number, name = rest
        return OSError(number, line) if name is None else OSError(number, line, name)
    return _CLASSES.get(kind, StorageError)(line)
