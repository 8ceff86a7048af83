"""``status --watch``: rates, the picture, and a terminal that is as it was afterwards."""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdserve.cli.rates import Rates, quantile, rates_between
from nbdserve.cli.watch import Look, format_seconds, render, to_json

PROGRAM = [sys.executable, "-m", "nbdserve"]
BOUNDS = (0.001, 0.01, 0.1)
NOTHING = {"count": 0, "bytes": 0, "errors": 0, "seconds_sum": 0.0, "buckets": [0, 0, 0, 0]}


@pytest.mark.parametrize(
    ("part", "buckets", "expected"),
    [
        (0.5, [0, 0, 0, 0], None),
        (0.5, [10, 0, 0, 0], 0.0005),
        (0.99, [100, 0, 0, 0], 0.00099),
        (0.5, [50, 50, 0, 0], 0.001),
        (0.75, [50, 50, 0, 0], 0.0055),
        (0.99, [50, 0, 50, 0], 0.0982),
        (0.99, [0, 0, 0, 1], float("inf")),
    ],
)
def test_quantiles(part: float, buckets: list[float], expected: float | None) -> None:
    found = quantile(part, buckets, BOUNDS)
    assert found == (expected if expected is None else pytest.approx(expected))


def answer(uptime: float, count: int, size: int = 0, **more: object) -> dict[str, Any]:
    numbers = {**NOTHING, "count": count, "bytes": size, "buckets": [0, count, 0, 0]}
    export = {
        "volume": "web", "snapshot": None, "connections": 1, "in_flight": 2,
        "throttled_seconds": 0.0, "commands": {"read": numbers, "write": NOTHING}, **more,
    }  # fmt: skip
    return {"uptime": uptime, "bounds": BOUNDS, "exports": [export]}


def test_rates_are_differences() -> None:
    found = rates_between(answer(10, 100, 5000), answer(12, 300, 25000, throttled_seconds=1.0))
    rates = found["web"]
    assert (rates.iops, rates.read_iops, rates.write_iops) == (100, 100, 0)
    assert (rates.read_bytes, rates.throttled, rates.in_flight) == (10000, 0.5, 2)
    assert rates.p50 == pytest.approx(0.0055)
    for before in (None, answer(100, 5)):  # nothing, or an earlier daemon's
        assert rates_between(before, answer(1, 50))["web"].iops == 0
    assert rates_between(answer(10, 500), answer(12, 300))["web"].iops == 0
    fresh = rates_between(answer(10, 1), answer(12, 30, snapshot="a"))
    assert fresh["web@a"].iops == 15


def test_the_picture_fits_and_shows_nothing_that_is_not_printable() -> None:
    volumes = [
        {"name": f"volume-{number}", "layers": number, "own": 4096 * number} for number in range(50)
    ]
    rates = {"volume-7": Rates("volume-7", iops=5, read_iops=5, p99=float("inf"))}
    status = {
        "version": "1", "pid": 1, "data": "/d\x1b[2J", "free": 1, "total": 2, "workers": [],
        "volumes": 50, "snapshots": 0, "hydrations": [],
        "jobs": [{"kind": "push", "volume": "a", "done": 1, "total": 4, "repository": "s3://b/c"}],
    }  # fmt: skip
    look = Look(0.0, rates, volumes, status)
    text = render(look, 60, 12)
    lines = text.splitlines()
    assert len(lines) <= 12
    assert all(len(line) <= 60 for line in lines)
    assert "\x1b" not in text
    assert lines[2] == "push of a: 25 %, s3://b/c"
    assert lines[5].startswith("volume-7 ")
    assert lines[-1] == "and 44 more"
    assert len(render(look).splitlines()) == 55
    document = json.loads(to_json(look))
    assert document["exports"][0]["p99"] is None
    assert render(Look(0.0, {}, problem="gone")) == "1970-01-01T00:00:00Z\ngone"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (5e-6, "5.0 us"), (85e-6, "85 us"), (0.0012, "1.2 ms"), (0.9996, "1.0 s"),
        (3.5, "3.5 s"), (float("inf"), "long"),
    ],
)  # fmt: skip
def test_times(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


class Daemon:
    """`nbdserve serve` on a directory whose name is short enough for sockets."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, "serve", "--data", self.data, "--listen", f"unix:{self.data}/n",
             "--workers", "1"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate()


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        create = [*PROGRAM, "volume", "create", "web", "--size", "1M", "--data", data]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        made = Daemon(data)
        made.start()
        yield made
        made.stop()


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What comes until ``wanted`` does, or the end."""
    got = b""
    deadline = time.monotonic() + 30
    while wanted not in got:
        assert time.monotonic() < deadline, got
        if select.select([terminal], [], [], 1)[0]:
            try:
                got += os.read(terminal, 65536)
            except OSError:
                break
    return got


def test_on_a_terminal_over_a_restart(daemon: Daemon) -> None:
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    before = termios.tcgetattr(theirs)
    watching = subprocess.Popen(
        [*PROGRAM, "status", "--watch", "0.2", "--data", daemon.data],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    try:
        assert b"\x1b[?1049h" in read_until(terminal, b"web ")
        daemon.stop()
        read_until(terminal, b"no daemon serves")
        daemon.start()
        read_until(terminal, b"web ")
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 200, 0, 0))
        watching.send_signal(signal.SIGWINCH)
        read_until(terminal, b"LAYERS")  # which there was no room for
        watching.send_signal(signal.SIGINT)
        assert read_until(terminal, b"\x1b[?1049l").endswith(b"\x1b[?25h\x1b[?1049l")
        assert watching.wait(20) == 130
    finally:
        watching.kill()
        watching.wait()
    assert termios.tcgetattr(theirs) == before
    os.close(terminal)
    os.close(theirs)


@pytest.mark.parametrize("as_json", [False, True])
def test_on_a_pipe(daemon: Daemon, as_json: bool) -> None:
    options = ["--json"] if as_json else []
    with subprocess.Popen(
        [*PROGRAM, "status", "--watch", "0.1", *options, "--data", daemon.data],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None and watching.stderr is not None
        first, second = watching.stdout.readline(), watching.stdout.readline()
        assert "\x1b" not in first + second
        if as_json:
            for line in (first, second):
                document = json.loads(line)
                assert [volume["name"] for volume in document["volumes"]] == ["web"]
                assert document["problem"] is None
        else:
            assert first.endswith("Z\n") and second.startswith("nbdserve ")
        watching.stdout.close()  # as `head` does
        with contextlib.suppress(subprocess.TimeoutExpired):
            watching.wait(20)
        assert (watching.returncode, watching.stderr.read()) == (0, "")
