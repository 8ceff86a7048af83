"""Restoring lazily from the command line, without a daemon."""

from pathlib import Path

import pytest

from tests.nbdserve.cli.conftest import CommandLine


@pytest.fixture
def url(cli: CommandLine, tmp_path: Path) -> str:
    """A repository with web@s in it."""
    url = f"file://{tmp_path}/repository"
    cli.done("volume", "create", "web", "--size", "64M")
    cli.done("snapshot", "create", "web@s")
    cli.done("repo", "init", url)
    cli.done("repo", "push", "web@s", url)
    return url


def test_a_volume_is_made_shown_hydrated_and_deleted(cli: CommandLine, url: str) -> None:
    line = cli.done("repo", "restore", url, "web@s", "lazy", "--lazy", "--rate", "5M")
    assert line == "made volume lazy of web@s, 64M; its data is fetched\n"
    info = cli.json("volume", "show", "lazy")["hydration"]
    assert info == {
        "source": f"web@s in {url}", "fetched": 0, "total": 0, "rate": 5 << 20, "problem": None,
    }  # fmt: skip
    assert f"of web@s in {url}, at most 5M a second by itself" in cli.done("volume", "show", "lazy")
    assert f"volume lazy: 0 of 0 (0 %) of web@s in {url}" in cli.done("status")
    assert [found["volume"] for found in cli.json("status")["hydrations"]] == ["lazy"]
    assert "0 %" in cli.done("volume", "list")

    refused = cli("backup", "lazy", "--repo", url)
    assert refused.status == 1
    assert "wait with 'nbdserve volume hydrate lazy --wait'" in refused.err
    assert cli.json("snapshot", "list", "lazy")["snapshots"] == []

    line = cli.done("volume", "hydrate", "lazy", "--rate", "unlimited")
    assert line == f"volume lazy: 0 of 0 (0 %) of web@s in {url}\n"
    assert cli.done("volume", "hydrate", "lazy", "--wait") == "volume lazy: whole\n"
    assert cli.json("volume", "show", "lazy")["hydration"] is None
    assert cli.json("check")["findings"] == []
    cli.done("volume", "hydrate", "lazy", "--rate", "0", "--wait")
    cli.done("volume", "delete", "lazy")


def test_mistakes_are_named(cli: CommandLine, url: str) -> None:
    for arguments, words in (
        (("repo", "restore", url, "web@s", "x", "--rate", "5M"), "--rate is for --lazy"),
        (("repo", "restore", url, "web@s", "x", "--lazy", "--rate", "fast"), "'fast'"),
        (("repo", "restore", url, "web@s", "web", "--lazy"), "volume web exists already"),
        (("repo", "restore", url, "web@t", "x", "--lazy"), "there is no web@t"),
        (("repo", "restore", url + "x", "web@s", "x", "--lazy"), "there is no directory"),
        (("volume", "hydrate", "web"), "give --rate or --wait"),
        (("volume", "hydrate", "none", "--wait"), "volume none does not exist"),
        (("volume", "hydrate", "none", "--rate", "1M"), "volume none does not exist"),
    ):
        assert words in cli(*arguments).line
    assert [found["name"] for found in cli.json("volume", "list")["volumes"]] == ["web"]
