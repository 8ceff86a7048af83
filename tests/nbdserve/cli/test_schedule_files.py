"""The files in scripts/ that cron and systemd are given."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import CommandLine

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
LINE = re.compile(r"(?:[\d*/,-]+\s+){5}root\s+(.*)")


def test_the_lines_for_cron_work(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (SCRIPTS / "cron" / "nbdserve").read_text().splitlines()
    commands = [match[1] for line in lines if (match := LINE.fullmatch(line))]
    others = [line for line in lines if line and not line.startswith("#") and not LINE.match(line)]
    assert len(commands) == 3
    assert all(re.fullmatch(r"[A-Z_]+=\S+", line) for line in others)
    config = tmp_path / "nbdserve.toml"
    url = f"file://{tmp_path}/repository"
    config.write_text(
        "".join(
            f'[[policy]]\nname = "{name}"\nvolumes = ["a"]\nrepository = "{url}"\n'
            for name in ("nightly", "hourly")
        )
    )
    monkeypatch.setenv("NBDSERVE_CONFIG", str(config))
    cli.done("volume", "create", "a", "--size", "4M")
    cli.done("repo", "init", url)
    for command in commands:
        words = shlex.split(command)
        assert (words[0], words[-1]) == ("/usr/bin/nbdserve", ">/dev/null")
        cli.done(*words[1:-1])


def test_the_units_are_as_systemd_wants_them(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    for kind in ("service", "timer"):
        text = (SCRIPTS / "systemd" / f"nbdserve-backup@.{kind}").read_text()
        unit = tmp_path / f"nbdserve-backup@.{kind}"
        # What it starts has to be there.
        unit.write_text(text.replace("/usr/bin/nbdserve", shutil.which("true") or "/bin/true"))
        (tmp_path / f"nbdserve-backup@nightly.{kind}").symlink_to(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "nbdserve-backup@nightly.timer",
         "nbdserve-backup@nightly.service"],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
