"""States that a power cut could leave: all that was promised is found in each."""

import os
import re
import subprocess
import sys

import pytest

STATES = 10_000
SEED = 1


@pytest.mark.timeout(900)
def test_states():
    done = subprocess.run(
        [sys.executable, "-m", "tests.durability", "--states", str(STATES), "--seed", str(SEED)],
        env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    states, recoveries, kills = (
        int(re.search(pattern, done.stdout)[1])
        for pattern in (r"(\d+) states", r"(\d+) of them cuts of a recovery", r"(\d+) lives begun")
    )
    assert states >= STATES
    assert recoveries > 0
    assert kills > 0
