"""The virtual machine: started, spoken to, killed."""

import queue
import re
import socket
import subprocess
import threading
import time

from .guest import kernel_vm

PATIENCE = 900  # seconds


class MachineError(Exception):
    """The machine did not do what it should; the text says what it said."""


class Machine:
    """One boot, from the start of qemu to its end.

    ``directory`` has the initramfs and gets what the machine says; ``settings`` are variables for
    the guest's init. The kernel's console and the daemon's log go to files, one a boot.
    """

    def __init__(self, directory, disk, number, **settings):
        _, kernel = kernel_vm.find_kernel()
        self.console = directory / f"console-{number}"
        self.log = directory / f"daemon-{number}.log"
        self.port, self.control_port = find_free_ports(2)
        forwards = ",".join(
            f"hostfwd=tcp:127.0.0.1:{outside}-:{inside}"
            for outside, inside in ((self.port, 10809), (self.control_port, 10810))
        )
        words = " ".join(f"power.{name}={value}" for name, value in settings.items())
        self._lines = queue.SimpleQueue()
        self._said = []
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", str(kernel_vm.find_tool("qemu-system-x86_64")),
             "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
             # KVM hangs on machines that are virtual themselves; emulation works on all, but copies
             # slowly with what a real processor copies fast with.
             "-accel", "tcg", "-cpu", "max,-erms,-fsrm", "-smp", "2", "-m", "512",
             "-kernel", str(kernel), "-initrd", str(directory / "initramfs"),
             "-append", f"console=ttyS0 quiet panic=-1 mitigations=off no_timer_check {words}",
             "-netdev", f"user,id=net,{forwards}",
             "-device", "virtio-net-pci,netdev=net,romfile=",
             "-blockdev", f"driver=nbd,node-name=disk,server.type=unix,server.path={disk.socket}",
             "-device", "virtio-blk-pci,drive=disk,write-cache=on",
             "-serial", f"file:{self.console}", "-serial", "stdio", "-serial", f"file:{self.log}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, *patterns, seconds=PATIENCE):
        """Wait until there has been a line for each of the patterns; return those lines."""
        found = {}
        deadline = time.monotonic() + seconds
        while len(found) < len(patterns):
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                raise self._error(f"said no {patterns} in {seconds} seconds") from None
            if line is None:
                raise self._error(f"ended before it said {patterns}")
            found |= {pattern: line for pattern in patterns if re.match(pattern, line)}
        return [found[pattern] for pattern in patterns]

    def run(self, command):
        """Run a shell command in the guest; return its status and what it said."""
        before = len(self._said)
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        (line,) = self.wait_for(r"status \d+$")
        return int(line.split()[1]), "".join(self._said[before:])

    def kill(self):
        """End it as a power cut does."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()

    def read_log(self):
        """What the daemon has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _read(self):
        for line in self._process.stdout:
            self._said.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def _error(self, what):
        console = self.console.read_text(errors="replace") if self.console.exists() else ""
        said = "".join(self._said)
        return MachineError(f"the machine {what}:\n{said}{self.read_log()}{console}")


def find_free_ports(count):
    """TCP ports of 127.0.0.1 that were free a moment ago."""
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports
