"""A bucket that a repository shares with others: it never touches what is not its own."""

from __future__ import annotations

import random

import pytest

from snapshots.repository import Repository, init_repository, open_repository
from tests.integration.parts import S3Server
from tests.snapshots.repository.model import ModelSink, ModelSource, ModelVolume

pytestmark = pytest.mark.integration

KIB = 1024
PUSH = "0123456789abcdef" * 2
# Repositories beside a and in it, one of them where a has its segments.
PREFIXES = ["a-b", "a/b", "a/segments"]
FOREIGN = [
    "a", "a-", "A/config", "a/readme.txt", "a/config.old", "a/outcomes", "a/segments/notes.txt",
    f"a/segments/{PUSH}/00000000.bak", f"a/segments/{PUSH}/backup/00000000", "a/segments/x y&z=é",
    f"a/segments/{PUSH.upper()}/00000000", f"a/intents/{PUSH}/", f"a/outcomes/{PUSH}.txt",
    f"a/outcomes/x/{PUSH}", f"a/snapshots/web/{PUSH}", "a/snapshots/../config", "a//config",
    "a/plans/mine", "a/keys/mine", "a/tombstones/", "a/tombstones/of my cat", "a/roots/1/2/3",
    "segments.txt", "config/", "photos/cat.jpg", "segments/cat.jpg", "snapshots/of my cat.jpg",
    f"outcomes/{PUSH[:-1]}",
]  # fmt: skip


def objects_of(server: S3Server, bucket: str) -> dict[str, tuple[str, str]]:
    """Digest and time of every object of a bucket."""
    pages = server.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {
        item["Key"]: (item["ETag"], item["LastModified"].isoformat())
        for page in pages
        for item in page.get("Contents", [])
    }


def assert_restores(repository: Repository, source: ModelSource) -> None:
    sink = ModelSink(source.size)
    repository.restore("disk", source.snapshot, sink)
    same = sink.data == source.content
    assert same


@pytest.mark.parametrize("prefix", ["/a", ""])
def test_nothing_of_others_is_touched(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.new_bucket()
    rng = random.Random(1)
    volume = ModelVolume("disk", 256 * KIB)
    volume.data[:] = rng.randbytes(256 * KIB)
    others = {name: volume.snapshot(f"of-{name.replace('/', '-')}") for name in PREFIXES}
    for name, source in others.items():
        init_repository(f"s3://{bucket}/{name}", 4 * KIB).push(source)
    for key in FOREIGN:
        s3_server.client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    before = objects_of(s3_server, bucket)
    assert set(FOREIGN) <= before.keys()

    url = f"s3://{bucket}{prefix}"
    repository = init_repository(url, 4 * KIB)
    assert repository.list() == []
    kept: list[ModelSource] = []
    for number in range(3):
        place = 4 * KIB * number
        volume.data[place : place + 4 * KIB] = rng.randbytes(4 * KIB)
        kept.append(volume.snapshot(f"s{number}"))
        repository.push(kept[-1])
    repository.protect("disk", "s2")
    repository.delete("disk", "s0")
    for _ in range(2):  # what a repack leaves is freed by the next
        report = repository.collect(0)
        assert report.live == 2
    assert repository.verify(deep=True).damaged == []
    assert [item.snapshot for item in repository.list()] == ["s1", "s2"]
    for source in kept[1:]:
        assert_restores(repository, source)
    repository.unprotect("disk", "s2")
    repository.delete_all(repository.list())
    for _ in range(2):
        repository.collect(0)

    after = objects_of(s3_server, bucket)
    assert {key: after.get(key) for key in before} == before
    own = {key.removeprefix(prefix[1:] + "/" * bool(prefix)) for key in after.keys() - before}
    assert {key.split("/")[0] for key in own} <= {"config", "tombstones", "outcomes"}
    for name, source in others.items():
        other = open_repository(f"s3://{bucket}/{name}")
        assert other.verify().damaged == []
        assert_restores(other, source)
