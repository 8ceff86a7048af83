"""Histories: workloads whose disk is cut at many moments, and every state examined.

A history is a row of lives of the daemon on one data directory. In each, a workload runs, and the
disk is copied together with the model at moments that chance picks, each just before a system
call. From each copy several states are made and examined: the real recovery opens it, everything
is read and compared, sometimes once more when all that recovery leaves to the background is done.
While that goes on, the disk is copied in the same way, so recoveries are cut and recovered, too.
Each copy is also what a kill leaves: the next process may write, it FLUSHes, and then the power
fails. The next life goes on from a cut or from a kill of this one.

The same seed gives the same history, as long as PYTHONHASHSEED is the same.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from backends.local_layers import LocalLayerStore
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle

from .calls import SimulatedPath, routed
from .disk import Choice, Disk, PowerCutError
from .loop import SimulatedLoop
from .model import SECTOR, Expected, FoundVolume, adopt
from .workload import IN_BLOCK, Workload, read_all

DATA = "/srv/data"
LIVES = 3
OPERATIONS = 10
STATES = 4
CUT_CHANCE = 0.04
# Before a rename: that is what commits.
COMMIT_CUT_CHANCE = 0.2
RECOVERY_CUT_CHANCE = 0.04
DEEPEST = 3


@dataclass
class Tally:
    """What was examined. ``states`` are different ones; ``recoveries`` were cut themselves."""

    histories: int = 0
    cuts: int = 0
    states: int = 0
    recoveries: int = 0
    settled: int = 0
    kills: int = 0


class Finding(AssertionError):  # noqa: N818
    """A state in which a promise is broken, with all that is needed to look into it."""


@dataclass
class Cut:
    """The disk and what must hold, at a moment; ``depth`` counts the recoveries that were cut."""

    disk: Disk
    expected: Expected
    name: str
    call: str
    depth: int = 0
    examined: set[tuple[int, ...]] = field(default_factory=set)


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
        self.loop = SimulatedLoop()

    @property
    def enough(self) -> bool:
        return self.tally.states >= self.most or self.stop()

    def run(self) -> None:
        """Finding, when anything is wrong."""
        self.tally.histories += 1
        try:
            with routed(self.seed):
                self._run()
        finally:
            self.loop.close()

    def _run(self) -> None:
        disk = Disk()
        expected = Expected([])
        durable = True
        written = 0
        for life in range(LIVES):
            cuts = self._live(disk, expected, written, f"{life}", durable=durable)
            self.tally.cuts += len(cuts)
            for cut in cuts:
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

    def _live(
        self, disk: Disk, expected: Expected, written: int, name: str, *, durable: bool
    ) -> list[Cut]:
        """Recover, check, and run a workload; the cuts that were made."""
        cuts: list[Cut] = []
        random = Random(f"{self.seed}/{name}")
        current: list[Callable[[], Expected]] = [lambda: expected]

        async def live() -> None:
            catalogue, found = await _recover(disk)
            model = adopt(expected.check(found), written, durable=durable)
            workload = Workload(catalogue, model, random, self.loop)
            current[0] = model.freeze

            def on_call(call: str) -> None:
                take(call)
                workload.on_call(call)

            disk.on_call = on_call
            await workload.run(OPERATIONS)

        def take(call: str) -> None:
            chance = COMMIT_CUT_CHANCE if call.startswith("rename") else CUT_CHANCE
            if random.random() < chance:
                cuts.append(Cut(disk.copy(), current[0](), f"{name}.{len(disk.log)}", call))

        disk.on_call = take
        self._do(live(), disk, f"life {name}", [])
        return cuts

    def _examine(self, cut: Cut) -> None:
        if cut.depth == 0:
            self.tally.kills += 1
            for deeper in self._check_kill(cut):
                self._examine(deeper)
        for number in range(STATES if cut.depth == 0 else 2):
            if self.enough:
                return
            choice = Choice((self.seed, cut.name, number))
            state = cut.disk.cut(choice)
            made = tuple(choice.made)
            if made in cut.examined:
                continue
            cut.examined.add(made)
            self.tally.states += 1
            self.tally.recoveries += cut.depth > 0
            for deeper in self._check(cut, state, f"{cut.name}.{number}", made):
                self._examine(deeper)

    def _check(self, cut: Cut, state: Disk, name: str, made: tuple[int, ...]) -> list[Cut]:
        """Recover a state and compare; returns what was cut meanwhile."""
        cuts: list[Cut] = []
        random = Random(f"{self.seed}/{name}")
        settles = random.random() < 0.3
        expected = cut.expected

        def take(call: str) -> None:
            if random.random() < RECOVERY_CUT_CHANCE and len(cuts) < 3:
                deeper = f"{name}.{len(state.log)}"
                cuts.append(Cut(state.copy(), expected, deeper, call, cut.depth + 1))

        if cut.depth < DEEPEST and random.random() < 0.3:
            state.on_call = take
        self.loop.hurried = random.random() < 0.8

        async def check() -> None:
            nonlocal expected
            catalogue, found = await _recover(state)
            outcome = expected.check(found)
            if settles or state.on_call is take:
                # What was read after a power cut must be there after the next one.
                expected = adopt(outcome, 0, durable=True).freeze()
            if settles:
                self.tally.settled += 1
                await asyncio.sleep(1)
                expected.check(await _read_everything(catalogue))
                await catalogue.close()

        self._do(check(), state, f"state {name} (before: {cut.call})", made)
        return cuts

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
                cuts.append(Cut(state.copy(), expected, deeper, call, 1))

        async def check() -> None:
            nonlocal expected
            catalogue, found = await _recover(state)
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
                    model.end(volume, write)
                mark = model.tick()
                await lease.flush()
                volume.settle(mark)
            expected = model.freeze()
            cuts.append(Cut(state.copy(), expected, f"{name}.flushed", "nothing", 1))

        state.on_call = take
        self.loop.hurried = True
        self._do(check(), state, f"kill {name} (before: {cut.call})", [])
        return cuts

    def _do(self, work: Any, disk: Disk, what: str, made: Any) -> None:
        loop = self.loop
        try:
            loop.run_until_complete(work)
            if loop.complaints:
                raise loop.complaints[0]
        except PowerCutError:
            raise
        except Exception as error:
            log = "\n    ".join(disk.log)
            raise Finding(
                f"history {self.seed}, {what}: {type(error).__name__}: {error}\n"
                f"  which changes came: {list(made)}\n  calls:\n    {log}"
            ) from error
        finally:
            disk.dead = True
            disk.on_call = lambda call: None
            loop.abandon()
            loop.hurried = False


async def _recover(disk: Disk) -> tuple[Catalogue, dict[str, FoundVolume]]:
    store = LocalLayerStore(SimulatedPath(disk, DATA))  # type: ignore[arg-type]
    catalogue = await Catalogue.open(store)
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
