"""The interleaved comparison: every server on the same job, one right after the other.

All serve the same random bytes, all of them in the page cache. nbdserve serves volumes of as many
layers, 8 snapshots and the head above them, in three states:

* "nbdserve": each piece of 64 KiB, qcow2's unit, is in a layer chosen at random;
* "4k pieces": the same with 4 KiB, the worst that can be;
* "head only": the head holds every block, the state that writing ends in.

Jobs that only read have volumes that are never written again. For jobs that write there are others
like them, brought back to their state before each job (rolled back to the newest snapshot, the
head's share written anew): writing moves blocks to the head.

How a file came into the page cache decides what it costs later: written in large pieces, it lies in
large folios, which are read faster and, on ext4, written in small pieces several times slower. So
all are filled alike, through the server, by ascending writes of 4 KiB.

Before each job everything is synced, so that no server's jobs pay for the writes of another, and
each server keeps one more client connected, as a volume in use has one. Of the peers, one process
runs at a time, with TLS or without: they cannot do both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.bench import results as names
from scripts.bench.client import Client
from scripts.bench.jobs import JOBS, Job, run_fio
from scripts.bench.layering import assign, build, make_content, pieces_of
from scripts.bench.process import (
    BenchError,
    read_busy_seconds,
    read_children_seconds,
    read_cpu_seconds,
    run,
    tell,
)
from scripts.bench.results import Results, Sample
from scripts.bench.scale import BLOCK, MIB, Scale
from scripts.bench.servers import (
    EXPORT,
    Nbdserve,
    Peer,
    Server,
    make_certificates,
    nbdkit,
    qemu_nbd,
)

SPREADS = {names.NBDSERVE: 16, names.FINE: 1}
"""How many neighbouring blocks are in the same layer."""

HEAD_VOLUME = "head-only"


@dataclass(frozen=True)
class Contestant:
    """One server in one set-up; ``prepare`` runs before each of its jobs."""

    name: str
    server: Callable[[bool], Server]  # with TLS?
    export: Callable[[Job], str]
    prepare: Callable[[Job], None] = lambda job: None
    tls: bool = True


def compare(scale: Scale, directory: Path, sockets: Path, results: Results) -> None:
    """Run all jobs on all servers for all rounds, into ``results.samples``."""
    jobs = [job for job in JOBS if job.depth > 1 and job.block != 16 << 10] if scale.quick else JOBS
    with _contestants(scale, directory, sockets) as contestants:
        for turn in range(scale.rounds):
            for number, job in enumerate(jobs):
                line = []
                for place in range(len(contestants)):
                    # Who goes first changes, lest one always follows another's leftovers.
                    contestant = contestants[(place + turn + number) % len(contestants)]
                    if job.tls and not contestant.tls:
                        continue
                    sample = _measure(scale, contestant, job, turn)
                    results.samples.append(sample)
                    line.append(f"{contestant.name} {sample.iops:,.0f}")
                tell(f"  round {turn + 1}, {job.name}, a second: {'; '.join(line)}")


def _measure(scale: Scale, contestant: Contestant, job: Job, turn: int) -> Sample:
    contestant.prepare(job)
    os.sync()
    export, server = contestant.export(job), contestant.server(job.tls)
    with Client(server.socket, export, tls=job.tls):
        begin, busy, ours = time.monotonic(), read_busy_seconds(), read_children_seconds()
        before = read_cpu_seconds(server.pid)
        uri = server.uri(export, tls=job.tls)
        load = run_fio(job, uri, scale.volume, scale.job_milliseconds, turn + 1)
        used = read_cpu_seconds(server.pid) - before
        busy, ours = read_busy_seconds() - busy, read_children_seconds() - ours
        others = max(0.0, busy - ours - used) / (time.monotonic() - begin)
    return Sample(
        round=turn,
        job=job.name,
        server=contestant.name,
        iops=load.iops,
        p99_microseconds=load.p99_microseconds,
        cpu_microseconds=used / load.operations * 1e6,
        others=others,
    )


@contextlib.contextmanager
def _contestants(scale: Scale, directory: Path, sockets: Path) -> Iterator[list[Contestant]]:
    """All of them, running, with volumes and images made."""
    tell("  making volumes and images")
    content = make_content(scale.volume, seed=1)
    raw, qemu_raw, qcow2 = (directory / name for name in ("nbdkit.raw", "qemu.raw", "qemu.qcow2"))
    for image, image_format in ((raw, "raw"), (qemu_raw, "raw"), (qcow2, "qcow2")):
        run("qemu-img", "create", "-f", image_format, image, str(scale.volume))
    ours = Nbdserve(directory / "nbdserve", sockets)
    certificates = make_certificates(sockets / "tls")
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(ours.serving(certificates))
        spread = _build_volumes(scale, ours, memoryview(content))
        starts = {
            names.NBDKIT: partial(nbdkit, raw, sockets),
            names.QEMU_RAW: partial(qemu_nbd, qemu_raw, "raw", sockets),
            names.QEMU_QCOW2: partial(qemu_nbd, qcow2, "qcow2", sockets),
        }
        peers = {
            name: stack.enter_context(Peer(certificates, start)) for name, start in starts.items()
        }
        for peer in peers.values():
            _fill(peer.serving(False).socket, EXPORT, memoryview(content))
        contestants = [
            *(Contestant(name, peer.serving, lambda job: EXPORT) for name, peer in peers.items()),
            *(
                Contestant(name, lambda tls: daemon, of.export, of.prepare, tls=name != names.FINE)
                for name, of in spread.items()
            ),
            Contestant(names.HEAD_ONLY, lambda tls: daemon, lambda job: HEAD_VOLUME),
        ]
        _check_content(contestants, hashlib.sha256(content).digest())
        del content
        yield contestants


class _Spread:
    """Two volumes whose pieces of ``together`` blocks are spread over all layers."""

    def __init__(self, scale: Scale, ours: Nbdserve, content: memoryview, together: int) -> None:
        self._ours = ours
        self._names = (f"spread-{together}", f"spread-{together}-to-write")
        self._newest = scale.snapshots - 1
        blocks = scale.volume // BLOCK
        assignment = assign(blocks, scale.snapshots + 1, seed=2, together=together)
        self._share = [
            (offset, bytes(data))
            for offset, data in pieces_of(scale.snapshots, assignment, content)
        ]
        for volume in self._names:
            ours.command("volume", "create", volume, "--size", str(scale.volume))
            build(ours.socket, volume, assignment, content, partial(_take_snapshot, ours, volume))

    def export(self, job: Job) -> str:
        return self._names[job.writes]

    def prepare(self, job: Job) -> None:
        """Bring the volume to write back to its first state."""
        if job.writes:
            self._ours.command("snapshot", "rollback", f"{self.export(job)}@s{self._newest}")
            with Client(self._ours.socket, self.export(job)) as client:
                client.write_many(self._share)
                client.flush()


def _build_volumes(scale: Scale, ours: Nbdserve, content: memoryview) -> dict[str, _Spread]:
    """Make nbdserve's volumes."""
    spread = {name: _Spread(scale, ours, content, together) for name, together in SPREADS.items()}
    ours.command("volume", "create", HEAD_VOLUME, "--size", str(scale.volume))
    for layer in range(scale.snapshots):
        _take_snapshot(ours, HEAD_VOLUME, layer)
    _fill(ours.socket, HEAD_VOLUME, content)
    return spread


def _take_snapshot(ours: Nbdserve, volume: str, layer: int) -> None:
    ours.command("snapshot", "create", f"{volume}@s{layer}")


def _fill(where: Path, export: str, content: memoryview) -> None:
    with Client(where, export) as client:
        client.write_many((at, content[at : at + BLOCK]) for at in range(0, client.size, BLOCK))
        client.flush()


def _check_content(contestants: list[Contestant], expected: bytes) -> None:
    """All must serve the same bytes; reading them also has them in the page cache."""
    for contestant in contestants:
        for export in {contestant.export(job) for job in JOBS}:
            digest = hashlib.sha256()
            with Client(contestant.server(False).socket, export) as client:
                for offset in range(0, client.size, MIB):
                    digest.update(client.read(offset, MIB))
            if digest.digest() != expected:
                raise BenchError(f"{contestant.name} serves other bytes than were written")
