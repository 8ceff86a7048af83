"""As many snapshots as there can be, deleted in any order under load, with kills in between.

NBDSERVE_SNAPSHOTS says how many; 250 meet the limit. `make torture` has that many.

**Space.** While all that goes on, what the layers' data files use is sampled. It is never more than

* what the snapshots need that are there, or whose deletion has not returned: for each, the blocks
  that are not as in the one before;
* the head, and once more what it hides in the layer below until that has been given back (hidden.py
  of the product does so every few seconds): fio's part of the volume for each;
* one chunk of a merge, which is copied before it is punched.

What is not data is journals with the room reserved in them, indexes, manifests and the reserve.
"""

import contextlib
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdserve.control.client import path

from .parts import DIE_WITH_PARENT, KIB, MIB, SYSTEM_PATH, Daemon, require

COUNT = int(os.environ.get("NBDSERVE_SNAPSHOTS", "30"))
SEED = int(os.environ.get("NBDSERVE_SNAPSHOTS_SEED", "5"))
MOST_LAYERS = 250
CLIENT = Path(__file__).with_name("snapshots_client.py")
FIO_SIZE = 4 * MIB
SIZE = 32 * MIB
CHUNK = 4 * MIB
KILLS = 4 + COUNT // 25
COMPARED = 3  # snapshots that are read and compared after each few deletions
# A file of many extents has blocks that list them.
LISTS_OF_EXTENTS = 64 * KIB
HEAD_JOURNAL = 2 * MIB
RESERVE = 8 * MIB


