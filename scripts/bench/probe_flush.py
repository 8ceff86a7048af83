"""What a FLUSH costs the disk: syncs, and bytes written for each byte that the client wrote.

A client writes at random places, one request at a time, and flushes after each or after some. The
system calls of the daemon are counted by strace, by kind of file; what the disk itself wrote comes
from its counters, file system and all: so nothing else should use that disk meanwhile. strace slows
the daemon down: no time is taken here.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench.client import Client
from scripts.bench.process import DIE_WITH_PARENT, BenchError, tell
from scripts.bench.results import Measurement, Results
from scripts.bench.scale import BLOCK, GIB, MIB, Scale
from scripts.bench.servers import Nbdserve

# With many threads a call may be in two lines, begun and resumed; the first one names the file.
_BEGUN = re.compile(r"^(\d+) +(fdatasync|fsync|pwrite64|pwritev2?)\(\d+<([^>]*)>")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>")
_RESULT = re.compile(r" = (\d+)$")
_ATTACH_SECONDS = 10.0
_SECTOR = 512


@dataclass(frozen=True)
class Load:
    """``count`` writes of ``length`` bytes, with a FLUSH after each ``flush_every`` (0: FUA)."""

    label: str
    new: bool
    length: int
    count: int
    flush_every: int


@dataclass
class Traced:
    """What a daemon did to its files: syncs and bytes by kind of file."""

    syncs: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)


def parse_trace(lines: list[str], data: Path) -> Traced:
    """Count what strace (-y) wrote of files below ``data``, by the first part of their name."""
    traced = Traced()
    open_calls: dict[str, tuple[str, str]] = {}
    for line in lines:
        if begun := _BEGUN.match(line):
            thread, call, file = begun.groups()
            open_calls[thread] = call, file
        elif resumed := _RESUMED.match(line):
            thread = resumed[1]
        else:
            continue
        result = _RESULT.search(line)
        if result is None or thread not in open_calls:
            continue  # unfinished, failed, or begun before we looked
        call, file = open_calls.pop(thread)
        if not file.startswith(f"{data}/"):
            continue
        kind = Path(file).name.partition("-")[0]
        if call.startswith("pwrite"):
            traced.written[kind] += int(result[1])
        else:
            traced.syncs[kind] += 1
    return traced


def measure_flush(scale: Scale, directory: Path, sockets: Path, results: Results) -> None:
    """Into ``results``, for each kind of load."""
    count = scale.flushes
    loads = (
        Load("overwrites of 4 KiB, a FLUSH after each", False, BLOCK, count, 1),
        Load("new blocks, 4 KiB, a FLUSH after each", True, BLOCK, count, 1),
        Load("new blocks, 4 KiB, a FLUSH after 32", True, BLOCK, 32 * count, 32),
        Load("overwrites of 4 KiB with FUA", False, BLOCK, count, 0),
        Load("new blocks, 4 KiB with FUA", True, BLOCK, count, 0),
        Load("new, 1 MiB, a FLUSH after each", True, MIB, count // 4, 1),
    )
    ours = Nbdserve(directory.resolve() / "nbdserve", sockets)
    with ours.serving():
        for number, load in enumerate(loads):
            volume = f"disk-{number}"
            ours.command("volume", "create", volume, "--size", str(64 * GIB))
            _measure_load(ours, volume, load, sockets / f"trace-{number}", results)


def _measure_load(ours: Nbdserve, volume: str, load: Load, trace: Path, results: Results) -> None:
    source = random.Random(load.label)
    data = source.randbytes(load.length)
    places = [place * load.length for place in source.sample(range(1 << 14), load.count)]
    with Client(ours.socket, volume) as client:
        if not load.new:
            for place in places:
                client.write(place, data)
        # Something new, so that the files have been made and the journal has room.
        client.write(32 * GIB, data)
        client.flush()
        time.sleep(1)
        os.sync()
        before = _sectors_written(ours.data)
        with _tracing(ours.pid, trace):
            for number in range(load.count):
                place = places[number]
                client.write(place, data, fua=load.flush_every == 0)
                if load.flush_every and number % load.flush_every == load.flush_every - 1:
                    client.flush()
        after = _sectors_written(ours.data)
    traced = parse_trace(trace.read_text(errors="replace").splitlines(), ours.data)
    flushes = load.count // (load.flush_every or 1)
    payload = load.count * load.length
    kinds = ", ".join(f"{kind} {found / flushes:.2f}" for kind, found in traced.syncs.items())
    figures = (
        (f"syncs for each FLUSH ({kinds})", traced.syncs.total() / flushes),
        ("bytes that the daemon wrote ÷ the client's", traced.written.total() / payload),
        ("bytes that the disk wrote ÷ the client's", (after - before) * _SECTOR / payload),
    )
    for what, value in figures:
        tell(f"  {load.label}: {what}: {value:.2f}")
        results.measurements.append(Measurement("flush", f"{load.label}: {what}", value, "", None))


@contextlib.contextmanager
def _tracing(root: int, into: Path) -> Iterator[None]:
    """Note the calls of a process, its threads and the children that it has."""
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    pids = [word for pid in (str(root), *children) for word in ("-p", pid)]
    tracer = subprocess.Popen(
        [*DIE_WITH_PARENT, "strace", "-f", "-y", "-o", into, "-e",
         "trace=fdatasync,fsync,pwrite64,pwritev,pwritev2", *pids],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + _ATTACH_SECONDS
        while not _is_traced(root):
            if tracer.poll() is not None or time.monotonic() > deadline:
                tracer.kill()
                raise BenchError(f"strace: {tracer.communicate()[1].strip() or 'does not attach'}")
            time.sleep(0.02)
        time.sleep(0.2)  # the other threads
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()


def _is_traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return re.search(r"^TracerPid:\t[1-9]", status, re.MULTILINE) is not None


def _sectors_written(directory: Path) -> int:
    """What the disk below a directory has written so far, in sectors of 512 bytes."""
    device = directory.stat().st_dev
    counters = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(counters.read_text().split()[6])
