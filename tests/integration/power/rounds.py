"""Rounds: boot, compare with what must be there, load, cut; and again, on the same disk.

The moment of a cut is random: some seconds into the load, a moment after a FLUSH was acknowledged,
or after the client has asked for something other than a write; or while the machine starts after
the cut before (that one is no round: nothing is compared, and the client knows nothing of it).
"""

import json
import os
import queue
import random
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .disk import BLOCK, SECTOR, Disk
from .guest import PROJECT, build_initramfs, kernel_vm
from .machine import Machine
from .model import WrongError

SIZE = 384 << 20  # of the disk; XFS takes no less than 300 MiB
CLIENT_PYTHON = "/usr/bin/python3"  # Debian's, which has libnbd
PATIENCE = 1000  # seconds
LOAD_SECONDS = (0.5, 6)
# What is cut, and the line of the client's that is waited for.
MOMENTS = (
    ("at any time", None),
    ("after a FLUSH", "flushed"),
    ("after a FLUSH", "flushed"),
    ("during an operation", "begins: "),
    ("during an operation", "begins: "),
)
START_CUT_SHARE = 0.35

# What must be there for a round: what makes the file system, in a file.
MAKERS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q"],
}
TORN_AT = {"ext4": SECTOR, "xfs": BLOCK}  # disk.py says why


@dataclass
class Trial:
    """One disk and its rounds, in ``directory``, which is the caller's to delete."""

    directory: Path
    file_system: str
    source: random.Random
    broken: str = ""  # which call does nothing in the daemon: fdatasync, fsync
    counts: Counter = field(default_factory=Counter)  # of machines and cuts
    found: dict = field(default_factory=dict)  # the client's counts, over all rounds
    boots: int = 0
    recovery_seconds: float = 0.0  # from the mount until the daemon listened, at the last boot

    def __post_init__(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        version, _ = kernel_vm.find_kernel()
        (self.directory / "initramfs").write_bytes(build_initramfs(version))
        with (self.directory / "durable").open("wb") as file:
            file.truncate(SIZE)
        program, *options = MAKERS[self.file_system]
        subprocess.run(
            [kernel_vm.find_tool(program), *options, self.directory / "durable"], check=True
        )
        copy_sparse(self.directory / "durable", self.directory / "current")
        self.disk = Disk(self.directory, SIZE, TORN_AT[self.file_system])

    def close(self):
        self.disk.close()

    def play(self, rounds):
        """Boot once more than there are rounds: the last boot only looks. Raises WrongError."""
        for _ in range(rounds):
            self._boot_and_cut()
            while self.source.random() < START_CUT_SHARE:
                self._cut_the_start()
        self._look()

    def _boot_and_cut(self):
        machine = self._start()
        try:
            client = self._meet(machine, "load")
            client.wait_for("loading")
            self._wait_for_the_moment(client)
            self._cut(machine)
        finally:
            machine.kill()
        self._finish(client, machine)
        self.counts["rounds"] += 1

    def _wait_for_the_moment(self, client):
        time.sleep(self.source.uniform(*LOAD_SECONDS))
        client.check_alive()
        moment, line = self.source.choice(MOMENTS)
        if line:
            client.skip()
            client.wait_for(line)
            time.sleep(self.source.choice([0, 0.04, 0.2, 0.8]) * self.source.random())
        self.counts[f"cuts {moment}"] += 1

    def _cut_the_start(self):
        machine = self._start()
        try:
            machine.wait_for("booted")
            time.sleep(self.recovery_seconds * self.source.uniform(0, 1.1))
            self._cut(machine)
        finally:
            machine.kill()
        self.counts["cuts during a start"] += 1

    def _look(self):
        machine = self._start()
        try:
            client = self._meet(machine, "verify")
            self._finish(client, machine)
            # As an administrator would: look, stop it, and look at what is there without it.
            self._check(machine)
            status, said = machine.run(
                "kill $(cat /tmp/pid); until [ -s /tmp/ended ]; do sleep 1; done;"
                " (exit $(cat /tmp/ended))"
            )
            if status:
                raise WrongError(f"the daemon ended with {said}{machine.read_log()}")
            self._check(machine)
            self._cut(machine)
        finally:
            machine.kill()

    def _start(self):
        copy_sparse(self.disk.path, self.directory / "before-boot")
        self.disk.power_on()
        self.boots += 1
        return Machine(
            self.directory, self.disk, self.boots,
            file_system=self.file_system,
            workers=self.source.choice([1, 2]),
            eager=self.source.choice([0, 1]),
            broken=self.broken,
        )  # fmt: skip

    def _meet(self, machine, purpose):
        """Wait for the daemon, let a client compare; return it."""
        machine.wait_for("booted")
        began = time.monotonic()
        machine.wait_for("bridged", "listening on ")
        self.recovery_seconds = time.monotonic() - began
        client = Client(self.directory, machine, self.source.randrange(1 << 31), purpose)
        client.wait_for("verified")
        return client

    def _check(self, machine):
        status, said = machine.run("nbdserve check 2>&1")
        if status:
            raise WrongError(f"nbdserve check ended with {status}: {said}")
        self.counts["runs of nbdserve check"] += 1

    def _cut(self, machine):
        cut = self.disk.cut(random.Random(self.source.random()))
        machine.kill()
        self.counts["writes to the disk that a cut found in its cache"] += cut.writes
        self.counts["sectors of the disk that a cut changed"] += cut.changed
        print(
            f"{self.file_system}, boot {self.boots}: {cut.writes} writes in the disk's cache, kept"
            f" {cut.manner}: {cut.changed} of {cut.sectors} sectors not as last written",
            flush=True,
        )

    def _finish(self, client, machine):
        self.found = client.wait_to_end()
        if "Traceback" in machine.read_log() or "ERROR" in machine.read_log():
            raise WrongError(f"the daemon has logged an error:\n{machine.read_log()}")


class Client:
    """client.py as a process."""

    def __init__(self, directory, machine, seed, purpose):
        self._lines = queue.SimpleQueue()
        self._said = []
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
        }
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", CLIENT_PYTHON,
             "-m", "tests.integration.power.client", directory / "state",
             str(machine.port), str(machine.control_port), str(seed), purpose],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=PROJECT, env=environment,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, start):
        """Wait for a line that starts so."""
        while not self._next().startswith(start):
            pass

    def skip(self):
        """Wait only for what comes from now on."""
        while not self._lines.empty():
            self._take(self._lines.get())

    def check_alive(self):
        """Raise WrongError when it has ended although the machine runs."""
        if self._process.poll() is not None:
            self._fail()

    def wait_to_end(self):
        """Wait until it has ended; return its counts."""
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise WrongError(f"the client is stuck:\n{''.join(self._said[-30:])}") from None
        last = self._said[-1] if self._said else ""
        while not last.startswith("counts: ") and (line := self._lines.get()) is not None:
            last = line
        if status or not last.startswith("counts: "):
            self._fail()
        return json.loads(last.removeprefix("counts: "))

    def _next(self):
        try:
            return self._take(self._lines.get(timeout=PATIENCE))
        except queue.Empty:
            raise WrongError(f"the client is stuck:\n{''.join(self._said[-30:])}") from None

    def _take(self, line):
        if line is None:
            self._fail()
        return line

    def _fail(self):
        raise WrongError(
            f"the client ended with {self._process.wait()}:\n{''.join(self._said[-30:])}"
        )

    def _read(self):
        for line in self._process.stdout:
            self._said.append(line)
            self._lines.put(line)
        self._lines.put(None)


def copy_sparse(source, target):
    """Copy a file with its holes."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