class Model:
    """The client that knows everything, as a process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [*DIE_WITH_PARENT, "/usr/bin/python3", CLIENT, str(FIO_SIZE), str(SIZE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PATH": SYSTEM_PATH},
        )  # fmt: skip

    def ask(self, *request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the client ended at {request[0]}"
        return json.loads(answer)


class Load:
    """fio, again and again, on its part of the volume; it ends with the daemon, and is told."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._fio: subprocess.Popen[str] | None = None
        self._killing = False
        self.rounds = 0
        self.failures: list[str] = []

    def start(self) -> None:
        self._stop.clear()
        self._killing = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def expect_a_kill(self) -> None:
        """From here on a lost connection is right."""
        self._killing = True
        self._stop.set()

    def stop(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            if self._killing and self._fio is not None:
                self._fio.kill()  # or it would go on without a connection for ever
            self._thread.join(0.1)
        assert not self.failures, self.failures[0]

    def _run(self) -> None:
        while not self._stop.is_set():
            self._fio = subprocess.Popen(
                [*DIE_WITH_PARENT, "fio", "--name=load", "--ioengine=nbd",
                 f"--uri={self._daemon.uri('disk')}", f"--size={FIO_SIZE}", "--rw=randrw",
                 "--bsrange=512-32k", "--bs_unaligned=1", "--verify=crc32c", "--verify_fatal=1",
                 "--verify_state_save=0", "--iodepth=8", "--rate_iops=500", "--thread",
                 f"--randseed={self.rounds}"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            output, errors = self._fio.communicate()
            if "verify:" in errors or (self._fio.returncode and not self._killing):
                self.failures.append(output + errors)
                return
            self.rounds += 1


class Sampler:
    """Looks at the space that is used all the time, and compares it with what is allowed."""

    def __init__(self, data: Path) -> None:
        self._layers = data / "layers"
        self.allowed = 1 << 60
        self.most = 0.0
        self.samples = 0
        self.exceeded: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.03):
            # What is allowed only shrinks, and when it does that has come true already.
            allowed = self.allowed
            used, layers = data_space(self._layers)
            self.samples += 1
            allowed += layers * LISTS_OF_EXTENTS
            self.most = max(self.most, used / allowed)
            if used > allowed:
                self.exceeded.append(f"{used} bytes in {layers} layers, {allowed} allowed")


def data_space(layers: Path) -> tuple[int, int]:
    """Return the bytes that the data files of all layers use, and how many layers there are."""
    used = count = 0
    for layer in layers.iterdir():
        count += 1
        # It may be deleted meanwhile: what it still uses then is looked at the next time.
        with contextlib.suppress(FileNotFoundError):
            used += sum(file.stat().st_blocks * 512 for file in layer.glob("data-*"))
    return used, count


def space(directory: Path) -> int:
    """Return the bytes that everything below a directory uses."""
    return sum(
        os.lstat(os.path.join(parent, name)).st_blocks * 512
        for parent, _, names in os.walk(directory)
        for name in names
    )


@pytest.fixture
def model() -> Iterator[Model]:
    client = Model()
    try:
        yield client
    finally:
        client.process.kill()
        client.process.communicate()


def eventually(what: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait until something is so; what a daemon does every few seconds, it has done by then."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def names_of(daemon: Daemon) -> list[str]:
    document = daemon.control().get(path("volumes", "disk", "snapshots"))
    return [str(snapshot["name"]) for snapshot in document["snapshots"]]


def delete(daemon: Daemon, name: str) -> None:
    with daemon.control().stream("DELETE", path("volumes", "disk", "snapshots", name)) as answer:
        for _ in answer.lines():
            pass


def layers_of(daemon: Daemon) -> int:
    return int(daemon.control().get(path("volumes", "disk"))["layers"])


@pytest.mark.timeout(3600)
def test_many_snapshots(daemon: Daemon, model: Model) -> None:
    require("fio")
    source = random.Random(SEED)
    daemon.create("disk", SIZE)
    assert model.ask("connect", daemon.uri("disk"))
    load = Load(daemon)
    load.start()
    begun = time.monotonic()
    taken = []
    for number in range(min(COUNT, MOST_LAYERS - 1)):
        model.ask("change", source.randrange(1 << 30))
        daemon.take_snapshot(f"disk@s{number}")
        taken.append(f"s{number}")
        assert model.ask("remember", taken[-1], daemon.uri(f"disk@{taken[-1]}")), taken[-1]
    if COUNT >= MOST_LAYERS:
        refused = daemon.command("snapshot", "create", "disk@more", check=False)
        assert refused.returncode == 1
        assert "250 layers, the most there can be: delete snapshots, or push" in refused.stderr
    assert names_of(daemon) == taken
    model.ask("change", source.randrange(1 << 30))
    print(f"\n{len(taken)} snapshots in {time.monotonic() - begun:.0f} s")

    deletions = source.sample(taken, len(taken))
    kills = set(source.sample(range(1, len(deletions)), KILLS))
    begun, begun_rounds = time.monotonic(), load.rounds
    with Sampler(daemon.data) as sampler:
        for number, name in enumerate(deletions):
            if number in kills:
                killed_while_deleting(daemon, load, name, source)
                daemon.arguments = () if daemon.arguments else ("--workers", "2")
                daemon.start()
                assert model.ask("connect", daemon.uri("disk")), "what was flushed is there"
                load.start()
                if name in names_of(daemon):
                    delete(daemon, name)
            else:
                delete(daemon, name)
            taken.remove(name)
            if number not in kills:
                # Every merge has been made, so each layer that is left is needed.
                sampler.allowed = 2 * FIO_SIZE + CHUNK + int(model.ask("need", taken))
                assert layers_of(daemon) <= len(taken) + 2
            if number % 5 == 4:
                for kept in source.sample(taken, min(COMPARED, len(taken))):
                    assert model.ask("compare", kept, daemon.uri(f"disk@{kept}")), kept
                assert model.ask("check")
            assert not sampler.exceeded, sampler.exceeded[0]
    load.stop()
    print(
        f"{len(deletions)} deletions in {time.monotonic() - begun:.0f} s, {KILLS} kills,"
        f" {load.rounds - begun_rounds} runs of fio; {sampler.samples} samples, at most"
        f" {sampler.most:.0%} of the space allowed"
    )
    assert names_of(daemon) == []
    assert model.ask("check")
    # Now nobody writes: nothing is stored twice, and in the end nothing is stored. Only the space
    # of what fio had written when the daemon was killed, and nobody had flushed, is not found again
    # before its blocks are written or trimmed.
    layers = daemon.data / "layers"
    need = 2 * FIO_SIZE + int(model.ask("need", [])) + 2 * LISTS_OF_EXTENTS
    assert eventually(lambda: data_space(layers)[0] <= need), (data_space(layers), need)
    assert model.ask("check")
    model.ask("trim")
    assert eventually(lambda: data_space(layers)[0] <= 2 * LISTS_OF_EXTENTS), data_space(layers)
    assert model.ask("check")
    left = space(daemon.data)
    print(f"{left >> 10} KiB are left, {left - RESERVE >> 10} without the reserve")
    assert left <= RESERVE + HEAD_JOURNAL + MIB


def killed_while_deleting(daemon: Daemon, load: Load, name: str, source: random.Random) -> None:
    """Kill the daemon at some moment of a deletion."""

    def try_to() -> None:
        with contextlib.suppress(Exception):  # it is killed
            delete(daemon, name)

    deleting = threading.Thread(target=try_to)
    load.expect_a_kill()
    deleting.start()
    time.sleep(source.uniform(0, 0.15))
    daemon.kill()
    deleting.join()
    load.stop()
