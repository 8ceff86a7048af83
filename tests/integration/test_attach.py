"""`nbdserve attach` under a real kernel: the daemon goes and comes, and nobody in front of it sees
more than a pause.

NBDSERVE_ATTACH_RESTARTS says how often the daemon is killed, or stopped, and started again while a
file system is in use (2, and 10 in `make torture`).
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .parts import GIB, MIB, Daemon, KernelMachine, require, serve_options

pytestmark = pytest.mark.timeout(1800)

RESTARTS = int(os.environ.get("NBDSERVE_ATTACH_RESTARTS", "2"))

# fio writes and verifies, again and again, until `finish_load`; `pauses` notes how long single
# writes took, in hundredths of a second.
LOAD = """
set -e
say_and_wait() {
    echo $1
    read line
}
load() {
    (
        number=0
        while [ ! -e /tmp/enough ]; do
            number=$((number + 1))
            fio --name=load --directory=$1 --rw=randwrite --bs=8k --size=8m --ioengine=libaio \\
                --iodepth=4 --direct=1 --fsync=50 --verify=crc32c --do_verify=1 --verify_fatal=1 \\
                --randseed=$number >/tmp/fio 2>&1 || { echo "fio failed"; cat /tmp/fio; }
            echo $number >/tmp/rounds
        done
    ) &
    loader=$!
    (
        set +e
        while [ ! -e /tmp/enough ]; do
            begin=$(cut -d' ' -f1 /proc/uptime | tr -d .)
            dd if=/dev/urandom of=$1/paused bs=4k count=1 conv=fsync 2>/dev/null || echo "dd failed"
            end=$(cut -d' ' -f1 /proc/uptime | tr -d .)
            echo $((end - begin)) >>/tmp/pauses
        done
    ) &
    pauser=$!
}
finish_load() {
    touch /tmp/enough
    wait $loader
    wait $pauser
    echo "rounds of fio: $(cat /tmp/rounds)"
    echo "longest pauses in centiseconds:" $(sort -n /tmp/pauses | tail -n 12)
}
complaints() {
    if dmesg | grep -E "I/O error|EXT4-fs error|EXT4-fs warning|Other side|hung task|aborted"; then
        echo "the kernel complained"
    fi
}
"""

MOUNTED = """
nbdserve attach disk /dev/nbd0 --uri $uri
mkfs.ext4 -q -E lazy_itable_init=0 /dev/nbd0
mount /dev/nbd0 /mnt
load /mnt
sleep 2
number=0
while [ $number -lt $restarts ]; do
    say_and_wait restart
    sleep 5
    number=$((number + 1))
