"""`nbdserve config`, and which file is the configuration when none is named."""

import json
import subprocess
from pathlib import Path

import pytest

from nbdserve.configuration import file

from .conftest import CommandLine

MAKE_CERTIFICATES = Path(__file__).resolve().parents[3] / "scripts" / "make-test-certificates"


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """The path of a file that the next command checks."""
    return tmp_path / "nbdserve.toml"


def test_a_file_that_is_valid(cli: CommandLine, configuration: Path, tmp_path: Path) -> None:
    subprocess.run([MAKE_CERTIFICATES, tmp_path], check=True)
    configuration.write_text(
        f'listen = ["unix:{cli.data}/nbd.sock"]\n'
        '[[listener]]\naddress = "localhost:10809"\n'
        f'tls_certificate = "{tmp_path}/server-cert.pem"\ntls_key = "{tmp_path}/server-key.pem"\n'
    )
    assert cli.done("config", "check", configuration) == f"{configuration} is valid\n"
    assert cli.json("config", "check", configuration) == {
        "file": str(configuration),
        "problems": [],
    }
    assert not cli.data.exists()


def test_all_that_is_wrong_is_said(cli: CommandLine, configuration: Path) -> None:
    configuration.write_text("workers = 0\nlog_levels = 1\n")
    outcome = cli("config", "check", configuration)
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.splitlines() == [
        f"nbdserve: {configuration}:2: unknown key 'log_levels'; did you mean 'log_level'?",
        f"nbdserve: {configuration}:1: 'workers' must be a number from 1 to 64",
    ]
    outcome = cli("config", "check", configuration, "--json")
    assert outcome.status == 1
    assert len(json.loads(outcome.out)["problems"]) == 2
    assert "absent" in cli("config", "check", configuration.with_name("absent")).line


def test_what_the_file_names_is_looked_at(
    cli: CommandLine, configuration: Path, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        subprocess.run([MAKE_CERTIFICATES, tmp_path / name], check=True)
    (tmp_path / "no-directory").touch()
    configuration.write_text(
        f'data = "{tmp_path}/no-directory"\n'
        f'listen = ["unix:{tmp_path}/absent/sock", "no-such-host.invalid:1",'
        f' "unix:/{"x" * 110}"]\n'
        f'tls_certificate = "{tmp_path}/one/server-cert.pem"\n'
        f'tls_key = "{tmp_path}/other/server-key.pem"\n'
        f'[[listener]]\naddress = "[::1]:1"\ntls_client_ca = "{tmp_path}/absent.pem"\n'
        f'tls_key = "{tmp_path}/one/server-key.pem"\n'
    )
    outcome = cli("config", "check", configuration, "--data", tmp_path / "no-directory")
    assert outcome.status == 1
    lines = outcome.err.splitlines()
    for line, mentions in zip(
        lines,
        [
            f"{tmp_path}/other/server-key.pem does not belong to the certificate",
            f"TLS client CA {tmp_path}/absent.pem",
            f"data directory {tmp_path}/no-directory is not a directory",
            f"cannot listen on unix:{tmp_path}/absent/sock: {tmp_path}/absent is no directory",
            "cannot listen on no-such-host.invalid:1: ",
            "a path has at most 107 bytes",
        ],
        strict=True,
    ):
        assert mentions in line


def test_the_files_of_the_system_are_for_who_names_no_other(
    cli: CommandLine, configuration: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(file, "DEFAULT_FILE", configuration)
    configuration.write_text(f'data = "{tmp_path}/system"\nworkers = 0\n')
    cli.done("volume", "create", "mine", "--size", "1M")
    wrong = f"{configuration}:2: 'workers' must be"
    assert cli("config", "check").err.startswith(f"nbdserve: {wrong}")
    monkeypatch.delenv("NBDSERVE_DATA")
    cli.done("volume", "create", "theirs", "--size", "1M")  # whatever else is wrong with the file
    names = [found["name"] for found in cli.json("volume", "list")["volumes"]]
    assert names == ["theirs"]
    assert cli("serve").line.startswith(wrong)
    # Who names a directory is not concerned: this daemon gets as far as its address.
    occupied = tmp_path / "a-file"
    occupied.touch()
    line = cli("serve", "--data", cli.data, "--listen", f"unix:{occupied}").line
    assert str(occupied) in line
