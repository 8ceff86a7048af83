"""fio's verified random load, with snapshots being taken meanwhile."""

import subprocess
import threading

import pytest

from .parts import DIE_WITH_PARENT, MIB, Daemon, require, run

SIZE_MIB = 256


# Over TLS shorter: what snapshots do to a load is the same.
@pytest.mark.parametrize(
    ("transport", "count"), [("plain", 12), ("tls", 2)], indirect=["transport"]
)
def test_verified_load_while_snapshots_are_taken_every_second(daemon: Daemon, count: int) -> None:
    require("fio", "nbdcopy")
    daemon.create("disk", SIZE_MIB * MIB)
    enough = threading.Event()
    failures: list[str] = []

    def take_snapshots() -> None:
        try:
            for number in range(count):
                taken = daemon.command("snapshot", "create", f"disk@s{number}", check=False)
                if taken.returncode:
                    failures.append(taken.stderr)
                if enough.wait(1):
                    return
        finally:
            enough.set()

    snapshots = threading.Thread(target=take_snapshots)
    snapshots.start()
    rounds = 0
    try:
        while not enough.is_set() or rounds == 0:
            rounds += 1
            load = subprocess.run(
                [*DIE_WITH_PARENT, "fio", "--name=load", "--ioengine=nbd",
                 f"--uri={daemon.uri('disk')}", f"--size={SIZE_MIB}M", "--rw=randrw",
                 "--bsrange=512-256k", "--bs_unaligned=1", "--verify=crc32c", "--verify_fatal=1",
                 "--verify_state_save=0", "--iodepth=32", f"--randseed={rounds}"],
                capture_output=True, text=True, timeout=240, check=False,
            )  # fmt: skip
            assert load.returncode == 0, load.stdout + load.stderr
            assert "err= 0" in load.stdout, load.stdout
            assert "verify:" not in load.stderr, load.stderr
    finally:
        enough.set()
        snapshots.join()
    assert not failures, failures

    listing = daemon.json("snapshot", "list", "disk")["snapshots"]
    names = [snapshot["name"] for snapshot in listing]
    assert names == [f"s{number}" for number in range(count)]
    for name in names:
        uri = daemon.uri(f"disk@{name}")
        assert run("nbdinfo", "--size", uri).stdout.strip() == str(SIZE_MIB * MIB)
        run("nbdcopy", uri, "null:")
