"""A repository under Object Lock, and somebody with its credentials who wants it gone."""

from __future__ import annotations

import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from backends.errors import InvalidError, StorageError
from snapshots.repository import ObjectLock, init_repository, open_in_store, open_repository
from snapshots.repository.repository import open_store
from tests.integration.parts import S3Server
from tests.snapshots.repository.model import ModelSink, ModelVolume

pytestmark = pytest.mark.integration

MIB = 1 << 20
DAY = 86400


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket that was made with Object Lock."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    name = f"locked-{random.randrange(1 << 60):x}"
    s3_server.client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    return name


def assert_same(one: bytes | bytearray, other: bytes | bytearray) -> None:
    """Without megabytes of explanation."""
    same = one == other
    assert same


def destroy(s3_server: S3Server, bucket: str) -> tuple[int, list[str]]:
    """Do what can be done; how many versions there were, and the keys of those that went."""
    client = s3_server.client
    versions = client.list_object_versions(Bucket=bucket)["Versions"]
    # What init probed the store with is nothing that a snapshot needs, and not retained.
    versions = [version for version in versions if "/probes/" not in version["Key"]]
    gone: list[str] = []
    for version in versions:
        where = {"Bucket": bucket, "Key": version["Key"], "VersionId": version["VersionId"]}
        soon = datetime.now(UTC) + timedelta(seconds=1)
        for mode in ("COMPLIANCE", "GOVERNANCE"):
            with pytest.raises(ClientError):
                client.put_object_retention(
                    **where,
                    Retention={"Mode": mode, "RetainUntilDate": soon},
                    BypassGovernanceRetention=True,
                )
        try:
            client.delete_object(**where, BypassGovernanceRetention=True)
        except ClientError:
            continue
        gone.append(version["Key"])
    for key in {version["Key"] for version in versions}:
        client.delete_object(Bucket=bucket, Key=key)
        if not key.endswith("7"):  # of some only the deletion, of others new content, too
            client.put_object(Bucket=bucket, Key=key, Body=b"ransom")
    with pytest.raises(ClientError):
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    with pytest.raises(ClientError):
        client.delete_bucket(Bucket=bucket)
    return len(versions), gone


def test_what_was_acknowledged_survives_everything(
    s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    url = f"s3://{bucket}/tenant"
    lock = ObjectLock("COMPLIANCE", DAY)
    assert init_repository(url, 65536, object_lock=lock).config.object_lock == lock
    volume = ModelVolume("disk", 4 * MIB)
    rng = random.Random(1)
    volume.data[: 2 * MIB] = rng.randbytes(2 * MIB)
    repository = open_repository(url)
    repository.push(volume.snapshot("one"))
    volume.data[MIB : MIB + 9] = b"different"
    second = repository.push(volume.snapshot("two"))
    assert second.parent == "one"
    acknowledged = datetime.now(UTC)

    # First with the program's own means, then with those of S3.
    for snapshot in ("one", "two"):
        repository.delete("disk", snapshot)
    repository.collect()
    assert repository.list() == []
    there, gone = destroy(s3_server, bucket)
    assert there > 8
    assert gone == []
    with pytest.raises(StorageError):
        open_repository(url)

    past = open_in_store(open_store(url, at=acknowledged.timestamp()))
    assert [item.snapshot for item in past.list()] == ["one", "two"]
    assert past.verify(deep=True).damaged == []
    for source in volume.taken:
        sink = ModelSink(source.size)
        past.restore("disk", source.snapshot, sink)
        assert_same(sink.data, source.content)
    with pytest.raises(InvalidError, match="the past is only read"):
        past.delete("disk", "one")

    # And from the command line.
    image = tmp_path / "image"
    command = [sys.executable, "-m", "nbdserve", "repo", "export", url, "disk@two", image]
    subprocess.run([*command, "--at", acknowledged.isoformat()], check=True, timeout=120)
    assert_same(image.read_bytes(), volume.taken[1].content)


def test_retention_is_extended_and_never_shortened(s3_server: S3Server, bucket: str) -> None:
    url = f"s3://{bucket}"
    repository = init_repository(url, 65536, object_lock=ObjectLock("GOVERNANCE", DAY))
    store = open_store(url)
    assert repository.store.size("config") is not None

    def retained() -> float:
        found = s3_server.client.get_object_retention(Bucket=bucket, Key="config")["Retention"]
        assert found["Mode"] == "GOVERNANCE"
        return found["RetainUntilDate"].timestamp()

    now = datetime.now(UTC).timestamp()
    assert now + 1.4 * DAY < retained() < now + 1.6 * DAY
    repository.store.extend("config", now + 9 * DAY)  # type: ignore[attr-defined]
    assert now + 9 * DAY <= retained() <= now + 9 * DAY + 2
    repository.store.extend("config", now + 8 * DAY)  # type: ignore[attr-defined]
    assert now + 9 * DAY <= retained()
    store.delete("config")
    with pytest.raises(StorageError, match="config"):
        repository.store.extend("config", now + 10 * DAY)  # type: ignore[attr-defined]


def test_a_bucket_without_object_lock(s3_server: S3Server, bucket: str) -> None:
    del bucket  # of the fixture only the environment is wanted
    without = s3_server.new_bucket()
    url = f"s3://{without}/x"
    lock = ["--object-lock", "30d"]
    for arguments, words in (
        ([url, *lock], "was made without Object Lock"),
        (["s3://no-bucket-here/x", *lock], "no such bucket"),
        ([url, "--object-lock", "1h"], "one day"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "nbdserve", "repo", "init", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 1, done
        assert done.stderr.startswith("nbdserve: ")
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
    assert s3_server.list_sizes(without) == {}
