"""Histories: workloads whose disk is cut at many moments, and every state examined.

A history is a row of lives of the daemon on one data directory. In each, a workload runs, and the
disk is copied together with the model at moments that chance picks, each just before a system
call. From each copy several states are made and **examined**:

1. the real recovery opens it, everything is read and compared with the model;
2. of every fifth, ``nbdserve check`` looks at it before, where nothing but leftovers may be found,
   and after that;
3. of every fifth, what recovery leaves to the background is let happen, everything is compared once
   more, the daemon ends in good order, and the check must find nothing at all.

Whatever the product warns of in its log is a finding, too: after a power cut all is in order.

While that goes on, the disk is copied in the same way, so recoveries are cut and recovered, too.
Each copy is also what a kill leaves: sometimes the next process recovers that, it may write, it
FLUSHes, and then the power fails. The next life goes on from a cut or from a kill of this one.

The same seed gives the same history, as long as PYTHONHASHSEED is the same.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from backends.local_layers import LocalLayerStore
from snapshots.catalogue import Catalogue
from snapshots.checking import CheckReport, check_store
from snapshots.handle import Handle

from .calls import Process, SimulatedPath, routed
from .disk import Choice, Disk, PowerCutError
from .loop import SimulatedLoop
from .model import SECTOR, Expected, FoundVolume, ViolationError, adopt
from .workload import IN_BLOCK, Workload, read_all

DATA = "/srv/data"
LIVES = 3
OPERATIONS = 10
STATES = 3
# Of one life: many histories find more than many moments of one.
MOST_CUTS = 12
CUT_CHANCE = 0.015
# While a snapshot is taken, and before what commits (or makes names durable) or gives space back.
LIKELY_CUT_CHANCE = 0.1
# Before what a merge logs: merges are rare.
MERGE_CUT_CHANCE = 0.5
LIKELY = ("rename", "punch", "fsync")
KILL_CHANCE = 0.9
RECOVERY_CUT_CHANCE = 0.04
DEEPEST = 3
# What nbdserve check may find before anybody has recovered, before merges have gone on, and then.
LEFT_BY_A_CUT = r": (belongs to no volume|a torn tail from offset \d+ on, .*)$"
LEFT_TO_MERGES = r"/merge: a torn tail from offset \d+ on, .*$"
NOTHING = r"(?!)"

WORKLOAD = "in a workload"
KILLED = "in a life begun after a kill"
RECOVERY = "in a recovery"


@dataclass
class Tally:
    """What was examined: ``states`` of ``cuts`` moments, ``where`` those moments were.

    ``disks`` of them were different ones: the others are the same disk at a moment of which more,
    or less, must hold.
    """

    histories: int = 0
    cuts: int = 0
    states: int = 0
    disks: int = 0
    where: Counter[str] = field(default_factory=Counter)
    settled: int = 0
    checks: int = 0
    kills: int = 0


class Finding(AssertionError):  # noqa: N818
    """A state in which a promise is broken, with all that is needed to look into it."""


@dataclass(frozen=True)
class Cut:
    """The disk and what must hold, at a moment; ``depth`` counts the lives that were cut before.

    ``keeps``: a kill at that moment leaves all that was acknowledged, for no power cut came since.
    """

    disk: Disk
    expected: Expected
    name: str
    call: str
    where: str
    depth: int = 0
    keeps: bool = False


class History:
    """One history; see the module's text."""

    def __init__(
        self,
        seed: str,
        tally: Tally,
        states: int = sys.maxsize,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.seed = seed
        self.tally = tally
        self.most = states
        self.stop = stop
        self.random = Random(seed)
        self.loop = SimulatedLoop(seed)
        self.process: Process
        self._examined: set[tuple[int, Expected]] = set()
        self._disks: set[int] = set()

    @property
    def enough(self) -> bool:
        return self.tally.states >= self.most or self.stop()

    def run(self) -> None:
        """Finding, when anything is wrong."""
        self.tally.histories += 1
        try:
            with routed(self.seed) as self.process:
                self._run()
        finally:
            self.loop.close()
            self.tally.disks += len(self._disks)

    def _run(self) -> None:
        disk = Disk()
        expected = Expected([])
        durable = True
        keeps = False
        written = 0
        for life in range(LIVES):
            kind = {"durable": durable, "keeps": keeps}
            cuts = self._live(disk, expected, written, f"{life}", **kind)
            for cut in self.random.sample(cuts, min(len(cuts), MOST_CUTS)):
                self._examine(cut)
                if self.enough:
                    return
            if not cuts:
                return
            cut = self.random.choice(cuts)
            expected = cut.expected
            durable = self.random.random() < 0.6
            written = (life + 1) << 32
            if durable:
                disk = cut.disk.cut(Choice((self.seed, cut.name, "life")))
            else:
                disk = cut.disk.copy()
                disk.log.append("— kill —")
                self.tally.kills += 1
            keeps = cut.keeps and not durable

    def _live(
        self,
        disk: Disk,
        expected: Expected,
        written: int,
        name: str,
        *,
        durable: bool,
        keeps: bool,
    ) -> list[Cut]:
        """Recover, check, and run a workload; the cuts that were made."""
        cuts: list[Cut] = []
        random = Random(f"{self.seed}/{name}")
        where = RECOVERY if durable else KILLED
        freeze: Callable[[], Expected] = lambda: expected  # noqa: E731
        workload: Workload | None = None

        async def live() -> None:
            nonlocal where, freeze, workload, keeps
            catalogue, found = await _recover(disk)
            if keeps:
                expected.check(found, killed=True)
            model = adopt(expected.check(found), written, durable=durable)
            workload = Workload(_store(disk), catalogue, model, random, self.loop)
            where, freeze, keeps = WORKLOAD, model.freeze, True

            def on_call(call: str) -> None:
                take(call)
                workload.on_call(call)

            disk.on_call = on_call
            await workload.run(OPERATIONS)

        def take(call: str) -> None:
            likely = call.startswith(LIKELY) or (workload is not None and workload.at_gate)
            chance = LIKELY_CUT_CHANCE if likely else CUT_CHANCE
            if random.random() < (MERGE_CUT_CHANCE if "/merge" in call else chance):
                at = f"{name}.{len(disk.log)}"
                cuts.append(Cut(disk.copy(), freeze(), at, call, where, keeps=keeps))

        disk.on_call = take
        self._do(live(), disk, f"life {name}", [])
        return cuts

    def _examine(self, cut: Cut) -> None:
        self.tally.cuts += 1
        if cut.depth == 0 and self.random.random() < KILL_CHANCE:
            self.tally.kills += 1
            for deeper in self._check_kill(cut):
                self._examine(deeper)
        for number in range(STATES if cut.depth == 0 else 2):
            if self.enough:
                return
            choice = Choice((self.seed, cut.name, number))
            state = cut.disk.cut(choice)
            disk = state.fingerprint()
            if (disk, cut.expected) in self._examined:
                continue
            self._examined.add((disk, cut.expected))
            self._disks.add(disk)
            self.tally.states += 1
            self.tally.where[cut.where] += 1
            for deeper in self._check(cut, state, f"{cut.name}.{number}", choice.made):
                self._examine(deeper)

    def _check(self, cut: Cut, state: Disk, name: str, made: list[int]) -> list[Cut]:
        """Recover a state and compare; returns what was cut meanwhile."""
        cuts: list[Cut] = []
        random = Random(f"{self.seed}/{name}")
        settles = random.random() < 0.2
        looks = random.random() < 0.2
        expected = cut.expected

        def take(call: str) -> None:
            if random.random() < RECOVERY_CUT_CHANCE and len(cuts) < 2:
                deeper = f"{name}.{len(state.log)}"
                cuts.append(Cut(state.copy(), expected, deeper, call, RECOVERY, cut.depth + 1))

        if cut.depth < DEEPEST and random.random() < 0.2:
            state.on_call = take
        self.loop.hurried = random.random() < 0.9

        async def check() -> None:
            nonlocal expected
            if looks:
                await self._look(state, LEFT_BY_A_CUT)
            catalogue, found = await _recover(state)
            outcome = expected.check(found)
            if settles or state.on_call is take:
                # What was read after a power cut must be there after the next one.
                expected = adopt(outcome, 0, durable=True).freeze()
            if looks:
                self._judge(await catalogue.check_directory(None), LEFT_TO_MERGES)
            if settles:
                self.tally.settled += 1
                await asyncio.sleep(1)
                expected.check(await _read_everything(catalogue))
                self._judge(await catalogue.check_directory(None), NOTHING)
                await catalogue.close()
                await self._look(state, NOTHING)

        self._do(check(), state, f"state {name} (before: {cut.call})", made)
        return cuts

    async def _look(self, state: Disk, left: str) -> None:
        """Let nbdserve check look at a data directory at rest."""
        self._judge(await check_store(_store(state), None, repair=False), left)

    def _judge(self, report: CheckReport, left: str) -> None:
        self.tally.checks += 1
        for found in report.findings:
            line = f"{found.file}: {found.problem}"
            if not re.search(left, line):
                raise ViolationError(f"nbdserve check: {line}")

    def _check_kill(self, cut: Cut) -> list[Cut]:
        """Recover what a kill leaves, maybe write, FLUSH; returns what was cut meanwhile."""
        cuts: list[Cut] = []
        state = cut.disk.copy()
        state.log.append("— kill —")
        name = f"{cut.name}.kill"
        random = Random(f"{self.seed}/{name}")
        expected = cut.expected

        def take(call: str) -> None:
            if random.random() < CUT_CHANCE and len(cuts) < 2:
                deeper = f"{name}.{len(state.log)}"
                cuts.append(Cut(state.copy(), expected, deeper, call, KILLED, 1))

        async def check() -> None:
            nonlocal expected
            catalogue, found = await _recover(state)
            if cut.keeps:
                expected.check(found, killed=True)
            outcome = expected.check(found)
            model = adopt(outcome, 1 << 40, durable=False)
            for volume in model.volumes:
                expected = model.freeze()
                lease = await catalogue.open_volume(volume.name, lambda: None)
                assert isinstance(lease, Handle)
                if random.random() < 0.5:
                    first = random.randrange(volume.sectors // IN_BLOCK) * IN_BLOCK
                    write = model.begin(volume, first, model.new_sectors(first, IN_BLOCK))
                    expected = model.freeze()
                    await lease.write(first * SECTOR, b"".join(write.sectors))
                    lease.note()
                    model.end(volume, write)
                mark = model.tick()
                await lease.flush()
                volume.settle(mark)
            expected = model.freeze()
            cuts.append(Cut(state.copy(), expected, f"{name}.flushed", "nothing", KILLED, 1))

        state.on_call = take
        self.loop.hurried = True
        self._do(check(), state, f"kill {name} (before: {cut.call})", [])
        return cuts

    def _do(self, work: Any, disk: Disk, what: str, made: list[int]) -> None:
        loop = self.loop
        try:
            loop.run_until_complete(work)
            if loop.complaints:
                raise loop.complaints[0]
            if self.process.complaints:
                raise ViolationError(f"in the log: {self.process.complaints[0]}")
        except PowerCutError:
            raise
        except Exception as error:
            log = "\n    ".join(disk.log)
            raise Finding(
                f"history {self.seed}, {what}: {type(error).__name__}: {error}\n"
                f"  which changes came: {made}\n  calls:\n    {log}"
            ) from error
        finally:
            disk.dead = True
            disk.on_call = lambda call: None
            loop.abandon()
            loop.hurried = False
            self.process.end()


def _store(disk: Disk) -> LocalLayerStore:
    store = LocalLayerStore(SimulatedPath(disk, DATA))  # type: ignore[arg-type]
    store.machine_run = f"boot {disk.boots}".encode()
    return store


async def _recover(disk: Disk) -> tuple[Catalogue, dict[str, FoundVolume]]:
    catalogue = await Catalogue.open(_store(disk))
    return catalogue, await _read_everything(catalogue)


async def _read_everything(catalogue: Catalogue) -> dict[str, FoundVolume]:
    found = {}
    for name in catalogue.volume_names():
        content = await _read(catalogue, await catalogue.open_volume(name, lambda: None))
        snapshots = {}
        for snapshot in catalogue.list_snapshots(name):
            lease = await catalogue.open_snapshot(name, snapshot.name, lambda: None)
            snapshots[snapshot.name] = await _read(catalogue, lease)
        found[name] = FoundVolume(content, snapshots)
    return found


async def _read(catalogue: Catalogue, lease: Any) -> bytes:
    assert isinstance(lease, Handle)
    content = await read_all(lease)
    await catalogue.close_export(lease)
    return content


def simulate(
    seed: str, states: int, tally: Tally, enough: Callable[[], bool] = lambda: False
) -> None:
    """Histories until ``tally`` has so many states; Finding."""
    while tally.states < states and not enough():
        History(f"{seed}:{tally.histories}", tally, states, enough).run()
