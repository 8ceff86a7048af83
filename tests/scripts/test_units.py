"""The units: systemd takes them, and they fit what the daemon does."""

import configparser
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from nbdserve.configuration.settings import DRAIN_SECONDS

UNITS = Path(__file__).resolve().parents[2] / "scripts" / "systemd"


def test_systemd_takes_them(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: run scripts/install-test-dependencies")
    for unit in ("nbdserve.service", "nbdserve.socket"):
        text = (UNITS / unit).read_text().replace("/usr/bin/nbdserve", "/bin/true")
        (tmp_path / unit).write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "nbdserve" in line]
    assert (done.returncode, said) == (0, [])


def read(unit: str) -> configparser.RawConfigParser:
    found = configparser.RawConfigParser(strict=False)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(UNITS / unit)
    return found


def test_they_agree_with_the_configuration() -> None:
    service = read("nbdserve.service")["Service"]
    assert int(service["TimeoutStopSec"]) > 2 * DRAIN_SECONDS
    configuration = tomllib.loads((UNITS / "nbdserve.toml").read_text())
    assert configuration["data"] == f"/var/lib/{service['StateDirectory']}"
    sockets = re.findall(
        r"^ListenStream=(.*)$", (UNITS / "nbdserve.socket").read_text(), re.MULTILINE
    )
    assert configuration["listen"] == [
        f"unix:{address}" if address.startswith("/") else address for address in sockets
    ]
