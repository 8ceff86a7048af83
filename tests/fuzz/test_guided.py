"""A fixed budget of coverage-guided fuzzing: so many executions, from the corpus on."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
RUNS = {"handshake": 4000, "transmission": 500, "channel": 1500}


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: there are wheels for CPython 3.11 to 3.14, Linux on x86-64",
)
@pytest.mark.parametrize("target", RUNS)
def test_nothing_is_found(target, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, "--runs", str(RUNS[target]),
         "--grow", tmp_path / "grown", "--findings", tmp_path],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    found = sorted(file for file in tmp_path.glob("*-*") if file.is_file())
    if done.returncode or found:
        inputs = "\n".join(f"{file.name}: {file.read_bytes().hex()}" for file in found)
        pytest.fail(f"{done.stdout[-8000:].decode(errors='replace')}\n{inputs}")
    assert f"Done {RUNS[target]} runs".encode() in done.stdout
