"""Limits of a volume from the command line, with no daemon: what holds, and what is kept."""

import pytest

from nbdserve.limiting import Limiting
from nbdserve.measuring import Measuring
from nbdserve.server.permissions import ExportRule, Permissions
from snapshots.limits import Limits

from .conftest import CommandLine

MIB = 1 << 20


def limits(cli: CommandLine, *options: str) -> tuple[object, ...]:
    found = cli.json("volume", "limit", "a", *options)
    assert found.pop("volume") == "a"
    return tuple(found.values())


def test_limits_are_kept_and_changed_one_by_one(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    assert limits(cli) == (None, None, None, None, "configuration")
    assert cli.done("volume", "limit", "a") == "volume a: no limits\n"
    assert limits(cli, "--iops", "500") == (500, None, None, None, "volume")
    changed = (500, None, 50 * MIB, 1 << 30, "volume")
    assert limits(cli, "--bandwidth", "50M", "--bandwidth-burst", "1G") == changed
    assert limits(cli) == changed
    assert cli.done("volume", "limit", "a") == (
        "volume a: 500 requests a second and 50M bytes a second (bursts of 1G)\n"
    )
    cli.done("snapshot", "create", "a@one")
    cli.done("snapshot", "rollback", "a@one")
    cli.done("volume", "rename", "a", "b")
    cli.done("volume", "rename", "b", "a")
    assert limits(cli) == changed
    cli.done("volume", "create", "clone", "--from", "a@one")
    assert cli.json("volume", "limit", "clone")["source"] == "configuration"
    assert limits(cli, "--bandwidth", "0") == (500, None, None, None, "volume")
    assert limits(cli, "--none") == (None, None, None, None, "volume")
    assert limits(cli, "--default") == (None, None, None, None, "configuration")
    assert cli.done("check").strip().endswith("0 findings") or cli("check").status == 0


@pytest.mark.parametrize(
    ("options", "status", "mentions"),
    [
        (["--iops", "-1"], 2, "--iops"),
        (["--iops", "1000000001"], 1, "1000000000"),
        (["--iops-burst", "5"], 1, "iops_burst without iops"),
        (["--bandwidth", "fast"], 1, "fast"),
        (["--none", "--default"], 2, "exclude"),
        (["--none", "--iops", "5"], 2, "exclude"),
    ],
)
def test_what_is_no_limit(cli: CommandLine, options: list[str], status: int, mentions: str) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    outcome = cli("volume", "limit", "a", *options)
    assert outcome.status == status
    assert mentions in outcome.line
    assert limits(cli) == (None, None, None, None, "configuration")
    assert "does not exist" in cli("volume", "limit", "nobody", "--iops", "1").line


class OneVolume:
    """What ``Limiting`` asks of a catalogue."""

    def __init__(self) -> None:
        self.own: Limits | None = None

    def volume_limits(self, name: str) -> Limits | None:
        return self.own

    def volume_names(self) -> list[str]:
        return ["web"]

    def export_keys(self, name: str) -> list[str]:
        return [name]

    def names_of(self, keys: list[str]) -> dict[str, tuple[str, None]]:
        return {key: (key, None) for key in keys if key == "web"}


def test_a_volumes_own_limits_go_before_the_configurations() -> None:
    catalogue = OneVolume()
    rules = Permissions([ExportRule("w*", limits=Limits(iops=5)), ExportRule("*")])
    limiting = Limiting(catalogue, Measuring(), rules)  # type: ignore[arg-type]
    assert limiting.of_key("web") == Limits(iops=5)
    assert limiting.of_key("gone") == Limits()
    catalogue.own = Limits()
    assert limiting.of_key("web") == Limits()
    catalogue.own = Limits(bandwidth=7)
    assert limiting.of_key("web") == Limits(bandwidth=7)
    limiting.change_rules(Permissions())
    catalogue.own = None
    assert limiting.of_key("web") == Limits()
