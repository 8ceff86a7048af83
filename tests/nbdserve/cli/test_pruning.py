"""repo prune, protect, unprotect, and backup with rules, from the command line."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from backends.errors import UnavailableError
from nbdserve.cli import backup_run
from snapshots.repository import PushReport, Repository, open_repository
from snapshots.repository.layout import pointer_key
from snapshots.repository.records import Pointer
from tests.nbdserve.volume_content import write

from .conftest import CommandLine

RULES = ["last", "hourly", "daily", "weekly", "monthly", "yearly"]


@pytest.fixture
def url(tmp_path: Path, cli: CommandLine) -> str:
    """A repository, and volumes a and b with a little data."""
    where = f"file://{tmp_path}/repository"
    cli.done("repo", "init", where)
    for volume in ("a", "b"):
        cli.done("volume", "create", volume, "--size", "1M")
        write(cli.data, volume, 0, b"x" * 8192)
    return where


def push(cli: CommandLine, url: str, *snapshots: str) -> None:
    for snapshot in snapshots:
        cli.done("snapshot", "create", snapshot)
        cli.done("repo", "push", snapshot, url)


def names(cli: CommandLine, url: str, volume: str = "a") -> list[str]:
    return [found["snapshot"] for found in cli.json("repo", "list", url, volume)["snapshots"]]


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of backups are a second apart, without waiting for it."""
    count = iter(range(60))

    class Clock:
        @staticmethod
        def now(zone: object) -> datetime:
            return datetime(2026, 1, 2, 3, 4, next(count), tzinfo=UTC)

    monkeypatch.setattr(backup_run, "datetime", Clock)


def test_a_dry_run_explains_and_deletes_nothing(cli: CommandLine, url: str) -> None:
    push(cli, url, "a@one", "a@two", "a@three", "b@one")
    cli.done("repo", "protect", url, "a@one")
    text = cli.done("repo", "prune", url, "a", "--keep-last", "1", "--dry-run")
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        "SNAPSHOT", "a@three", "a@two", "a@one", "would delete 1 of 3 snapshots of a, 2 kept",
    ]  # fmt: skip
    assert "last 1 of 1" in text
    assert "no rule keeps it" in text
    assert "protected" in text
    planned = cli.json("repo", "prune", url, "a", "--keep-last", "1", "--dry-run")
    assert names(cli, url) == ["one", "two", "three"]

    done = cli.json("repo", "prune", url, "a", "--keep-last", "1")
    assert {**done, "dry_run": True} == planned
    assert {key: done[key] for key in ("volume", "dry_run", "kept", "deleted", "left")} == {
        "volume": "a", "dry_run": False, "kept": 2, "deleted": 1, "left": 0,
    }  # fmt: skip
    assert set(done["snapshots"][0]) == {"snapshot", "push", "created", "action", "reasons"}
    assert names(cli, url) == ["one", "three"]
    assert names(cli, url, "b") == ["one"]
    assert "deleted 0 of 2" in cli.done("repo", "prune", url, "a", "--keep-within", "1h")


def test_without_a_rule_it_is_wrong_usage(cli: CommandLine, url: str) -> None:
    push(cli, url, "a@one", "a@two")
    for options in (
        [],
        ["--dry-run"],
        *(["--keep-" + rule, value] for rule in RULES for value in ("0", "-1", "all", "")),
        ["--keep-within", "0d"],
        ["--keep-within", "month"],
        ["--keep-last", "1", "--keep-daily", "0"],
    ):
        outcome = cli("repo", "prune", url, "a", *options)
        assert outcome.status == 2, options
        assert outcome.line
        if options:
            backup = cli("backup", "a", "--repo", url, *options)
            assert backup.status == 2, options
    assert names(cli, url) == ["one", "two"]


def test_names_that_are_not_there(cli: CommandLine, url: str) -> None:
    assert "no snapshot of a" in cli("repo", "prune", url, "a", "--keep-last", "1").line
    assert "name" in cli("repo", "prune", url, "a/b", "--keep-last", "1").line
    for command in ("protect", "unprotect"):
        assert "a@one" in cli("repo", command, url, "a@one").line
        assert "VOLUME@SNAPSHOT" in cli("repo", command, url, "a").line


def test_a_protected_snapshot_is_listed_so_and_cannot_be_deleted(
    cli: CommandLine, url: str
) -> None:
    push(cli, url, "a@one")
    assert cli.json("repo", "list", url)["snapshots"][0]["protected"] is False
    assert cli.json("repo", "protect", url, "a@one")["protected"]["snapshot"] == "one"
    assert cli.json("repo", "list", url)["snapshots"][0]["protected"] is True
    assert "yes" in cli.done("repo", "list", url).splitlines()[1].split()
    refused = cli("repo", "delete", url, "a@one")
    assert refused.status == 1
    assert "repo unprotect" in refused.line
    assert cli.json("repo", "unprotect", url, "a@one")["unprotected"]["snapshot"] == "one"
    cli.done("repo", "delete", url, "a@one")


def test_times_that_no_calendar_has_are_shown_and_left_alone(cli: CommandLine, url: str) -> None:
    push(cli, url, "a@one", "a@two", "a@three")
    repository = open_repository(url)
    for name, created in (("one", 9.9e11), ("two", -9.9e11)):
        summary = repository.find("a", name)
        forged = dataclasses.replace(summary, created=created)
        repository.store.put(pointer_key("a", name, summary.push), Pointer(forged).encode())
    years = [found["created"][:4] for found in cli.json("repo", "list", url)["snapshots"]]
    assert years[0] == "0001"
    assert years[-1] == "9999"
    assert cli.json("repo", "prune", url, "a", "--keep-last", "1")["left"] == 2


@pytest.mark.usefixtures("seconds")
def test_a_backup_prunes_what_backups_made(cli: CommandLine, url: str) -> None:
    push(cli, url, "a@release", "b@release")
    made = []
    for _ in range(4):
        report = cli.json("backup", "a", "b", "--repo", url, "--keep-last", "2")["backups"]
        made.append(report[0]["snapshot"])
    assert report[1]["prune"]["deleted"] == 1
    assert report[1]["prune"]["left"] == 1
    for volume in ("a", "b"):
        assert names(cli, url, volume) == ["release", *made[-2:]]
        local = [s["name"] for s in cli.json("snapshot", "list", volume)["snapshots"]]
        assert local == ["release", made[-1]], "the base of the next backup, and no more"
    assert report[0]["parent"] == made[-2]
    text = cli.done("backup", "a", "--repo", url, "--keep-last", "1")
    assert "deleted 2 of 4 snapshots of a, 1 kept, 1 left alone" in text
    cli.done("repo", "verify", url, "--deep")


@pytest.mark.usefixtures("seconds")
def test_a_backup_that_failed_prunes_nothing(
    cli: CommandLine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        cli.done("backup", "a", "b", "--repo", url)
    original = Repository.push

    def fail_for_b(self: Repository, source: Any, progress: Any, line: str) -> PushReport:
        if source.volume == "b":
            raise UnavailableError("the store went away")
        return original(self, source, progress, line=line)

    monkeypatch.setattr(Repository, "push", fail_for_b)
    outcome = cli("backup", "a", "b", "--repo", url, "--keep-last", "1", "--json")
    assert outcome.status == 1
    assert "backup of b failed" in outcome.err
    reports = json.loads(outcome.out)["backups"]
    assert reports[0]["prune"]["deleted"] == 3
    assert "prune" not in reports[1]
    assert len(names(cli, url, "a")) == 1
    assert len(names(cli, url, "b")) == 3


@pytest.mark.usefixtures("seconds")
def test_a_backup_whose_pruning_fails_is_a_backup(
    cli: CommandLine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli.json("backup", "a", "--repo", url)["backups"][0]["snapshot"]

    def fail(self: Repository, summary: Any) -> None:
        raise UnavailableError("the store went away")

    monkeypatch.setattr(Repository, "delete_one", fail)
    outcome = cli("backup", "a", "--repo", url, "--keep-last", "1", "--json")
    assert outcome.status == 1
    assert "a is backed up, but older backups stay" in outcome.err
    report = json.loads(outcome.out)["backups"][0]
    assert "the store went away" in report["prune"]["error"]
    assert names(cli, url) == [first, report["snapshot"]]
    assert len(cli.json("snapshot", "list", "a")["snapshots"]) == 1


@pytest.mark.usefixtures("seconds")
def test_local_snapshots_do_not_pile_up(cli: CommandLine, url: str) -> None:
    for _ in range(6):
        cli.done("backup", "a", "--repo", url, "--keep-last", "3")
        assert len(cli.json("snapshot", "list", "a")["snapshots"]) == 1
    assert len(names(cli, url)) == 3
    assert cli.json("volume", "show", "a")["layers"] <= 3
