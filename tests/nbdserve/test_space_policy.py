"""The table [space], where it is read from, and what commands refuse because of it."""

from pathlib import Path

import pytest

from backends.errors import InvalidError
from nbdserve.configuration.file import read_file
from nbdserve.configuration.settings import Settings, combine
from nbdserve.configuration.space import SpaceSettings, parse_threshold
from snapshots.space import SpacePolicy
from snapshots.space_watch import Threshold
from tests.nbdserve.cli.conftest import CommandLine, cli, data  # noqa: F401 - fixtures


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_file_and_the_command_line(tmp_path: Path) -> None:
    file = read_file(
        write(
            tmp_path / "file",
            "[space]\nmax_overcommit = 3\nwarn_free = '12.5%'\ncritical_free = '20G'\n"
            "min_free = '1G'\n",
        )
    )
    line = Settings(Path("/data"))
    assert combine(line, file).space == SpacePolicy(
        3.0, Threshold(share=0.125), Threshold(size=20 << 30), Threshold(size=1 << 30)
    )
    line = Settings(Path("/data"), space=SpaceSettings(1.5, min_free=parse_threshold("0")))
    assert combine(line, file).space == SpacePolicy(
        1.5, Threshold(share=0.125), Threshold(size=20 << 30), Threshold()
    )
    assert combine(line, Settings()).space.warn_free == Threshold(share=0.1)


@pytest.mark.parametrize(
    ("lines", "mentions"),
    [
        ("[space]\nmax_overcommit = 0", ["[space]: 'max_overcommit'", "above 0"]),
        ("[space]\nmax_overcommit = true", ["'max_overcommit'", "a number"]),
        ("[space]\nmax_overcommit = nan", ["'max_overcommit'", "a number"]),
        ("[space]\nwarn_free = '101%'", ["'warn_free'", "'20G'", "'10%'"]),
        ("[space]\nwarn_free = 10", ["'warn_free'", "a string"]),
        ("[space]\nwarn_fee = '1%'", ["[space]: unknown key 'warn_fee'", "'warn_free'"]),
        ("space = 3", ["'space'", "[space]"]),
        ("[[space]]\nmin_free = '1%'", ["'space'", "[space]"]),
        ("[space]\nwarn_free = '1%'\ncritical_free = '2%'", ["'critical_free'", "'warn_free'"]),
    ],
)
def test_what_is_no_policy(tmp_path: Path, lines: str, mentions: list[str]) -> None:
    path = write(tmp_path / "file", lines + "\n")
    with pytest.raises(InvalidError) as refused:
        combine(Settings(Path("/data")), read_file(path))
    assert all(text in str(refused.value) for text in mentions), refused.value


def test_commands_without_a_daemon_keep_to_it(
    cli: CommandLine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    path = write(
        tmp_path / "nbdserve.toml", f"data = '{cli.data}'\n[space]\nmax_overcommit = 0.000001\n"
    )
    monkeypatch.setenv("NBDSERVE_CONFIG", str(path))
    for command in (
        ("volume", "create", "b", "--size", "16T"),
        ("volume", "resize", "a", "--size", "16T"),
    ):
        line = cli(*command).line
        assert line.startswith(f"volume {command[2]}: 16T more would make")
        assert "max_overcommit is 1e-06: delete volumes, make room, or force it" in line
        cli.done(*command, "--force")
    status = cli.json("status")
    assert status["provisioned"] == 32 << 40
    assert status["max_overcommit"] == 1e-6
    assert status["overcommit"] == round(32 * 2**40 / (status["used"] + status["free"]), 3)
    assert "provisioned  32T, " in cli.done("status")
    # A file of another data directory says nothing about this one.
    write(path, "data = '/elsewhere'\n[space]\nmax_overcommit = 0.000001\n")
    cli.done("volume", "create", "c", "--size", "16T")
    write(path, "spce = 1\n")
    assert "unknown key 'spce'" in cli("volume", "list").line


def test_the_daemon_keeps_to_its_options(cli: CommandLine) -> None:  # noqa: F811
    line = cli("serve", "--data", cli.data, "--min-free", "lots").line
    assert "'lots' is no size such as '20G' and no part of the disk such as '10%'" in line
    assert cli("serve", "--data", cli.data, "--max-overcommit", "0").status == 2
