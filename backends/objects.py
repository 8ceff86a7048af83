"""The object store contract: immutable blobs under string keys.

A key is one or more components joined by ``/``; a component is letters, digits, ``.``, ``_`` and
``-``, and neither ``.`` nor ``..``. No object's key may be a folder of another's: not both ``a``
and ``a/b``. All methods block and may be called from any thread.

What every store promises:

- An object is seen whole or not at all, and at once by every later ``get``, ``size`` and ``list``
  (strong consistency).
- When ``put`` or ``put_if_absent`` returns, the object is durable.
- ``put_if_absent`` creates the object only where there is none; among many callers exactly one gets
  True. A call that fails with an error may still have taken effect, or take effect later: read the
  object back before deciding anything.

Errors are the children of :class:`backends.errors.StorageError`; their line names the store
and what to do, and never holds a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from backends.errors import InvalidError

MAX_KEY_LENGTH = 800  # S3 allows 1024 bytes, the bucket prefix included

_COMPONENT = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9._-]+\Z")
_KEY = re.compile(r"(?:(?!\.\.?/)[A-Za-z0-9._-]+/)*(?!\.\.?\Z)[A-Za-z0-9._-]+\Z")
_PREFIX = re.compile(r"[A-Za-z0-9._/-]*\Z")


class ObjectStore(Protocol):
    """Where immutable objects live. See the module's text for what is promised."""

    @property
    def name(self) -> str:
        """How messages call this store, such as ``s3://bucket/prefix at https://host``."""

    def put(self, key: str, data: bytes | bytearray) -> None:
        """Store ``data`` under ``key``, replacing what was there. ``data`` must not change."""

    def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
        """Store ``data`` under ``key`` unless there is an object: then False, and no change."""

    def get(self, key: str, limit: int) -> bytes:
        """Return the whole object.

        Raises NotFoundError when there is none, and CorruptError (before reading it) when it is
        longer than ``limit`` bytes.
        """

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``.

        Raises NotFoundError when there is no object, CorruptError when it ends before that.
        """

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield (key, size in bytes) of every object whose key starts with ``prefix``, by key."""

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes, or None when there is no such object."""

    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is no error."""

    def stop_retrying(self) -> None:
        """From now on let a call that fails fail at once, and one that waits for its turn fail.

        Somebody wants to leave.
        """


def check_key(key: str) -> str:
    """Return ``key``; raises InvalidError when it is none (see the module's text)."""
    if len(key) > MAX_KEY_LENGTH or not _KEY.match(key):
        raise InvalidError(f"{key[:MAX_KEY_LENGTH]!r} is not a valid object key")
    return key


def check_prefix(prefix: str) -> str:
    """Return ``prefix``; raises InvalidError when no key could start with it."""
    if len(prefix) > MAX_KEY_LENGTH or not _PREFIX.match(prefix) or ".." in prefix.split("/"):
        raise InvalidError(f"{prefix[:MAX_KEY_LENGTH]!r} is not a valid prefix of object keys")
    return prefix


def is_component(name: str) -> bool:
    """Tell whether ``name`` may stand between the slashes of a key."""
    return _COMPONENT.match(name) is not None
