"""Errors as they travel over the control socket.

A :class:`StorageError` is sent as ``{"error": line, "kind": kind}`` with the status of its class
and raised again, as the same class, at the other end.
"""

from collections.abc import Mapping
from typing import NamedTuple

from backends.errors import (
    CorruptError,
    ExistsError,
    InUseError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    StorageError,
    UnavailableError,
    one_line,
)


class _Class(NamedTuple):
    error: type[StorageError]
    kind: str
    status: int


_CLASSES = (
    _Class(InvalidError, "invalid", 400),
    _Class(NotFoundError, "not-found", 404),
    _Class(ExistsError, "exists", 409),
    _Class(InUseError, "in-use", 409),
    _Class(CorruptError, "corrupt", 500),
    _Class(UnavailableError, "unavailable", 503),
    _Class(NoSpaceError, "no-space", 507),
)
_INTERNAL = _Class(StorageError, "internal", 500)


def to_document(error: StorageError) -> tuple[int, dict[str, str]]:
    """The status and the JSON object that say ``error``."""
    for entry in _CLASSES:
        if isinstance(error, entry.error):
            return entry.status, {"error": one_line(error), "kind": entry.kind}
    return _INTERNAL.status, {"error": one_line(error), "kind": _INTERNAL.kind}


def from_document(document: Mapping[str, object]) -> StorageError:
    """The error that ``document`` says."""
    kind = document.get("kind")
    for entry in _CLASSES:
        if entry.kind == kind:
            return entry.error(str(document["error"]))
    return StorageError(str(document["error"]))
