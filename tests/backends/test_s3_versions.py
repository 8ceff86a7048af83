"""A bucket as it was: which version of an object counts at which time."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backends.errors import InvalidError, NotFoundError
from backends.s3_objects import S3ObjectStore, Version
from backends.s3_versions import S3ObjectsAt

# As S3 lists: by key, then newest first, versions before deletions.
VERSIONS = [
    Version("a", "a3", 30.0, 3),
    Version("a", "a1", 10.0, 1),
    Version("b", "b1", 10.0, 1),
    Version("gone", "g1", 10.0, 1),
    Version("same", "s2", 20.0, 2),
    Version("same", "s1", 20.0, 1),
    Version("a", "a2", 20.0, None),
    Version("gone", "g2", 10.5, None),
    Version("same", "s0", 20.0, None),
]


class Versions:
    """Stands in for the store."""

    def __init__(self) -> None:
        self.name = "s3://bucket"
        self.listings = 0
        self.stopped = False

    def list_versions(self) -> Iterator[Version]:
        self.listings += 1
        return iter(VERSIONS)

    def get(self, key: str, limit: int, version: str) -> bytes:
        return f"{key} {limit} {version}".encode()

    def get_range(self, key: str, offset: int, length: int, version: str) -> bytes:
        return f"{key} {offset} {length} {version}".encode()

    def stop_retrying(self) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (9.9, []),
        (10.0, [("a", 1), ("b", 1), ("gone", 1)]),
        (10.5, [("a", 1), ("b", 1)]),
        (20.0, [("b", 1), ("same", 2)]),
        (30.0, [("a", 3), ("b", 1), ("same", 2)]),
        (1e9, [("a", 3), ("b", 1), ("same", 2)]),
    ],
)
def test_what_there_was(at: float, expected: list[tuple[str, int]]) -> None:
    inner = Versions()
    store = S3ObjectsAt(cast(S3ObjectStore, inner), at)
    assert list(store.list("")) == expected
    there = dict(expected)
    for key in ("a", "b", "gone", "same", "other"):
        assert store.size(key) == there.get(key)
        assert list(store.list(key)) == [pair for pair in expected if pair[0] == key]
        if key not in there:
            for read in (lambda k=key: store.get(k, 1), lambda k=key: store.get_range(k, 0, 1)):
                with pytest.raises(NotFoundError, match=rf"{key} in s3://bucket as of"):
                    read()
    assert inner.listings == 1


def test_what_is_read_is_that_version() -> None:
    inner = Versions()
    store = S3ObjectsAt(cast(S3ObjectStore, inner), 25.0)
    assert store.get("same", 7) == b"same 7 s2"
    assert store.get_range("b", 1, 2) == b"b 1 2 b1"
    store.stop_retrying()
    assert inner.stopped


def test_the_past_is_not_written() -> None:
    store = S3ObjectsAt(cast(S3ObjectStore, Versions()), 25.0)
    for write in (
        lambda: store.put("b", b""),
        lambda: store.put_if_absent("new", b""),
        lambda: store.delete("b"),
        lambda: store.extend("b", 1e9),
    ):
        with pytest.raises(InvalidError, match=r"s3://bucket as of 1970-01-01T00:00:25Z"):
            write()


def test_listings_of_several_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = S3ObjectStore("bucket", "pre")
    asked: list[dict[str, Any]] = []

    def answer(**request: Any) -> dict[str, Any]:
        asked.append(request)
        time = SimpleNamespace(timestamp=lambda: 5.0)
        item = {"Key": "pre/a", "VersionId": f"v{len(asked)}", "LastModified": time, "Size": 4}
        following = {"NextKeyMarker": "pre/a", "NextVersionIdMarker": f"v{len(asked)}"}
        kind = "Versions" if len(asked) != 2 else "DeleteMarkers"
        return {kind: [item], "IsTruncated": len(asked) < 3, **following}

    client = SimpleNamespace(list_object_versions=answer)
    monkeypatch.setattr(store, "_client", client)
    found = list(store.list_versions())
    assert [(item.version, item.size) for item in found] == [("v1", 4), ("v2", None), ("v3", 4)]
    assert [request.get("VersionIdMarker") for request in asked] == [None, "v1", "v2"]
    assert {request["Prefix"] for request in asked} == {"pre/"}
