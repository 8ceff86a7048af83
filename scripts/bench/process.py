"""Programs that the benchmark runs: started so that none outlives it, and what they consume.

Every child is killed by the kernel when this process dies (setpriv), and has a session of its own,
so that Ctrl-C reaches only this process, which then ends them in order.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
START_SECONDS = 60
STOP_SECONDS = 60
_TICK = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """Something that the user has to know: one line."""


def tell(line: str) -> None:
    """Say what is going on."""
    print(line, flush=True)


def run(*command: str | Path, timeout: float = 600) -> str:
    """Run a program to its end; what it printed. BenchError when it fails."""
    words = [str(word) for word in command]
    process = subprocess.Popen(
        [*DIE_WITH_PARENT, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, complaints = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{' '.join(words)}: not done after {timeout:.0f} s") from error
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        said = (complaints.strip() or output.strip() or f"status {process.returncode}").splitlines()
        raise BenchError(f"{' '.join(words)}: {said[-1]}")
    return output


@contextlib.contextmanager
def server(
    *command: str | Path, log: Path, is_ready: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; ``is_ready`` is asked until it says yes."""
    words = [str(word) for word in command]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*DIE_WITH_PARENT, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines() or ["no word of why"]
                raise BenchError(f"{words[0]} does not start: {said[-1]}")
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            tell(f"{words[0]} did not stop after {STOP_SECONDS} s: killed")
        finally:
            process.kill()
            process.wait()


def parse_stat(text: str) -> tuple[int, int]:
    """(parent's pid, clock ticks used) of a line of /proc/PID/stat.

    The ticks are user and system time of all threads, ended ones too, and of children that
    have ended and were waited for.
    """
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), sum(int(field) for field in fields[11:15])


def parse_busy(text: str) -> int:
    """Clock ticks in which the machine's processors worked, or were taken away: /proc/stat."""
    user, nice, system, _idle, _waiting, *others = map(int, text.split("\n", 1)[0].split()[1:9])
    return user + nice + system + sum(others)


def parse_resident(text: str) -> int:
    """Bytes of VmRSS in /proc/PID/status; 0 for a process that is ending."""
    for line in text.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


def find_tree(root: int, parents: Mapping[int, int]) -> list[int]:
    """``root`` and all that descend from it, given everyone's parent."""
    tree = [root]
    for member in tree:
        tree.extend(pid for pid, parent in parents.items() if parent == member)
    return tree


def read_cpu_seconds(root: int) -> float:
    """Processor time that a process and all its descendants have used."""
    stats = _read_stats()
    parents = {pid: parent for pid, (parent, _) in stats.items()}
    return sum(stats[pid][1] for pid in find_tree(root, parents) if pid in stats) / _TICK


def read_busy_seconds() -> float:
    """Processor time that everything on this machine has used, and its host has taken away."""
    return parse_busy(Path("/proc/stat").read_text()) / _TICK


def read_children_seconds() -> float:
    """Processor time that programs used which ``run`` has run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_resident_bytes(root: int) -> int:
    """Memory that a process and all its descendants have resident."""
    parents = {pid: parent for pid, (parent, _) in _read_stats().items()}
    total = 0
    for pid in find_tree(root, parents):
        with contextlib.suppress(OSError):
            total += parse_resident(Path(f"/proc/{pid}/status").read_text())
    return total


def _read_stats() -> dict[int, tuple[int, int]]:
    stats = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 (this many Path objects are for nothing)
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stats[int(entry)] = parse_stat(Path(f"/proc/{entry}/stat").read_text())
    return stats
