"""From a repository's URL to its object store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from backends.errors import InvalidError
from backends.objects import ObjectStore, check_key


def open_object_store(
    url: str,
    *,
    create: bool = False,
    storage_class: str | None = None,
    bulk: str = "",
    at: float | None = None,
) -> ObjectStore:
    """Open ``file:///directory`` or ``s3://bucket/prefix``.

    With ``create`` a missing directory is made (its parent must exist); a bucket never is. Raises
    InvalidError for any other URL. Opening an S3 store sends nothing yet. How it keeps objects is
    said by the environment, see backends/s3_settings.py; ``storage_class`` wins over that, and is
    for keys that begin with ``bulk``. A bucket that keeps versions can be read as it was ``at``
    seconds since the epoch. A directory has neither classes nor versions: to ask is refused.
    """
    parts = urlsplit(url)
    # A URL with a password in it must not come back in a message.
    shown = repr(url) if "@" not in url else "the URL with the '@' in it"
    usage = "use file:///directory or s3://bucket/prefix"
    if parts.scheme not in ("file", "s3"):
        raise InvalidError(f"{shown} is not a repository: {usage}")
    if "@" in url or parts.query or parts.fragment:
        raise InvalidError(
            f"{shown} is not a repository: it may hold no user, query or fragment; {usage}"
        )
    # Each store brings imports that the other has no use for; botocore takes a quarter of a second.
    if parts.scheme == "file":
        from backends.directory_objects import DirectoryObjectStore  # noqa: PLC0415

        path = unquote(parts.path)
        if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
            raise InvalidError(f"{shown} needs an absolute path: file:///directory")
        if storage_class is not None:
            raise InvalidError(f"{shown} is a directory: only s3:// has storage classes")
        if at is not None:
            raise InvalidError(f"{shown} is a directory: only s3:// has older versions")
        return DirectoryObjectStore(Path(path), create=create)
    from backends.s3_objects import S3ObjectStore  # noqa: PLC0415
    from backends.s3_settings import settings_from_environment  # noqa: PLC0415

    prefix = parts.path.strip("/")
    if not parts.netloc:
        raise InvalidError(f"{shown} names no bucket: use s3://bucket/prefix")
    if prefix:
        check_key(prefix)
    store = S3ObjectStore(parts.netloc, prefix, settings_from_environment(storage_class, bulk))
    if at is None:
        return store
    from backends.s3_versions import S3ObjectsAt  # noqa: PLC0415

    return S3ObjectsAt(store, at)
