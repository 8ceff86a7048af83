"""Worker processes: what they share, what they do not, and what the end of one takes down."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdserve.control.client import path

from .parts import (
    DIE_WITH_PARENT,
    MIB,
    NBDSERVE,
    SYSTEM_PATH,
    Daemon,
    over_all_transports,
    qemu_img,
    qemu_io,
    require,
    run,
)

pytestmark = over_all_transports

# Writes numbered blocks and flushes each, until it gets a line or loses the connection; then it
# says what it knows to be durable.
WRITER = """
import json, select, sys, nbd
handle = nbd.NBD()
handle.connect_uri(sys.argv[1])
print("connected", flush=True)
number, durable, failure = 0, {}, None
try:
    while not select.select([sys.stdin], [], [], 0)[0]:
        number += 1
        handle.pwrite(number.to_bytes(8, "little") * 512, number % 64 * 4096)
        handle.flush()
        durable[number % 64] = number
except nbd.Error as error:
    failure = error.string
print(json.dumps({"number": number, "durable": durable, "failure": failure}), flush=True)
"""

# Writes a counter to the first volume, then to the second, again and again.
ALTERNATE = """
import select, sys, nbd
first, second = nbd.NBD(), nbd.NBD()
first.connect_uri(sys.argv[1])
second.connect_uri(sys.argv[2])
print("connected", flush=True)
number = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    number += 1
    data = number.to_bytes(8, "little") * 512
    first.pwrite(data, 0)
    second.pwrite(data, 0)
