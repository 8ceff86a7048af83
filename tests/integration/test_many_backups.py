"""Hundreds of snapshots of a volume in a repository on a real S3 server.

By default some dozens; the environment, or `make torture`, makes them a thousand, and then the
times that it prints are worth something:

    NBDSERVE_BACKUPS=1000 pytest -s tests/integration/test_many_backups.py
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from snapshots.repository import Repository, init_repository, open_repository
from snapshots.repository.prune import carry_out, plan_prune
from snapshots.repository.retention import Rules
from tests.snapshots.repository.model import ModelSink, ModelVolume

from .parts import KIB, MIB, S3Server
from .test_backup import s3_repository

BACKUPS = int(os.environ.get("NBDSERVE_BACKUPS", "30"))
SEED = int(os.environ.get("NBDSERVE_BACKUPS_SEED", "1"))
SIZE = 8 * MIB
CHUNK_SIZE = 16 * KIB
KEPT = BACKUPS * 9 // 10  # by the first prune
VERIFIED = 20  # restored and compared, of those left; all of them are verified


@contextlib.contextmanager
def timed(what: str, repository: Repository) -> Iterator[None]:
    """Print how long something took, and how many requests of which kind."""
    requests: Counter[str] = Counter()
    client = repository.store._client  # type: ignore[attr-defined]  # of S3ObjectStore
    events = client.meta.events

    def count(model: object, **_: object) -> None:
        requests[model.name] += 1  # type: ignore[attr-defined]

    events.register("before-call.s3", count, unique_id=what)
    cpu, start = time.process_time(), time.monotonic()
    yield
    seconds = time.monotonic() - start
    events.unregister("before-call.s3", unique_id=what)
    found = ", ".join(f"{count} {name}" for name, count in requests.most_common())
    print(f"{what}: {seconds:.1f} s, {time.process_time() - cpu:.1f} s of CPU; {found}", flush=True)


def restored(repository: Repository, snapshot: str) -> bytes:
    sink = ModelSink(SIZE)
    repository.restore("disk", snapshot, sink)
    return hashlib.sha256(sink.data).digest()


@pytest.mark.timeout(300 + 3 * BACKUPS)
def test_any_of_many_snapshots_is_deleted_alone(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(SEED)
    with s3_repository(s3_server) as place:
        for name, value in place.env.items():
            monkeypatch.setenv(name, value)
        init_repository(place.url, CHUNK_SIZE)
        repository = open_repository(place.url)
        volume = ModelVolume("disk", SIZE)
        volume.data[: 2 * MIB] = dice.randbytes(2 * MIB)
        digests = {}
        with timed(f"{BACKUPS} pushes", repository):
            for number in range(BACKUPS):
                for _ in range(3):
                    offset = dice.randrange(SIZE // (4 * KIB)) * 4 * KIB
                    volume.data[offset : offset + 4 * KIB] = dice.randbytes(4 * KIB)
                source = volume.snapshot(f"s{number:04}")
                assert repository.push(source).parent == (f"s{number - 1:04}" if number else None)
                digests[source.snapshot] = hashlib.sha256(source.content).digest()
                for older in source.older[:1]:
                    older.content = b""

        with timed("list", repository):
            listed = [summary.snapshot for summary in repository.list("disk")]
        assert listed == list(digests)
        with timed("prune", repository):
            decisions = carry_out(repository, plan_prune(repository, "disk", Rules(last=KEPT)))
        assert len(decisions) == BACKUPS
        for snapshot in listed[:-KEPT]:
            del digests[snapshot]
        with timed("collect", repository):
            report = repository.collect()
        assert report.live == KEPT
        with timed("collect again", repository):
            repository.collect()

        # Any of them, in any order, and nothing else.
        doomed = dice.sample(list(digests), len(digests) // 3)
        with timed(f"{len(doomed)} deletions", repository):
            for snapshot in doomed:
                repository.delete("disk", snapshot)
                del digests[snapshot]
        with timed("collect", repository):
            repository.collect()
        with timed("verify --deep", repository):
            found = repository.verify(deep=True)
        assert (found.snapshots, found.damaged) == (len(digests), [])
        assert [summary.snapshot for summary in repository.list()] == list(digests)
        for snapshot in dice.sample(list(digests), min(VERIFIED, len(digests))):
            assert restored(repository, snapshot) == digests[snapshot]