done
if nbdserve detach disk; then echo "detached what is mounted"; fi
nbdserve attach disk --uri $uri
if nbdserve attach other /dev/nbd0 --uri $uri; then echo "attached twice"; fi
say_and_wait grow
until [ $(cat /sys/block/nbd0/size) = 4194304 ]; do sleep 1; done
resize2fs /dev/nbd0 2>&1
df -k /mnt | tail -n 1
kill -9 $(sed 's/.*"keeper": \\([0-9]*\\).*/\\1/' /run/nbdserve/attach/*.json)
say_and_wait kill
nbdserve attach disk /dev/nbd0 --uri $uri
sleep 3
finish_load
umount /mnt
e2fsck -f -n /dev/nbd0 2>&1
nbdserve detach disk
complaints
echo done
"""

ENCRYPTED = """
mkdir tls
cat >tls/ca.pem <<'END'
{authority}END
nbdserve attach disk --uri nbds://10.0.2.2:{port}/ --connections 2 --block-size 4096 \\
    --tls-ca tls/ca.pem --tls-hostname localhost --timeout 5
cat /sys/block/nbd0/queue/logical_block_size
nbdserve attach disk@empty --uri nbds://10.0.2.2:{port}/ --tls-ca tls/ca.pem \\
    --tls-hostname localhost --json
if nbdserve attach other --uri nbds://10.0.2.2:{port}/; then echo "no certificate was asked for"; fi
if dd if=/dev/zero of=/dev/nbd1 bs=4k count=1 2>/dev/null; then echo "wrote to a snapshot"; fi
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=32 2>/dev/null
sha256sum /mnt/file >/tmp/sum
sync
echo 3 >/proc/sys/vm/drop_caches
say_and_wait restart
sha256sum -c /tmp/sum
umount /mnt
exec 5</dev/nbd0
if nbdserve detach /dev/nbd0; then echo "detached what is open"; fi
exec 5<&-
nbdserve detach disk
nbdserve attached
complaints
echo done
"""

GUEST = """
mkfs.ext4 -q -E lazy_itable_init=0 /dev/vda
mount /dev/vda /mnt
load /mnt
sleep 2
number=0
while [ $number -lt $restarts ]; do
    say_and_wait restart
    sleep 3
    number=$((number + 1))
done
say_and_wait grow
until [ $(cat /sys/block/vda/size) = 4194304 ]; do sleep 1; done
resize2fs /dev/vda 2>&1
df -k /mnt | tail -n 1
finish_load
umount /mnt
e2fsck -f -n /dev/vda 2>&1
complaints
echo done
"""

WRONG = ("failed", "complained", "detached what", "attached twice", "wrote to", "was asked for")


class Restarter:
    """Kills the daemon and starts it again, or stops it and does; by turns."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._number = 0

    def __call__(self) -> None:
        """Take the daemon away for a second."""
        self._number += 1
        if self._number % 2:
            self._daemon.kill()
        else:
            assert self._daemon.stop() == 0
        time.sleep(1)
        self._daemon.start()


class Monitor:
    """A connection to qemu's monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; return its result."""
        message = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(message).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "event" not in answer:
                assert "return" in answer, f"{command}: {answer}"
                return answer["return"]

    def close(self) -> None:
        """End the connection."""
        self._lines.close()
        self._socket.close()


@pytest.fixture
def monitor_path(data_directory: Path) -> Iterator[Path]:
    """Yield where qemu's monitor is to listen."""
    yield data_directory.with_name("qmp")


def check_output(output: str, *expected: str) -> None:
    """See that nothing went wrong, and that all that is expected came in this order."""
    print(output)
    assert not [word for word in WRONG if word in output], output
    position = 0
    for text in expected:
        position = output.find(text, position) + 1
        assert position, f"{text!r} is missing in:\n{output}"


def test_restarts_under_a_file_system(daemon: Daemon, kernel_machine: KernelMachine) -> None:
    require("fio", "resize2fs")
    daemon.create("disk", GIB)
    daemon.create("other", GIB)

    def grow() -> None:
        daemon.command("volume", "resize", "disk", "--size", "2G")

    def kill() -> None:
        daemon.kill()
        daemon.start()

    settings = f"uri=nbd://10.0.2.2:{daemon.port}/ restarts={RESTARTS}\n"
    output = kernel_machine.run(
        settings + LOAD + MOUNTED,
        {"restart": Restarter(daemon), "grow": grow, "kill": kill},
        "--nbdserve",
        "--fio",
        timeout=600 + 60 * RESTARTS,
    )
    check_output(
        output,
        "attached disk as /dev/nbd0, 1G",
        "/dev/nbd0 is busy: /dev/nbd0 is mounted on /mnt",
        "already attached: disk as /dev/nbd0, 1G",
        f"/dev/nbd0 is attached to nbd://10.0.2.2:{daemon.port}/disk",
        "The filesystem on /dev/nbd0 is now 524288 (4k) blocks long",
        "already attached: disk as /dev/nbd0, 2G",
        "rounds of fio",
        "Pass 5",
        "detached /dev/nbd0",
        "done",
    )


def test_with_tls(
    start_daemon: Callable[..., Daemon],
    data_directory: Path,
    kernel_machine: KernelMachine,
    certificates: Path,
) -> None:
    daemon = start_daemon(data_directory, *serve_options(certificates), "--tls", "optional")
    daemon.create("disk", 256 * MIB)
    daemon.take_snapshot("disk@empty")
    script = ENCRYPTED.format(
        authority=(certificates / "ca-cert.pem").read_text(), port=daemon.port
    )
    output = kernel_machine.run(
        LOAD + script, {"restart": Restarter(daemon)}, "--nbdserve", timeout=600
    )
    check_output(
        output,
        "attached disk as /dev/nbd0, 256M",
        "4096",
        '"read_only": true',
        "certificate is not trusted",
        "/mnt/file: OK",
        "/dev/nbd0 is busy: /dev/nbd0 is open in process",
        "detached /dev/nbd0",
        "/dev/nbd1  disk@empty  256M  read-only",
        "done",
    )


def test_restarts_under_a_guest(
    daemon: Daemon, kernel_machine: KernelMachine, monitor_path: Path
) -> None:
    """The same for a disk of a virtual machine, whose client is qemu's."""
    require("fio", "resize2fs")
    daemon.create("disk", GIB)
    server = {"type": "unix", "path": str(daemon.socket)}
    node = {"driver": "nbd", "export": "disk", "reconnect-delay": 60}

    def grow() -> None:
        daemon.command("volume", "resize", "disk", "--size", "2G")
        monitor = Monitor(monitor_path)
        monitor.execute("blockdev-add", **node, **{"node-name": "disk-1"}, server=server)
        disk = {"driver": "raw", "node-name": "disk", "file": "disk-1", "discard": "unmap"}
        monitor.execute("blockdev-reopen", options=[disk])
        monitor.execute("blockdev-del", **{"node-name": "disk-0"})
        monitor.execute("block_resize", **{"node-name": "disk"}, size=2 * GIB)
        monitor.close()

    output = kernel_machine.run(
        f"restarts={RESTARTS}\n{LOAD}{GUEST}",
        {"restart": Restarter(daemon), "grow": grow},
        "--fio",
        "--disk",
        f"driver=nbd,export=disk,reconnect-delay=60,server.type=unix,server.path={daemon.socket}",
        "--qmp",
        monitor_path,
        timeout=600 + 60 * RESTARTS,
    )
    check_output(
        output,
        "The filesystem on /dev/vda is now 524288 (4k) blocks long",
        "rounds of fio",
        "Pass 5",
        "done",
    )