print(number, flush=True)
"""


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon], data_directory: Path) -> Daemon:
    """Return a daemon with two workers."""
    return start_daemon(data_directory, "--workers", "2")


class Client:
    """One of the scripts above, connected."""

    def __init__(self, script: str, *uris: str) -> None:
        self.process = subprocess.Popen(
            [*DIE_WITH_PARENT, "/usr/bin/python3", "-c", script, *uris],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PATH": SYSTEM_PATH}, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "connected\n"

    def end(self) -> Any:
        """Let it end, if it has not; return what it says."""
        output, _ = self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0
        return json.loads(output)

    def end_by_loss(self) -> Any:
        """Wait until it has ended because its connection was lost; return what it says."""
        assert self.process.stdout is not None
        report = json.loads(self.process.stdout.readline())
        assert self.process.wait(60) == 0
        assert report["failure"] is not None
        return report


@pytest.fixture
def connect(daemon: Daemon) -> Iterator[Callable[..., Client]]:
    """Start clients; none outlives the test."""
    require("nbdsh", "nbdcopy")
    clients: list[Client] = []

    def connect(script: str, *exports: str) -> Client:
        clients.append(Client(script, *(daemon.uri(export) for export in exports)))
        return clients[-1]

    yield connect
    for client in clients:
        client.process.kill()
        client.process.wait()


def workers_of(daemon: Daemon) -> dict[int, int]:
    """The volumes that each worker has open, by its process."""
    status = daemon.control().get(path("status"))
    return {found["pid"]: found["volumes"] for found in status["workers"]}


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a true value; return it."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)
    return value


def worker_with_a_volume(daemon: Daemon) -> int:
    """The process of the only worker that has a volume open."""
    (pid,) = [pid for pid, volumes in workers_of(daemon).items() if volumes]
    return pid


def create(daemon: Daemon, *volumes: str, size: int = 16 * MIB) -> None:
    for volume in volumes:
        daemon.create(volume, size)


def read(daemon: Daemon, export: str, copy: Path) -> bytes:
    copy.unlink(missing_ok=True)
    run("nbdcopy", daemon.uri(export), copy)
    return copy.read_bytes()


def check_durable(content: bytes, report: dict[str, Any]) -> None:
    """Every block that was flushed is there, unless a later write of it is."""
    assert report["durable"]
    for slot, number in report["durable"].items():
        block = content[int(slot) * 4096 :][:4096]
        assert block == block[:8] * 512, "a block is torn"
        found = int.from_bytes(block[:8], "little")
        assert found in (number, number + 64), (slot, number, found)


def test_volumes_are_spread_over_the_workers(
    daemon: Daemon, connect: Callable[..., Client]
) -> None:
    create(daemon, "a", "b", "c")
    daemon.take_snapshot("a@one")
    assert sorted(workers_of(daemon).values()) == [0, 0]
    first = connect(WRITER, "a")
    assert sorted(workers_of(daemon).values()) == [0, 1]
    second = connect(WRITER, "b")
    assert sorted(workers_of(daemon).values()) == [1, 1]
    # What belongs to a volume that is open goes where it is.
    run("nbdinfo", "--size", daemon.uri("a@one"))
    third, again = connect(WRITER, "c"), connect(WRITER, "a")
    assert sorted(workers_of(daemon).values()) == [1, 2]
    assert daemon.control().get(path("status"))["clients"] == 4
    assert "with 2 volumes" in daemon.command("status").stdout
    for client in (first, second, third, again):
        assert client.end()["failure"] is None
    until(lambda: not any(workers_of(daemon).values()))


def test_the_end_of_a_worker_takes_down_its_volumes_only(
    daemon: Daemon, connect: Callable[..., Client], tmp_path: Path
) -> None:
    create(daemon, "a", "b")
    lost = connect(WRITER, "a")
    pid = worker_with_a_volume(daemon)
    kept = connect(WRITER, "b")
    time.sleep(0.5)
    for _ in range(2):
        os.kill(pid, signal.SIGKILL)
        report = lost.end_by_loss()
        check_durable(read(daemon, "a", tmp_path / "copy"), report)
        until(lambda: None not in workers_of(daemon))
        assert pid not in workers_of(daemon)
        assert kept.process.poll() is None
        others = {one for one, volumes in workers_of(daemon).items() if volumes}
        lost = connect(WRITER, "a")
        (pid,) = {one for one, volumes in workers_of(daemon).items() if volumes} - others
        time.sleep(0.3)
    report = kept.end()
    assert report["failure"] is None
    check_durable(read(daemon, "b", tmp_path / "copy"), report)
    assert lost.end()["failure"] is None
    log = daemon.read_log()
    assert log.count("was ended by SIGKILL") == 2
    assert log.count("closed with their worker: a;") == 2


def test_a_worker_ends_in_the_middle_of_group_snapshots(
    daemon: Daemon, connect: Callable[..., Client], tmp_path: Path
) -> None:
    """Each snapshot is there for both volumes or for none, and both go on being usable."""
    create(daemon, "a", "b")
    taken = set()
    for number in range(2 if daemon.tls else 8):
        lost = connect(WRITER, "a")
        pid = worker_with_a_volume(daemon)
        kept = connect(WRITER, "b")
        name = f"s{number}"
        with subprocess.Popen(
            [NBDSERVE, "snapshot", "create", f"a@{name}", f"b@{name}"],
            env=daemon.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as snapshot:  # fmt: skip
            time.sleep(0.2 + number * 0.03)
            os.kill(pid, signal.SIGKILL)
            _, error = snapshot.communicate(timeout=60)
        if snapshot.returncode:
            assert len(error.splitlines()) == 1, error
        else:
            taken.add(name)
        report = lost.end_by_loss()
        check_durable(read(daemon, "a", tmp_path / "copy"), report)
        report = kept.end()
        assert report["failure"] is None
        check_durable(read(daemon, "b", tmp_path / "copy"), report)
        for volume in "ab":
            listing = daemon.control().get(path("volumes", volume, "snapshots"))["snapshots"]
            assert {found["name"] for found in listing} == taken
        assert daemon.stop() == 0  # a worker that ended often would be started late
        daemon.start()
    daemon.take_snapshot("a@last", "b@last")


def wait_for_end(pid: int) -> None:
    """A process whose files are closed already may still be seen until init has reaped it."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"worker {pid} outlived its daemon"
        time.sleep(0.02)


def test_the_end_of_the_daemon_is_the_end_of_its_workers(
    daemon: Daemon, connect: Callable[..., Client], tmp_path: Path
) -> None:
    create(daemon, "a", "b")
    clients = [connect(WRITER, "a"), connect(WRITER, "b")]
    old = workers_of(daemon)
    time.sleep(0.5)
    daemon.kill()
    daemon.start()
    assert not old.keys() & workers_of(daemon).keys()
    for pid in old:
        wait_for_end(pid)
    for volume, client in zip("ab", clients, strict=True):
        report = client.end_by_loss()
        check_durable(read(daemon, volume, tmp_path / "copy"), report)


def test_workers_share_the_lock_of_the_directory(daemon: Daemon) -> None:
    """Whoever still writes for a killed daemon keeps others from owning the directory."""
    workers = workers_of(daemon)
    assert len(workers) == 2
    for pid in workers:
        assert any(
            link.readlink() == daemon.data / "lock" for link in Path(f"/proc/{pid}/fd").iterdir()
        )


