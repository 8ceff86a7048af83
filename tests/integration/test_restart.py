"""Restarts and upgrades under a guest's load: qemu with reconnect-delay sees a pause, no error.

fio writes and verifies through qemu-storage-daemon, whose NBD client is that of a guest's disk. A
restart here is what a service manager does with its socket unit: the listening socket stays open.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .parts import DIE_WITH_PARENT, MIB, NBDSERVE, require, run

SIZE = 32 * MIB
ROUNDS = int(os.environ.get("NBDSERVE_RESTARTS", "3"))
"""How often it is restarted; it is killed a third as often."""

LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def listening(data_directory: Path) -> Iterator[socket.socket]:
    """Yield a socket that is listened on whatever becomes of the daemon."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(data_directory.with_name("nbd.sock")))
        sock.listen(64)
        yield sock


class Restarted:
    """A daemon over a passed socket."""

    def __init__(self, data: Path, listening: socket.socket) -> None:
        self.data = data
        self.address = f"unix:{listening.getsockname()}"
        self._listening = listening
        self._log = data.with_name("daemon.log").open("ab")

    def start(self) -> None:
        number = self._listening.fileno()
        self.process = subprocess.Popen(
            [*DIE_WITH_PARENT, sys.executable, "-c", LAUNCH, str(number), sys.executable, "-m",
             "nbdserve", "serve", "--data", self.data, "--listen", self.address, "--workers", "2"],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, pass_fds=[number],
        )  # fmt: skip

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0, self.read_log()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def written(self) -> int:
        """Bytes that its workers have written since they were started."""
        process = self.process.pid
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        counts = (Path(f"/proc/{child}/io").read_text() for child in children)
        return sum(int(count.partition("wchar: ")[2].split()[0]) for count in counts)

    def read_log(self) -> str:
        return self.data.with_name("daemon.log").read_text()


def test_a_guest_sees_only_a_pause(
    data_directory: Path, listening: socket.socket, tmp_path: Path
) -> None:
    require("qemu-storage-daemon", "fio")
    daemon = Restarted(data_directory, listening)
    kills = max(1, ROUNDS // 3)
    run(NBDSERVE, "volume", "create", "disk", "--size", str(SIZE), "--data", data_directory)
    daemon.start()
    guest = data_directory.with_name("guest.sock")
    proxy = subprocess.Popen(
        [*DIE_WITH_PARENT, "qemu-storage-daemon",
         "--blockdev", "driver=nbd,node-name=disk,reconnect-delay=120,export=disk,"
         f"server.type=unix,server.path={listening.getsockname()}",
         "--nbd-server", f"addr.type=unix,addr.path={guest}",
         "--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while not guest.exists():
            assert proxy.poll() is None
            time.sleep(0.05)
        common = [
            "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={guest}", "--name=guest",
            f"--size={SIZE}", "--bs=16k", "--iodepth=8", "--verify=crc32c",
            "--verify_state_save=0",
        ]  # fmt: skip
        # Reads are verified, too: so all blocks are written once.
        run("fio", *common, "--rw=write", "--end_fsync=1", "--do_verify=1")
        load = subprocess.Popen(
            ["fio", *common, "--rw=randrw", "--verify_backlog=64", "--time_based",
             "--runtime=3600", "--rate_iops=400", "--output-format=terse"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            for end in (*(daemon.stop,) * ROUNDS, *(daemon.kill,) * kills, None):
                while daemon.written() < 2 * MIB:
                    assert load.poll() is None, load.communicate()[0]
                    time.sleep(0.05)
                if end is not None:
                    end()
                    daemon.start()
        finally:
            load.terminate()
            said, _ = load.communicate(timeout=60)
        assert "verify" not in said and "error" not in said.lower(), said
        opened = daemon.read_log().count("export=disk: opened")
        assert opened == ROUNDS + kills + 1
    finally:
        proxy.terminate()
        proxy.communicate(timeout=60)
    daemon.stop()
    assert "Traceback" not in daemon.read_log()
