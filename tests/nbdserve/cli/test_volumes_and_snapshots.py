"""Volumes and snapshots from the command line, with no daemon: results, JSON, refusals."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from nbdserve.cli.output import format_size

from .conftest import CommandLine

MIB = 1 << 20
VOLUME_KEYS = {
    "name", "id", "size", "created", "layers", "snapshots", "mapped", "own", "shared", "clients",
    "hydration", "reserved", "journal",
}  # fmt: skip
SNAPSHOT_KEYS = {"volume", "name", "id", "size", "created", "layers", "labels", "clients"}


def check_time(text: str) -> None:
    assert text.endswith("Z")
    age = datetime.now(UTC) - datetime.fromisoformat(text)
    assert timedelta(0) <= age < timedelta(hours=1)


def test_the_life_of_a_volume(cli: CommandLine) -> None:
    created = cli.json("volume", "create", "a", "--size", "16M")
    assert set(created) == VOLUME_KEYS
    assert (created["name"], created["size"], created["snapshots"]) == ("a", 16 * MIB, 0)
    check_time(created["created"])
    assert cli.json("volume", "show", "a") == created
    assert cli.json("volume", "list") == {
        "volumes": [created],
        "unreadable": [],
        "half_restored": [],
    }

    resized = cli.json("volume", "resize", "a", "--size", "1G")
    assert resized["size"] == 1 << 30
    renamed = cli.json("volume", "rename", "a", "b")
    assert (renamed["name"], renamed["id"]) == ("b", created["id"])
    assert cli.json("volume", "delete", "b") == {"deleted": "b"}
    assert cli.json("volume", "list") == {"volumes": [], "unreadable": [], "half_restored": []}


def test_tables_are_for_people(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1536M")
    titles, row = cli.done("volume", "list").splitlines()
    assert titles.split()[:2] == ["NAME", "SIZE"]
    assert row.split()[:2] == ["a", "1.5G"]
    assert "1.5G (1610612736 bytes)" in cli.done("volume", "show", "a")


def test_the_life_of_a_snapshot(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    cli.done("volume", "create", "b", "--size", "2M")
    group = cli.json("snapshot", "create", "a@one", "b@one")["snapshots"]
    assert [set(found) for found in group] == [SNAPSHOT_KEYS] * 2
    assert [(found["volume"], found["name"]) for found in group] == [("a", "one"), ("b", "one")]
    assert group[0]["created"] == group[1]["created"]
    check_time(group[0]["created"])
    cli.done("snapshot", "create", "a@two")
    listed = cli.json("snapshot", "list")["snapshots"]
    assert [f"{s['volume']}@{s['name']}" for s in listed] == ["a@one", "a@two", "b@one"]
    assert [s["name"] for s in cli.json("snapshot", "list", "a")["snapshots"]] == ["one", "two"]

    clone = cli.json("volume", "create", "c", "--from", "b@one")
    assert clone["size"] == 2 * MIB
    larger = cli.json("volume", "create", "d", "--from", "b@one", "--size", "4M")
    assert larger["size"] == 4 * MIB
    assert cli.json("snapshot", "diff", "a@one", "a@two")["extents"] == []
    assert cli.json("snapshot", "diff", "a@one")["extents"] == []
    assert cli.json("snapshot", "rollback", "a@one")["name"] == "a"
    assert cli.json("snapshot", "delete", "a@one") == {"deleted": "a@one"}
    assert [s["name"] for s in cli.json("snapshot", "list", "a")["snapshots"]] == ["two"]

    assert "snapshot" in cli("volume", "delete", "a").line
    cli.done("volume", "delete", "a", "--with-snapshots")
    assert [v["name"] for v in cli.json("volume", "list")["volumes"]] == ["b", "c", "d"]


def test_a_group_is_taken_whole_or_not_at_all(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    assert "nothing" in cli("snapshot", "create", "a@one", "nothing@one").line
    assert cli.json("snapshot", "list") == {"snapshots": []}


def test_a_diff_is_of_one_volume(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    assert "one volume" in cli("snapshot", "diff", "a@one", "b@two").line


@pytest.mark.parametrize("size", ["0", "-1", "17T", "ten", "", "1.5.2G"])
def test_sizes_that_cannot_be(cli: CommandLine, size: str) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    for arguments in (["volume", "create", "b"], ["volume", "resize", "a"]):
        outcome = cli(*arguments, "--size", size)
        assert outcome.status == 1
        assert "size" in outcome.line
    assert [(v["name"], v["size"]) for v in cli.json("volume", "list")["volumes"]] == [("a", MIB)]


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "x" * 128, "a b", "\N{SNOWMAN}", "a@b"])
def test_names_that_cannot_be(cli: CommandLine, name: str) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    for arguments in (
        ["volume", "create", name, "--size", "1M"],
        ["volume", "show", name],
        ["volume", "delete", name],
        ["volume", "resize", name, "--size", "2M"],
        ["volume", "rename", "a", name],
        ["volume", "rename", name, "b"],
        ["snapshot", "list", name],
        ["snapshot", "create", f"a@{name}"],
        ["snapshot", "delete", f"a@{name}"],
    ):
        outcome = cli(*arguments)
        assert outcome.status == 1
        assert "name" in outcome.line, arguments
    assert [v["name"] for v in cli.json("volume", "list")["volumes"]] == ["a"]
    assert cli.json("snapshot", "list") == {"snapshots": []}


def test_status_without_a_daemon(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    status = cli.json("status")
    assert status["daemon"] is False
    assert status["listening"] == []
    assert (status["volumes"], status["snapshots"], status["clients"]) == (1, 0, 0)
    assert 0 < status["free"] <= status["total"]
    assert "does not run" in cli.done("status")


def test_nothing_is_left_of_a_command_that_served_the_directory_itself(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    assert not [path for path in cli.data.iterdir() if "sock" in path.name]


def test_a_data_directory_whose_path_is_longer_than_a_socket_address(cli: CommandLine) -> None:
    deep = cli.data / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    cli.done("volume", "create", "a", "--size", "1M", "--data", deep)
    assert "a" in cli.done("volume", "list", "--data", deep)


def test_json_is_all_that_is_on_standard_output(cli: CommandLine) -> None:
    outcome = cli("volume", "create", "a", "--size", "1M", "--json")
    assert json.loads(outcome.out)["name"] == "a"
    assert outcome.err == ""


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"), (1023, "1023"), (1024, "1K"), (1536, "1.5K"), (MIB - 1, "1M"), (MIB, "1M"),
        (10 << 30, "10G"), (16 << 40, "16T"), ((1 << 40) - 1, "1T"),
    ],
)  # fmt: skip
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text