def test_a_group_snapshot_over_two_workers_is_one_instant(
    daemon: Daemon, connect: Callable[..., Client], tmp_path: Path
) -> None:
    create(daemon, "a", "b", size=MIB)
    client = connect(ALTERNATE, "a", "b")
    assert sorted(workers_of(daemon).values()) == [1, 1]
    for number in range(25):
        daemon.take_snapshot(f"a@s{number}", f"b@s{number}")
    last = client.end()
    before = 0
    for number in range(25):
        first, second = (
            int.from_bytes(read(daemon, f"{volume}@s{number}", tmp_path / "copy")[:8], "little")
            for volume in "ab"
        )
        # The second volume's write began when the first one's was answered.
        assert first - second in (0, 1), (number, first, second)
        assert before <= second <= last
        before = second
    assert before > 0


def test_a_worker_that_does_not_answer_stops_no_other(
    daemon: Daemon, connect: Callable[..., Client]
) -> None:
    create(daemon, "a", "b")
    stuck = connect(WRITER, "a")
    pid = worker_with_a_volume(daemon)
    going = connect(WRITER, "b")
    os.kill(pid, signal.SIGSTOP)
    try:
        # It may stop in any phase of it; the daemon is told to give up only at the gate.
        daemon.command("snapshot", "list")
        qemu_io(daemon, "b", "write 8M 1M", "flush")
        assert going.process.poll() is None
    finally:
        os.kill(pid, signal.SIGCONT)
    daemon.take_snapshot("a@one", "b@one")
    assert stuck.end()["failure"] is None
    assert going.end()["failure"] is None


def test_a_second_signal_ends_workers_that_do_not_answer(
    daemon: Daemon, connect: Callable[..., Client]
) -> None:
    create(daemon, "a")
    connect(WRITER, "a")
    pid = worker_with_a_volume(daemon)
    os.kill(pid, signal.SIGSTOP)
    assert daemon.process is not None
    daemon.process.terminate()
    until(lambda: "stopping: requests in flight" in daemon.read_log())
    daemon.process.terminate()
    assert daemon.wait() == 128 + signal.SIGTERM

    def ended() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z"

    until(ended)
    daemon.start()


def test_rollback_deletion_and_merging_while_workers_serve(
    daemon: Daemon, connect: Callable[..., Client], tmp_path: Path
) -> None:
    require("qemu-io")
    create(daemon, "a", "b")

    def write(pattern: int, offset: str, length: str) -> None:
        qemu_io(daemon, "a", f"write -P {pattern} {offset} {length}")

    idle = connect(WRITER, "b")
    for number in range(1, 5):
        write(number, f"{number}M", "2M")
        daemon.take_snapshot(f"a@s{number}")
    expected = {
        name: read(daemon, f"a@{name}", tmp_path / "copy") for name in ("s1", "s2", "s3", "s4")
    }
    busy = connect(WRITER, "a")  # so the volume stays open while layers change under it
    for name in ("s2", "s1", "s3"):
        daemon.command("snapshot", "delete", f"a@{name}")
        del expected[name]
        for other, content in expected.items():
            assert read(daemon, f"a@{other}", tmp_path / "copy") == content
        assert read(daemon, "a", tmp_path / "copy")[MIB:] == expected["s4"][MIB:]
    refused = daemon.command("snapshot", "rollback", "a@s4", check=False)
    assert refused.returncode == 1
    assert busy.process.poll() is None
    daemon.command("snapshot", "rollback", "a@s4", "--force")
    busy.end_by_loss()
    assert read(daemon, "a", tmp_path / "copy") == expected["s4"]
    assert idle.end()["failure"] is None
    assert daemon.json("volume", "show", "a")["layers"] == 2


def test_real_clients_of_both_workers_at_once(daemon: Daemon, tmp_path: Path) -> None:
    require("fio", "qemu-img", "nbdinfo", "nbdcopy")
    create(daemon, "a", "b", size=64 * MIB)
    loads = [
        subprocess.Popen(
            [*DIE_WITH_PARENT, "fio", "--name=load", "--ioengine=nbd",
             f"--uri={daemon.uri(volume)}", "--size=64M", "--rw=randrw", "--bsrange=512-256k",
             "--bs_unaligned=1", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
             "--iodepth=32"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for volume in "ab"
    ]  # fmt: skip
    for load in loads:
        output, _ = load.communicate(timeout=240)
        assert load.returncode == 0, output
        assert "err= 0" in output, output
    daemon.take_snapshot("a@one", "b@one")
    for volume in "ab":
        image, snapshot = daemon.image(volume), daemon.image(f"{volume}@one")
        qemu_img(daemon, "compare", "-f", "raw", "-F", "raw", image, snapshot)
        assert run("nbdinfo", "--size", daemon.uri(volume)).stdout.strip() == str(64 * MIB)
        qemu_img(daemon, "convert", "-f", "raw", "-O", "raw", image, tmp_path / volume)
        assert (tmp_path / volume).read_bytes() == read(daemon, volume, tmp_path / "copy")
