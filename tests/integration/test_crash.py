"""kill -9 under load, snapshots being taken and deleted: all that was answered is there."""

import functools
import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from .parts import DIE_WITH_PARENT, NBDSERVE, SYSTEM_PATH, Daemon, require, run

CLIENT = Path(__file__).with_name("crash_client.py")
WORD = 4


def read_words(content: bytes, offset: int, length: int) -> set[int]:
    """Return the different 32-bit words of a range."""
    return {
        int.from_bytes(content[position : position + WORD], "little")
        for position in range(offset, offset + length, WORD)
    }


def check(
    content: bytes, words: list[list[int]], *, first: list[int], last: list[int], what: str
) -> None:
    """Check that each slot holds only what operations from `first` to `last` wrote."""
    for slot, (offset, length) in enumerate(load_layout()):
        allowed = set(words[slot][first[slot] : last[slot] + 1])
        wrong = read_words(content, offset, length) - allowed
        assert not wrong, (
            f"{what}: slot {slot} at {offset} holds {sorted(wrong)[:4]}, which is none of its "
            f"operations {first[slot]} to {last[slot]}: {sorted(allowed)[:8]}"
        )


@functools.cache
def load_layout() -> list[tuple[int, int]]:
    """Ask the client how it lays out its slots."""
    call = f"runpy.run_path({str(CLIENT)!r})['lay_out_slots']()"
    code = f"import json, runpy; print(json.dumps({call}))"
    output = run("/usr/bin/python3", "-c", code, env={"PATH": SYSTEM_PATH}).stdout
    return [(offset, length) for offset, length in json.loads(output)]


@pytest.mark.parametrize(
    ("transport", "rounds"), [("plain", 6), ("tls", 2)], indirect=["transport"]
)
def test_killed_under_load(daemon: Daemon, tmp_path: Path, rounds: int) -> None:
    require("nbdsh", "nbdcopy")
    used = sum(length for _, length in load_layout())
    daemon.create("disk", used + -used % 4096)
    state_file, copy = tmp_path / "state", tmp_path / "copy"
    source = random.Random(11)
    durable_operations = 0
    state: dict[str, Any] = {}

    def read(export: str) -> bytes:
        run("nbdcopy", daemon.uri(export), copy)
        content = copy.read_bytes()
        copy.unlink()
        return content

    for round_number in range(rounds):
        client = subprocess.Popen(
            [*DIE_WITH_PARENT, "/usr/bin/python3", CLIENT, state_file, daemon.uri("disk"),
             str(round_number), NBDSERVE],
            stdout=subprocess.PIPE,
            env={"PATH": SYSTEM_PATH, "NBDSERVE_DATA": str(daemon.data)},
        )  # fmt: skip
        assert client.stdout is not None
        assert client.stdout.readline() == b"connected\n"
        if round_number < 3:
            assert client.stdout.readline() == b"snapshot\n"
        time.sleep(source.uniform(0.5, 2.5))
        daemon.kill()
        client.communicate(timeout=60)
        assert client.returncode == 0
        daemon.start()

        state = json.loads(state_file.read_text())
        issued = [len(words) - 1 for words in state["words"]]
        check(read("disk"), state["words"], first=state["acknowledged"], last=issued, what="disk")
        names = {entry["name"] for entry in daemon.json("snapshot", "list", "disk")["snapshots"]}
        assert set(state["snapshots"]) <= names
        for name, bounds in state["snapshots"].items():
            export = f"disk@{name}"
            check(read(export), state["words"], **bounds, what=export)
        assert sum(state["durable"]) > durable_operations, "no flush was acknowledged in this round"
        durable_operations = sum(state["durable"])
    assert len(state["snapshots"]) >= min(rounds, 3)
