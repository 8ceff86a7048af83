"""Root's commands in a data directory that is another user's, as a package's daemon has it."""

import os
from pathlib import Path

import pytest

from .conftest import CommandLine

OWNER = 54321


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_makes_is_the_owner_s(cli: CommandLine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch()
    cli.data.mkdir()
    os.chown(cli.data, OWNER, OWNER)
    repository = f"file://{tmp_path}/repository"
    cli.done("volume", "create", "a", "--size", "16M")
    (cli.data / "link").symlink_to(outside)
    (cli.data / "second-name").hardlink_to(outside)
    cli.done("snapshot", "create", "a@s")
    cli.done("repo", "init", repository)
    cli.done("repo", "push", "a@s", repository)
    cli.done("repo", "restore", repository, "a@s", "b")
    cli.done("volume", "resize", "b", "--size", "32M")
    cli.done("check", "--repair")
    paths = [cli.data, *cli.data.rglob("*")]
    others = [path.name for path in paths if path.lstat().st_uid != OWNER]
    assert others == ["second-name"]
    assert len(paths) > 10
    assert outside.stat().st_uid == 0
