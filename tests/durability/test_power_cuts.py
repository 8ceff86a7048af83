"""States that a power cut could leave: all that was promised is found in each."""

import os
import re
import subprocess
import sys

import pytest

STATES = 4_000
SEED = 1


@pytest.mark.timeout(900)
def test_states():
    done = subprocess.run(
        [sys.executable, "-m", "tests.durability", "--states", str(STATES), "--seed", str(SEED)],
        env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        what: int(re.search(rf"(\d+) {what}", done.stdout)[1])
        for what in ("states", "different disks", "in a workload", "in a recovery",
                     "in a life begun after a kill", "kills recovered", "checks")
    }  # fmt: skip
    assert found["states"] >= STATES
    assert found["different disks"] > 0.9 * STATES
    assert all(found.values()), found
