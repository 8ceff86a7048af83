"""Jobs are listed as long as their command lives; the history of backups outlives everything."""

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backends.errors import InvalidError, NotFoundError
from nbdserve.control import address, history
from nbdserve.control.client import Client, path
from nbdserve.control.history import MOST_REPOSITORIES, History
from nbdserve.control.offline import OfflineServer

MIB = 1 << 20
URL = "s3://bucket/prefix"
JOB = {"kind": "push", "volume": "a", "snapshot": "one", "repository": URL}
SUCCESS = {
    "repository_id": "r", "snapshot": "one", "created": 1000.0, "uploaded": 4096, "seconds": 1.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def volume(client: Client) -> None:
    client.post(path("volumes"), {"name": "a", "size": MIB})


def jobs(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(path("status"))["jobs"]
    return found


def records(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(path("status"))["history"]
    return found


def succeed(client: Client, volume: str = "a", repository: str = URL, **other: object) -> None:
    body = {"volume": volume, "repository": repository, **SUCCESS, **other}
    client.post(path("history"), body)


def fail(client: Client, why: str, repository: str = URL) -> None:
    client.post(path("history"), {"volume": "a", "repository": repository, "failure": why})


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that a closed connection brings about."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def again(server: OfflineServer, data: Path) -> tuple[OfflineServer, Client]:
    """The same directory, served anew."""
    server.stop(at_once=True)
    return OfflineServer(data), Client(partial(address.connect, data))


def test_a_job_is_listed_until_its_command_ends(client: Client) -> None:
    before = time.time()
    with client.stream("POST", path("jobs"), JOB) as claim:
        job = claim.first()["job"]
        (listed,) = jobs(client)
        assert before <= listed.pop("started") <= time.time()
        assert listed == {**JOB, "done": 0, "total": 0}
        client.post(path("jobs", job), {"done": 5, "total": 9})
        assert (jobs(client)[0]["done"], jobs(client)[0]["total"]) == (5, 9)
        succeed(client)
    assert jobs(client) == []
    with pytest.raises(NotFoundError):
        client.post(path("jobs", job), {"done": 5, "total": 9})
    assert records(client)[0]["last_failure"] is None


def test_a_push_that_ended_without_a_word_has_failed(client: Client) -> None:
    with client.stream("POST", path("jobs"), JOB) as claim:
        claim.first()
    wait_for(lambda: bool(records(client)))
    assert "ended without a word" in records(client)[0]["failure"]
    with client.stream(
        "POST", path("jobs"), {**JOB, "kind": "restore", "repository": "x"}
    ) as claim:
        claim.first()
    assert len(records(client)) == 1


def test_a_server_that_stops_makes_no_failure_of_a_job(
    client: Client, server: OfflineServer, data: Path
) -> None:
    with client.stream("POST", path("jobs"), JOB) as claim:
        claim.first()
        other, fresh = again(server, data)
        assert (jobs(fresh), records(fresh)) == ([], [])
        other.stop()


def test_jobs_are_bounded(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdserve.control.jobs.MOST_JOBS", 1)
    with client.stream("POST", path("jobs"), JOB) as claim:
        claim.first()
        with pytest.raises(Exception, match="under way"):
            client.stream("POST", path("jobs"), JOB)


def test_successes_and_failures_are_kept_over_restarts(
    client: Client, server: OfflineServer, data: Path
) -> None:
    before = time.time()
    succeed(client)
    fail(client, "the store\nis gone")
    (record,) = records(client)
    assert before <= record.pop("last_success") <= record.pop("last_failure") <= time.time()
    assert record == {
        "volume": "a", "repository": URL, "failure": "the store is gone", **SUCCESS,
    }  # fmt: skip
    listed = records(client)
    other, fresh = again(server, data)
    assert records(fresh) == listed
    other.stop()


def test_a_record_follows_its_volume(client: Client, server: OfflineServer, data: Path) -> None:
    succeed(client)
    client.post(path("volumes", "a", "rename"), {"name": "b"})
    assert [record["volume"] for record in records(client)] == ["b"]
    client.delete(path("volumes", "b"))
    client.post(path("volumes"), {"name": "a", "size": MIB})
    assert records(client) == []
    succeed(client)
    assert len(json.loads((data / history.FILE).read_text())["records"]) == 1
    with pytest.raises(NotFoundError, match="nothing"):
        succeed(client, "nothing")


def test_an_older_snapshot_makes_no_backup_younger(client: Client) -> None:
    succeed(client, snapshot="young", created=2000)
    before = records(client)
    succeed(client, snapshot="old", created=1999.5)
    assert records(client) == before
    succeed(client, snapshot="next", created=2001)
    assert records(client)[0]["snapshot"] == "next"
    succeed(client, snapshot="by a wrong clock", created=time.time() + 1000)
    succeed(client, snapshot="last", created=2002)
    assert records(client)[0]["snapshot"] == "last"


def test_a_record_can_be_forgotten(client: Client) -> None:
    succeed(client)
    where = path("history", volume="a", repository=URL)
    assert client.delete(where) == {"forgotten": True}
    assert client.delete(where) == {"forgotten": False}
    assert records(client) == []


def test_records_of_a_volume_are_bounded(client: Client) -> None:
    for number in range(MOST_REPOSITORIES + 3):
        succeed(client, repository=f"s3://bucket/{number:02}")
    kept = [record["repository"] for record in records(client)]
    assert kept == [f"s3://bucket/{number:02}" for number in range(3, MOST_REPOSITORIES + 3)]
    fail(client, "x" * 100_000, kept[0])
    assert len(records(client)[0]["failure"]) <= history.MOST_TEXT


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff", b'{"version": 2, "records": []}', b'{"version": 1}',
        b'{"version": 1, "records": [{"volume": "a"}]}',
        b'{"version": 1, "records": [{"volume": "a", "repository": 5}]}',
        b'{"version": 1, "records": [{"volume": "a", "repository": "b", "last_success": "now"}]}',
        b'{"version": 1, "records": [{"volume": "a", "repository": "b", "last_success": NaN}]}',
        b'{"version": 1, "records": [{"volume": "a", "repository": "b", "more": 1}]}',
        b'{"version": 1, "records": ' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_file_is_put_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / history.FILE
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert History(file, dict).records() == []
    assert "is damaged" in caplog.text
    assert len(caplog.text.splitlines()) == 1
    assert (tmp_path / "backups.json.damaged").read_bytes() == content
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_a_warning(
    client: Client, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "backups.json.new").mkdir()
    with caplog.at_level(logging.WARNING):
        succeed(client)
    assert "cannot be noted" in caplog.text
    assert len(records(client)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "dance"}, {"volume": ""}, {"repository": "s3://me:secret@host"},
        {"snapshot": "x" * 5000}, {"more": 1}, {"repository": "a\nb"},
    ],
)  # fmt: skip
def test_jobs_that_are_none(client: Client, change: dict[str, object]) -> None:
    with pytest.raises(InvalidError):
        client.stream("POST", path("jobs"), {**JOB, **change})
    assert jobs(client) == []


@pytest.mark.parametrize(
    "change",
    [{"uploaded": 1.5}, {"uploaded": -1}, {"seconds": True}, {"created": "now"}, {"created": None}],
)
def test_outcomes_that_are_none(client: Client, change: dict[str, object]) -> None:
    with pytest.raises(InvalidError):
        succeed(client, **change)
    assert records(client) == []
