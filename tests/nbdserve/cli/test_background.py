"""Commands that work on a repository let guests go first."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")
PROGRAM = """
import os, pathlib
from nbdserve.cli.background import let_guests_go_first
let_guests_go_first()
group = pathlib.Path("/proc/self/autogroup")
print(os.getpriority(os.PRIO_PROCESS, 0), group.read_text() if group.exists() else "")
"""


def run(*, own_session: bool) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        start_new_session=own_session,
    )
    nice, _, group = done.stdout.strip().partition(" ")
    return int(nice), group


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="the kernel does not group by session")
def test_a_session_of_its_own_is_lowered_as_a_whole() -> None:
    nice, group = run(own_session=True)
    assert nice == 19
    assert re.fullmatch(r"/autogroup-\d+ nice 10", group)


def test_in_the_session_of_somebodys_shell_nothing_changes() -> None:
    before = AUTOGROUP.read_text().strip() if AUTOGROUP.exists() else ""
    assert run(own_session=False) == (os.getpriority(os.PRIO_PROCESS, 0), before)
