"""EIO and ENOSPC at every input and output of a script that does everything (faults_script.py).

``make torture`` plays every act with every fault. Here it is as many as there is time for, chosen
so that each kind of call on each kind of file fails in each act, and every sync; with
NBDSERVE_FAULTS=all it is all.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.local_layers import LocalLayerStore
from snapshots.catalogue import Catalogue
from snapshots.local_host import LocalHost
from snapshots.threads import Threads
from tests.durability.faults import Fault, Seam
from tests.durability.faults_model import BLOCK
from tests.durability.faults_script import ACTS, Stage, environment, run

ALL = os.environ.get("NBDSERVE_FAULTS") == "all"
MEMORY = Path("/dev/shm")
# What only asks: it fails once in all acts, and is not told that there is no space.
QUESTIONS = ("stat", "lstat", "fstat", "statvfs", "scandir", "listdir", "lseek", "flock", "ioctl",
             "posix_fadvise", "pread")  # fmt: skip
READS = (*QUESTIONS, "preadv", "read", "unlink", "rmdir", "ftruncate")
Job = tuple[int, Fault]


def new_directory() -> tempfile.TemporaryDirectory[str]:
    """In memory where that is possible: nothing here needs a disk."""
    where = MEMORY if os.access(MEMORY, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="nbdserve-faults-", dir=where)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with new_directory() as directory:
        yield Stage(Path(directory))


def every_fault(stage: Stage) -> list[Job]:
    jobs = []
    for act, calls in enumerate(stage.calls):
        for name in calls.names:
            jobs += [(act, Fault(name, errno.EIO)), (act, Fault(name, errno.ENOSPC))]
            if name in calls.takes_space:
                jobs.append((act, Fault(name, errno.ENOSPC, full=True)))
    return jobs


def chosen(jobs: list[Job]) -> list[Job]:
    """The first of each kind of call on a kind of file in an act, and the syncs of layers.

    Want of space that is over at once is tried with each kind of call in one act. What only reads
    is not told that there is no space.
    """
    found: dict[object, Job] = {}
    for act, fault in jobs:
        call = fault.name.split()[0]
        if fault.error == errno.ENOSPC and call in READS:
            continue
        kind = re.sub(r"\d+", "", fault.name)
        where = fault.name if call == "fdatasync" and not fault.full else kind
        once = call in QUESTIONS or (fault.error == errno.ENOSPC and not fault.full)
        key = (None if once else act, where, fault.error, fault.full)
        found.setdefault(key, (act, fault))
    return list(found.values())


def play(stage: Stage, act: int, fault: Fault) -> str:
    """What is wrong; nothing when all is right."""
    try:
        outcome = stage.play(act, fault)
    except (AssertionError, TimeoutError) as error:
        notes = getattr(error, "__notes__", ["it took too long"])
        return f"{error}\n  {' '.join(notes)}"
    if not outcome.fired:
        return f"act {act} never came to {fault}"
    return ""


@pytest.mark.timeout(7200 if ALL else 300)
@pytest.mark.parametrize("act", range(len(ACTS)), ids=[act.__name__ for act in ACTS])
def test_every_call_fails(stage: Stage, act: int) -> None:
    jobs = every_fault(stage) if ALL else chosen(every_fault(stage))
    faults = [fault for played, fault in jobs if played == act]
    print(f"{len(faults)} faults at {len(stage.calls[act].names)} calls")
    wrong = [line for fault in faults if (line := play(stage, act, fault))]
    assert not wrong, f"{len(wrong)} of {len(faults)}:\n" + "\n".join(wrong[:20])


def test_a_worker_killed_behind_a_failed_sync() -> None:
    """It told nobody: what it left in the cache is neither served nor taken for durable."""

    async def scenario(data: Path, seam: Seam) -> None:
        store = LocalLayerStore(data)
        threads = Threads()
        host = LocalHost(store, threads)
        catalogue = await Catalogue.open(store, [host])
        await catalogue.create_volume("a", 16 * BLOCK)
        handle = await catalogue.open_volume("a", lambda: None)
        await handle.write(0, b"a" * BLOCK)
        await handle.flush()
        await handle.write(0, b"b" * BLOCK)
        host._watcher = None
        seam.fail_next("fdatasync", data / "layers" / catalogue._manifests.get("a").head)
        with pytest.raises(OSError, match="sync failed"):
            await handle.flush()
        catalogue._views.lost(host)
        catalogue._views.hosts[:] = [again := LocalHost(store, threads)]
        await again.start(catalogue._views)
        handle = await catalogue.open_volume("a", lambda: None)
        buffer = bytearray(BLOCK)
        await handle.read(0, memoryview(buffer))
        assert bytes(buffer) == b"a" * BLOCK
        await catalogue.close_export(handle)
        await catalogue.close()
        assert (data / "lock").read_bytes() == b"", "the next start drops what is cached"

    with (
        new_directory() as directory,
        environment(0, []),
        Seam(Path(directory) / "data") as seam,
    ):
        run(scenario(Path(directory) / "data", seam))
        assert seam.fired
        seam.close_all()
