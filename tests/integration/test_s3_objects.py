"""The S3 object store, and a repository in it, against a real radosgw."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends.errors import NotFoundError, StorageError, UnavailableError
from backends.object_urls import open_object_store
from backends.objects import ObjectStore
from snapshots.repository import Repository, init_repository, open_repository
from tests.backends.test_objects_contract import ObjectStoreContract
from tests.integration.parts import S3Server
from tests.snapshots.repository.model import ModelSink, ModelSource, ModelVolume

pytestmark = pytest.mark.integration

MIB = 1 << 20


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()


class TestS3Objects(ObjectStoreContract):
    @pytest.fixture(params=["", "/pre/fix"])
    def make(self, bucket: str, request: pytest.FixtureRequest) -> Callable[[], ObjectStore]:
        return lambda: open_object_store(f"s3://{bucket}{request.param}")


def test_a_list_of_several_answers(bucket: str) -> None:
    store = open_object_store(f"s3://{bucket}/many")
    keys = [f"key/{number:05d}" for number in range(1050)]
    for key in keys:
        store.put(key, b"x")
    assert [key for key, _ in store.list("key/")] == keys
    assert list(open_object_store(f"s3://{bucket}").list("key/")) == []


def test_wrong_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{bucket}/prefix"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecret")
    with pytest.raises(UnavailableError, match=rf"{bucket}.*AWS_SECRET_ACCESS_KEY") as caught:
        open_repository(url)
    assert "wrongsecret" not in str(caught.value)
    with pytest.raises(UnavailableError, match=bucket):
        init_repository(url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(UnavailableError, match=rf"{bucket}.*AWS_ACCESS_KEY_ID"):
        open_repository(url)


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UnavailableError, match="no usable AWS credentials"):
        open_repository(f"s3://{bucket}/prefix")


@pytest.mark.usefixtures("bucket")
def test_no_such_bucket() -> None:
    for use in (open_repository, init_repository):
        with pytest.raises(NotFoundError, match="no such bucket; create no-bucket-here first"):
            use("s3://no-bucket-here/prefix")


def test_no_repository(bucket: str) -> None:
    with pytest.raises(NotFoundError, match="repo init"):
        open_repository(f"s3://{bucket}/prefix")


def test_endpoint_down(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
        with pytest.raises(UnavailableError, match=rf"{endpoint}.*AWS_ENDPOINT_URL"):
            open_repository(f"s3://{bucket}/prefix")


def test_a_repository(bucket: str) -> None:
    url = f"s3://{bucket}/some/where"
    made = init_repository(url)
    assert made.config.conditional_put and made.notice is None
    repository = open_repository(url)
    volume = ModelVolume("disk", 128 * MIB)
    rng = random.Random(1)
    volume.data[: 40 * MIB] = rng.randbytes(40 * MIB)
    volume.data[100 * MIB : 110 * MIB] = b"compresses well " * (10 * MIB // 16)
    first = repository.push(volume.snapshot("one"))
    assert first.segments >= 3
    volume.data[7 * MIB : 8 * MIB] = rng.randbytes(MIB)
    volume.data[20 * MIB : 21 * MIB] = bytes(MIB)
    second = repository.push(volume.snapshot("two"))
    assert second.parent == "one"
    assert second.uploaded < 0.03 * first.uploaded
    assert second.read == MIB
    assert repository.verify(deep=True).damaged == []
    for source in volume.taken:
        sink = ModelSink(source.size)
        repository.restore("disk", source.snapshot, sink)
        assert sink.data == source.content
    repository.delete("disk", "one")
    assert [item.snapshot for item in repository.list()] == ["two"]
    sink = ModelSink(volume.taken[1].size)
    repository.restore("disk", "two", sink)
    assert sink.data == volume.taken[1].content


def test_deletes_free_space(bucket: str) -> None:
    """Twenty snapshots; pushes, deletes and collections at the same time, from several hosts."""
    url = f"s3://{bucket}/collected"
    init_repository(url, 4096)
    volume = ModelVolume("disk", 4 * MIB)
    rng = random.Random(1)
    volume.data[:MIB] = rng.randbytes(MIB)
    for number in range(20):
        place = rng.randrange(256) * 4096
        volume.data[place : place + 4096] = rng.randbytes(4096)
        volume.snapshot(f"s{number}")
    for source in volume.taken[:10]:
        open_repository(url).push(source)

    def push() -> None:
        for source in volume.taken[10:]:
            open_repository(url).push(source)

    def delete() -> None:
        repository = open_repository(url)
        for source in volume.taken[:10:2]:
            repository.delete("disk", source.snapshot)

    def collect() -> None:
        for _ in range(2):
            open_repository(url).collect()

    with ThreadPoolExecutor(4) as pool:
        for work in [pool.submit(work) for work in (push, delete, collect, collect)]:
            work.result()
    repository = open_repository(url)
    left = [source for source in volume.taken if source not in volume.taken[:10:2]]
    assert [item.snapshot for item in repository.list()] == [source.snapshot for source in left]
    for source in left:
        sink = ModelSink(source.size)
        repository.restore("disk", source.snapshot, sink)
        assert sink.data == source.content
    assert repository.verify(deep=True).damaged == []
    stored = sum(size for _, size in repository.store.list(""))
    repository.delete_all(repository.list())
    report = repository.collect()
    assert (report.live, report.under_way) == (0, 0)
    repository.collect()  # the tombstone of a repack, perhaps
    after = list(repository.store.list(""))
    assert {key.split("/")[0] for key, _ in after} <= {"config", "tombstones", "outcomes"}
    assert sum(size for _, size in after) < 0.02 * stored


def push_random(url: str, snapshot: str = "one", seed: int = 1) -> ModelSource:
    """Store a snapshot of some random data at a repository."""
    content = random.Random(seed).randbytes(MIB)
    source = ModelSource("disk", snapshot, f"id-{snapshot}", 1.0, content)
    open_repository(url).push(source)
    return source


def assert_restores(repository: Repository, source: ModelSource) -> None:
    sink = ModelSink(source.size)
    repository.restore("disk", source.snapshot, sink)
    assert sink.data == source.content


def test_the_storage_class_is_for_segments(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/cold"
    monkeypatch.setenv("NBDSERVE_S3_STORAGE_CLASS", "STANDARD_IA")
    init_repository(url)
    source = push_random(url)
    assert_restores(open_repository(url), source)
    found = s3_server.client.list_objects_v2(Bucket=bucket)["Contents"]
    classes = {item["Key"].split("/")[1]: item["StorageClass"] for item in found}
    assert classes.pop("segments") == "STANDARD_IA"
    assert set(classes.values()) == {"STANDARD"}
    assert {"config", "outcomes", "pages", "snapshots"} <= classes.keys()
    monkeypatch.setenv("NBDSERVE_S3_STORAGE_CLASS", "NO_SUCH_CLASS")
    with pytest.raises(StorageError, match="NBDSERVE_S3_STORAGE_CLASS"):
        push_random(url, "two", seed=2)


def test_encryption_with_a_customers_key(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/sealed"
    for number in range(2):
        (tmp_path / f"key{number}").write_text(f"{number}" * 64)
    monkeypatch.setenv("NBDSERVE_S3_SSE_C_KEY_FILE", str(tmp_path / "key0"))
    init_repository(url)
    source = push_random(url)
    repository = open_repository(url)
    assert repository.verify(deep=True).damaged == []
    assert_restores(repository, source)
    assert repository.store.size("config") is not None
    monkeypatch.setenv("NBDSERVE_S3_SSE_C_KEY_FILE", str(tmp_path / "key1"))
    with pytest.raises(UnavailableError, match="check NBDSERVE_S3_SSE_C_KEY_FILE"):
        open_repository(url)
    monkeypatch.delenv("NBDSERVE_S3_SSE_C_KEY_FILE")
    with pytest.raises(UnavailableError, match=r"customer's key.*NBDSERVE_S3_SSE_C_KEY_FILE"):
        open_repository(url)


def test_encryption_with_a_key_of_kms(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/kms"
    monkeypatch.setenv("NBDSERVE_S3_SSE", "aws:kms")
    monkeypatch.setenv("NBDSERVE_S3_SSE_KMS_KEY_ID", "test-key")
    init_repository(url)
    source = push_random(url)
    for key in s3_server.list_sizes(bucket):
        head = s3_server.client.head_object(Bucket=bucket, Key=key)
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "test-key")
    for name in ("NBDSERVE_S3_SSE", "NBDSERVE_S3_SSE_KMS_KEY_ID"):
        monkeypatch.delenv(name)
    assert_restores(open_repository(url), source)  # the server has the key


def test_encryption_that_the_server_does_not_know(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This radosgw takes AES256 and stores in plain, without a word."""
    monkeypatch.setenv("NBDSERVE_S3_SSE", "AES256")
    with pytest.raises(StorageError, match="ignores server-side encryption with AES256"):
        init_repository(f"s3://{bucket}/plain")
    assert s3_server.list_sizes(bucket) == {}
