"""A script that does everything once to a data directory, with a fault at one of its calls.

``run_script(directory, fault)`` is one process's life after the other: a long one that ends in an
orderly way, one that is killed, one that finds what those left, and the check, by which nothing
fails any more. All the while the rules are:

* What fails fails with EIO or ENOSPC, or with a StorageError of one line; nothing else comes out
  of anything, in no task and no log. What does not end within SECONDS fails the test.
* Only the step in which the fault strikes may fail. What fails later must be a write or FLUSH of a
  volume that says why it is read-only, or a commit after one that is in doubt.
* Want of space makes nothing read-only, as long as it is not a sync that tells of it. While there
  is none, reads, overwrites, TRIM and FLUSH work; everything works as soon as there is, in the same
  life.
* A volume whose manifest could not be read at the start is refused until the next one.
* What is read is what the model says (faults_model.py), in this life and in later ones; a snapshot
  is whole or not there. At the end the pages are gone that failed syncs have lost.
* No descriptor stays open, and nothing is left behind in the directory; the check calls nothing
  damaged.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import hashlib
import itertools
import logging
import secrets
import subprocess
import tempfile
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from backends.errors import StorageError
from backends.local_layers import LocalLayerStore
from nbdserve.control.errors import one_line
from snapshots import head as head_module
from snapshots import merge as merge_module
from snapshots import reservations as reservations_module
from snapshots import threads as threads_module
from snapshots import volume as volume_module
from snapshots import wiping as wiping_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.volume import Volume
from tests.durability.faults import Fault, Seam
from tests.durability.faults_model import BLOCK, Contents, Modelled, Snapshot, settle

T = TypeVar("T")

SECONDS = 30
SIZE_A = (1 << 40) + 8 * BLOCK  # two files a layer
BORDER = 1 << 40
SIZE_B = 64 * BLOCK


@dataclass
class Outcome:
    """What a run came to: what its calls were, which steps failed how, and what was logged."""

    names: list[str] = field(default_factory=list)
    takes_space: set[str] = field(default_factory=set)
    fired: bool = False
    step: str = ""
    failed: list[str] = field(default_factory=list)
    read_only: dict[str, str] = field(default_factory=dict)
    doubt: str = ""
    log: list[str] = field(default_factory=list)


class Stage:
    """The acts, and for each the directory and the model that it begins with."""

    def __init__(self, directory: Path) -> None:
        """Play every act below ``directory``, which is empty, with no fault; AssertionError."""
        self.directory = directory
        self.models: list[dict[str, Modelled]] = []
        self.calls: list[Outcome] = []
        current = directory / "current"
        current.mkdir()
        model: dict[str, Modelled] = {}
        for act in range(len(ACTS)):
            _copy(current, directory / str(act))
            self.models.append(copy.deepcopy(model))
            outcome = Outcome()
            with environment(act, outcome.log), Seam(current / "data") as seam:
                script = _Script(current / "data", seam, outcome, model)
                script.live(ACTS[act], orderly=ACTS[act] is not _Script.killed)
            assert not script.failed, script.failed
            outcome.names = seam.names[: seam.counted]
            outcome.takes_space = seam.takes_space
            self.calls.append(outcome)

    def play(self, act: int, fault: Fault) -> Outcome:
        """Play one act with a fault, and the lives after it without one; AssertionError."""
        outcome = Outcome()
        with (
            tempfile.TemporaryDirectory(dir=self.directory) as name,
            environment(act, outcome.log),
            Seam(Path(name) / "data", fault) as seam,
        ):
            _copy(self.directory / str(act), Path(name))
            script = _Script(Path(name) / "data", seam, outcome, copy.deepcopy(self.models[act]))
            try:
                script.live(ACTS[act], orderly=ACTS[act] is not _Script.killed)
                script.live(_Script.found_again, orderly=True)
                seam.lose()
                script.live(_Script.clear_away, orderly=True)
                if not outcome.read_only:
                    assert not list(Path(name).glob("data/lost/*")), "set aside without need"
                if fault.error == errno.ENOSPC and fault.name in seam.takes_space:
                    assert not outcome.read_only, f"read-only for want of space: {outcome}"
                    assert not outcome.doubt, f"in doubt for want of space: {outcome}"
            except (AssertionError, TimeoutError) as error:
                error.add_note(
                    f"{fault} in act {act}, at the step {outcome.step!r}; now {script.step!r};"
                    f" log: {outcome.log}"
                )
                raise
            finally:
                seam.close_all()
            outcome.fired = seam.fired
            outcome.failed = script.failed
        return outcome


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    subprocess.run(["cp", "-a", "--sparse=always", f"{source}/.", target], check=True)


@contextmanager
def environment(act: int, log: list[str]) -> Iterator[None]:
    """Small limits, no chance and no threads; what is logged goes to ``log``."""
    with _small_limits(), _logged(log), _no_chance(act), _no_threads():
        yield


@contextmanager
def _no_chance(act: int) -> Iterator[None]:
    """Names that are random otherwise are the same each time that an act is played."""
    numbers = itertools.count(act << 16)

    def token_hex(length: int) -> str:
        return hashlib.sha256(str(next(numbers)).encode()).hexdigest()[: 2 * length]

    with mock.patch.object(secrets, "token_hex", token_hex):
        yield


class _Inline(ThreadPoolExecutor):
    """Calls done at once, by whoever asks: no thread, no hop."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


class _Loop(asyncio.SelectorEventLoop):
    """Does what is meant for a thread at once."""

    def run_in_executor(self, executor: Any, function: Any, *args: Any) -> Any:
        done = self.create_future()
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)
        return done

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:
        return self.call_soon(*args, **kwargs)


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on a loop that needs no threads."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(scenario)


@contextmanager
def _no_threads() -> Iterator[None]:
    """Threads would only take time here: nothing is done at the same time as anything else."""
    with mock.patch.object(threads_module, "ThreadPoolExecutor", _Inline):
        yield


@contextmanager
def _small_limits() -> Iterator[None]:
    """So that threads, several chunks of a merge and compactions take part."""
    with ExitStack() as stack:
        for module, name, value in (
            (volume_module, "INLINE_WRITE", 2 * BLOCK),
            (head_module, "JOURNAL_STEP", 16 << 10),
            (head_module, "RESERVED", 4 << 10),
            (head_module, "_AMPLE", 32 << 10),
            (head_module, "_COMPACT_FROM", 2 << 10),
            (merge_module, "JOURNAL_STEP", 4 << 10),
            (merge_module, "_CHUNK_BLOCKS", 2),
            (wiping_module, "_PIECE", 2 * BLOCK),
            (reservations_module, "_MORE", 4 * BLOCK),
            (reservations_module, "_NEAR", 0),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def _logged(lines: list[str]) -> Iterator[None]:
    """Collect what is logged, tracebacks too."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    collector = Collector(logging.INFO)
    logger = logging.getLogger()
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)


def _fill(number: int, length: int) -> bytes:
    """Content that says of each 512 bytes which write they are of, and which of its sectors."""
    sectors = (bytes([(number * 7 + at) % 255 + 1]) * 512 for at in range(length // 512 + 1))
    return b"".join(sectors)[:length]


class _Script:
    def __init__(
        self, data: Path, seam: Seam, outcome: Outcome, model: dict[str, Modelled]
    ) -> None:
        self.data = data
        self.seam = seam
        self.outcome = outcome
        self.step = "start"
        self.failed: list[str] = []
        self.model = model
        self.handles: dict[str, Handle] = {}
        self.catalogue: Catalogue
        self.numbers = iter(range(1, 1 << 20))
        self.last_written = "a"
        self.refused: set[str] = set()
        self.stray: list[dict[str, Any]] = []

    # Lives

    def live(self, script: Any, *, orderly: bool) -> None:
        """Run one life of the process, and what its end leaves must be what it says."""

        async def life() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: self.stray.append(context))
            async with asyncio.timeout(SECONDS):
                if not await self.open():
                    # The fault was at the start; there is only one, and space again.
                    self.seam.clear()
                    assert await self.open(), "it starts when nothing fails"
                self.begin("started")
                await script(self)
                await self.quiet()
                self.seam.clear()
                if script in ACTS:
                    await self.everything_works()
                for name in self.catalogue.volume_names():
                    self.model[name].id = self.catalogue._manifests.get(name).id
                await (self.close() if orderly else self.kill())

        run(life())
        left = self.seam.close_all()
        assert not orderly or not left, f"still open: {left}"
        assert not self.stray, self.stray
        for line in self.outcome.log:
            assert "\n" not in line, f"a traceback in the log: {line}"
        self.handles.clear()
        for modelled in self.model.values():
            modelled.now = dict(modelled.durable)

    async def open(self) -> bool:
        store = LocalLayerStore(self.data)
        try:
            self.begin("open")
            self.catalogue = await Catalogue.open(store)
        except (OSError, StorageError) as error:
            self.judge(error, ())
            return False
        await self.quiet()
        names = set(self.catalogue.volume_names())
        unreadable = {lost.id for lost in self.catalogue._manifests.unreadable.values()}
        assert not unreadable or self.struck, "a manifest cannot be read"
        if self.struck and unreadable:
            self.outcome.step = self.step
        self.refused = {name for name, each in self.model.items() if each.id in unreadable}
        for name, modelled in list(self.model.items()):
            if modelled.other_name in names:
                self.model[modelled.other_name] = self.model.pop(name)
            modelled.other_name = ""
        for name in self.model.keys() - self.refused:
            if name not in names:
                assert not self.model[name].sure, f"volume {name} is gone"
                del self.model[name]
        assert names == self.model.keys() - self.refused, "volumes that nobody made"
        for name in names:
            modelled = self.model[name]
            modelled.sure = True
            found = {each.name: each for each in self.catalogue.list_snapshots(name)}
            for snapshot in list(modelled.snapshots):
                if snapshot not in found:
                    assert not modelled.snapshots[snapshot].sure, f"{name}@{snapshot} is gone"
                    del modelled.snapshots[snapshot]
            assert found.keys() == modelled.snapshots.keys(), "snapshots that nobody took"
        return True

    async def close(self) -> None:
        for name in list(self.handles):
            await self.end(name)
        self.begin("close")
        await self.catalogue.close()
        if not self.struck:
            for name, modelled in self.model.items():
                if not self.is_read_only(name) and name not in self.refused:
                    modelled.flushed()

    async def kill(self) -> None:
        self.catalogue._views.threads.close()
        assert self.catalogue._upkeep_task is not None
        self.catalogue._upkeep_task.cancel()

    async def quiet(self) -> None:
        """Wait for everything that goes on in the background."""
        while True:
            tasks = set(self.catalogue._merging._tasks) | set(self.catalogue._tasks)
            tasks |= self.catalogue._wiping._tasks
            for host in self.catalogue._views.hosts:
                for view in host._views.values():  # type: ignore[attr-defined]
                    if isinstance(view, Volume):
                        tasks |= view._tasks
            if not tasks:
                return
            await asyncio.wait(tasks)

    # Steps

    def begin(self, step: str) -> None:
        self.step = step
        self.fired_before = self.seam.fired

    @property
    def struck(self) -> bool:
        """Whether the fault is that of this step."""
        seam = self.seam
        full = seam.fault is not None and seam.fault.full and not seam.cleared
        return seam.fired and (not self.fired_before or full)

    def is_read_only(self, name: str) -> bool:
        found = self.catalogue._manifests.find(name)
        why = None if found is None else self.catalogue._views._failures.get(found.id)
        if why is not None:
            self.outcome.read_only[name] = why
        return why is not None

    @property
    def in_doubt(self) -> bool:
        doubt = self.catalogue._manifests.in_doubt
        if doubt:
            self.outcome.doubt = doubt
        return doubt is not None

    def judge(self, error: BaseException, volumes: tuple[str, ...], commits: bool = False) -> None:
        """An error that came out of a step has to be a right one, and excused."""
        line = one_line(error)
        if isinstance(error, OSError):
            assert error.errno in (errno.EIO, errno.ENOSPC), repr(error)
        assert "\n" not in str(error), repr(error)
        self.failed.append(f"{self.step}: {type(error).__name__}: {line}")
        if self.struck and not self.outcome.step:
            self.outcome.step = self.step
        excused = self.struck or any(map(self.is_read_only, volumes))
        assert excused or (commits and self.in_doubt), f"it must work: {error!r}"

    async def do(
        self, step: str, *volumes: str, work: Coroutine[Any, Any, T], commits: bool = False
    ) -> T | None:
        """Do one step, which may fail as the rules have it; None: it did."""
        self.begin(step)
        try:
            result = await work
        except (OSError, StorageError) as error:
            self.judge(error, volumes, commits)
            result = None
        else:
            result = True if result is None else result  # type: ignore[assignment]
        await self.quiet()
        if self.struck and not self.outcome.step:
            self.outcome.step = step
        return result

    # Clients

    async def handle(self, name: str) -> Handle | None:
        if name in self.handles:
            return self.handles[name]
        if name not in self.model or name not in self.catalogue.volume_names():
            return None
        work = self.catalogue.open_volume(name, lambda: None)
        opened = await self.do(f"connect {name}", name, work=work)
        if opened is not None:
            assert isinstance(opened, Handle)
            self.handles[name] = opened
        return opened  # type: ignore[return-value]

    async def end(self, name: str) -> None:
        """The client of a volume leaves; it is the only one, so that flushes."""
        if name in self.handles:
            handle = self.handles.pop(name)
            await self.do(f"disconnect {name}", name, work=self.catalogue.close_export(handle))
            if self.is_read_only(name):
                # Opened again, it is what the disk has.
                self.model[name].may_revert()
            elif not self.struck:
                self.model[name].flushed()

    async def write(self, name: str, offset: int, length: int) -> None:
        handle = await self.handle(name)
        if handle is None or offset + length > handle.size:
            return
        self.last_written = name
        data = _fill(next(self.numbers), length)

        async def write() -> None:
            if not handle.try_write(offset, memoryview(data)):
                await handle.write(offset, data)

        done = await self.do(f"write {name} {offset:#x}+{length:#x}", name, work=write())
        self.model[name].put(offset, data, done=done is not None)

    async def zero(self, name: str, offset: int, length: int, how: str) -> None:
        handle = await self.handle(name)
        if handle is None:
            return
        if how == "trim":
            work = handle.trim(offset, length)
        else:
            work = handle.write_zeroes(offset, length, no_hole=how == "no hole")
        done = await self.do(f"{how} {name} {offset:#x}+{length:#x}", name, work=work)
        self.model[name].put(offset, bytes(length), done=done is not None)

    async def flush(self, name: str) -> None:
        handle = await self.handle(name)
        if handle is None:
            return
        if await self.do(f"flush {name}", name, work=handle.flush()) is not None:
            self.model[name].flushed()

    async def read_all(self, name: str, snapshot: str = "") -> None:
        """Read every block that ever was touched, one by one and in one piece, and its neighbours.

        Reading works whatever the state of the volume.
        """
        modelled = self.model.get(name)
        if modelled is None:
            return
        if snapshot:
            if snapshot not in modelled.snapshots:
                return
            work = self.catalogue.open_snapshot(name, snapshot, lambda: None)
            handle: Any = await self.do(f"connect {name}@{snapshot}", work=work)
            contents: Contents = modelled.snapshots[snapshot].holds
            sizes = modelled.snapshots[snapshot].size
        else:
            handle = await self.handle(name)
            contents, sizes = modelled.now, modelled.sizes
        if handle is None:
            return
        where = f"{name}@{snapshot}" if snapshot else name
        assert handle.size in sizes, f"{where} has {handle.size} bytes, not {sizes}"
        for block in sorted(block for block in contents if block * BLOCK < handle.size):
            buffer = bytearray(BLOCK)

            async def read(offset: int = block * BLOCK, buffer: bytearray = buffer) -> None:
                if not handle.try_read(offset, memoryview(buffer)):
                    await handle.read(offset, memoryview(buffer))

            if await self.do(f"read {where} {block}", work=read()) is not None:
                settle(where, contents, block, bytes(buffer))
        if snapshot:
            await self.do(f"disconnect {where}", work=self.catalogue.close_export(handle))

    # Operations

    def snapshot_of(self, volume: str, name: str) -> Snapshot | None:
        """A snapshot that can be had in this life, or might be."""
        if volume not in self.catalogue.volume_names():
            return None
        return self.model[volume].snapshots.get(name)

    async def create(self, name: str, size: int) -> None:
        work = self.catalogue.create_volume(name, size)
        done = await self.do(f"create {name}", work=work, commits=True)
        if done is not None or self.in_doubt:
            self.model[name] = Modelled({size}, sure=done is not None)

    async def clone(self, name: str, source: str, snapshot: str) -> None:
        taken = self.snapshot_of(source, snapshot)
        if taken is None or not taken.sure:
            return
        work = self.catalogue.clone_volume(name, source, snapshot)
        done = await self.do(f"clone {name}", work=work, commits=True)
        if done is not None or self.in_doubt:
            holds = taken.holds
            self.model[name] = Modelled(
                set(taken.size), dict(holds), dict(holds), {}, done is not None
            )

    async def snapshot(self, *targets: tuple[str, str]) -> None:
        targets = tuple(each for each in targets if each[0] in self.catalogue.volume_names())
        if not targets:
            return
        volumes = [volume for volume, _ in targets]
        work = self.catalogue.create_snapshots(targets)
        step = f"snapshot {' '.join(f'{volume}@{name}' for volume, name in targets)}"
        done = await self.do(step, *volumes, work=work, commits=True)
        for volume, name in targets:
            modelled = self.model[volume]
            listed = name in {each.name for each in self.catalogue.list_snapshots(volume)}
            assert listed or done is None, f"{volume}@{name} was taken but is not listed"
            # What failed may be found at the next start.
            modelled.snapshots[name] = Snapshot(
                dict(modelled.now), set(modelled.sizes), sure=listed
            )
            if done is not None:
                modelled.flushed()
            elif not self.in_doubt and not self.is_read_only(volume):
                assert not listed, f"{volume}@{name} failed but is listed"
                del modelled.snapshots[name]

    async def delete_snapshot(self, volume: str, name: str) -> None:
        listed = (
            {each.name for each in self.catalogue.list_snapshots(volume)}
            if volume in self.catalogue.volume_names()
            else {}
        )
        if name not in listed:
            return
        work = self.catalogue.delete_snapshot(volume, name)
        step = f"delete {volume}@{name}"
        done = await self.do(step, volume, work=work, commits=True)
        gone = name not in {each.name for each in self.catalogue.list_snapshots(volume)}
        assert gone or done is None, f"{volume}@{name} was deleted but is listed"
        if gone:
            del self.model[volume].snapshots[name]
        else:
            self.model[volume].snapshots[name].sure = not self.in_doubt

    async def rollback(self, volume: str, snapshot: str) -> None:
        taken = self.snapshot_of(volume, snapshot)
        if taken is None or not taken.sure:
            return
        await self.end(volume)
        work = self.catalogue.rollback(volume, snapshot)
        done = await self.do(f"rollback {volume}@{snapshot}", volume, work=work, commits=True)
        modelled = self.model[volume]
        if done is not None:
            modelled.now, modelled.durable = dict(taken.holds), dict(taken.holds)
            modelled.sizes = set(taken.size)
        elif self.in_doubt:
            modelled.may_become(taken.holds)
            modelled.sizes |= taken.size

    async def resize(self, volume: str, size: int) -> None:
        if volume not in self.catalogue.volume_names():
            return
        await self.end(volume)
        work = self.catalogue.resize_volume(volume, size)
        done = await self.do(f"resize {volume}", work=work, commits=True)
        modelled = self.model[volume]
        modelled.sizes = {size} if done is not None else modelled.sizes | {size}

    async def delete_volume(self, volume: str, *, wipe: bool = False) -> None:
        if volume not in self.catalogue.volume_names():
            return
        await self.end(volume)
        work = self.catalogue.delete_volume(volume, with_snapshots=True, wipe=wipe)
        done = await self.do(f"delete {volume}", work=work, commits=True)
        if done is not None or (wipe and volume not in self.catalogue.volume_names()):
            del self.model[volume]
        else:
            self.model[volume].sure = False

    async def reserve(self, volume: str, length: int) -> None:
        if volume in self.catalogue.volume_names():
            work = self.catalogue.reserve_space(volume, length)
            await self.do(f"reserve {volume}", work=work, commits=True)

    async def rename(self, old: str, new: str) -> None:
        if old not in self.catalogue.volume_names():
            return
        await self.end(old)
        work = self.catalogue.rename_volume(old, new)
        done = await self.do(f"rename {old}", work=work, commits=True)
        if done is not None:
            self.model[new] = self.model.pop(old)
        elif self.in_doubt:
            self.model[old].other_name = new

    async def compare(self, volume: str, older: str) -> None:
        taken = self.snapshot_of(volume, older)
        if taken is not None and taken.sure:
            work = self.catalogue.diff(volume, older)
            await self.do(f"diff {volume}@{older}", volume, work=work)

    async def read_everything(self) -> None:
        for name in list(self.model):
            if name in self.catalogue.volume_names():
                await self.read_all(name)
                for snapshot in list(self.model[name].snapshots):
                    if self.model[name].snapshots[snapshot].sure:
                        await self.read_all(name, snapshot)

    async def writing_works(self) -> list[str]:
        """What is not read-only can be written and flushed; returns those volumes."""
        await self.read_everything()
        names = sorted(name for name in self.model if name in self.catalogue.volume_names())
        for name in names:
            await self.write(name, 60 * BLOCK + 100, BLOCK)
            await self.flush(name)
        return [name for name in names if not self.is_read_only(name)]

    async def everything_works(self) -> None:
        """Nothing fails any more: what is not read-only and not in doubt works."""
        last = self.last_written
        names = await self.writing_works()
        if last in names:
            await self.snapshot((last, "probe"))
            await self.zero(last, 60 * BLOCK, BLOCK, "trim")
            await self.delete_snapshot(last, "probe")
            await self.read_all(last)

    # The acts

    async def written(self) -> None:
        await self.create("a", SIZE_A)
        await self.create("b", SIZE_B)
        await self.write("a", 0, 4 * BLOCK)
        await self.write("a", 5 * BLOCK + 50, 100)
        await self.write("a", BORDER - BLOCK, 2 * BLOCK)
        await self.write("b", 0, 6 * BLOCK)
        await self.flush("a")
        await self.write("a", 6 * BLOCK, BLOCK)  # with FUA
        await self.flush("a")
        await self.write("a", 6 * BLOCK + 512, BLOCK - 1024)
        await self.flush("a")
        await self.zero("a", BLOCK, BLOCK, "trim")
        await self.zero("a", 2 * BLOCK + 100, 2 * BLOCK, "zeroes")
        await self.zero("a", 7 * BLOCK, 2 * BLOCK, "no hole")
        await self.flush("a")
        await self.write("a", 20 * BLOCK, BLOCK)
        await self.read_all("a")

    async def snapshots_taken(self) -> None:
        await self.write("a", 5 * BLOCK, 70)
        await self.snapshot(("a", "one"))
        await self.write("a", 10, 20)
        await self.write("a", 6 * BLOCK - 50, 100)
        await self.write("a", 9 * BLOCK, 3 * BLOCK)
        await self.zero("a", BORDER - BLOCK, BLOCK + 512, "trim")
        await self.flush("a")
        await self.write("b", 3 * BLOCK + 7, 9)
        await self.reserve("b", 8 * BLOCK)
        await self.snapshot(("a", "two"), ("b", "two"))
        await self.write("a", 3 * BLOCK, 5 * BLOCK)
        await self.write("b", BLOCK - 3, 6)
        await self.do("record", "a", "b", work=self.catalogue._views.record_all())
        await self.do("reserve", work=self.catalogue._store.keep_reserve())
        await self.read_everything()
        # What is held without content is not copied to the next act.
        await self.reserve("b", 0)

    async def cloned(self) -> None:
        await self.write("a", 13 * BLOCK, BLOCK)
        await self.clone("c", "a", "one")
        await self.write("c", 5 * BLOCK, 3 * BLOCK)
        await self.flush("c")
        await self.read_all("c")
        await self.resize("b", SIZE_B + 4 * BLOCK)
        await self.write("b", SIZE_B - BLOCK, 2 * BLOCK)
        await self.compare("a", "one")
        await self.write("a", 30 * BLOCK, BLOCK)
        await self.rollback("a", "two")
        await self.write("a", 2 * BLOCK, BLOCK)
        await self.flush("a")
        await self.do("list", work=self.catalogue.list_volumes(), commits=True)
        await self.rename("c", "d")

    async def merged(self) -> None:
        await self.write("a", 4 * BLOCK, 20)
        await self.snapshot(("a", "three"))
        await self.write("a", 14 * BLOCK, 4 * BLOCK)
        await self.delete_snapshot("a", "two")
        await self.delete_snapshot("a", "three")
        await self.read_everything()
        await self.delete_volume("d", wipe=True)
        await self.flush("b")

    async def compacted(self) -> None:
        for number in range(6):
            await self.write("b", (8 + 2 * number) * BLOCK, BLOCK)
            await self.zero("b", (7 + 2 * number) * BLOCK, 4, "zeroes")
            await self.flush("b")
        await self.write("b", 40 * BLOCK, BLOCK)
        await self.read_all("b")

    async def killed(self) -> None:
        await self.read_everything()
        await self.write("a", 0, 3 * BLOCK)
        await self.flush("a")
        await self.write("a", 0, 2 * BLOCK)  # in place: what a failed sync loses of it shows
        await self.flush("a")
        await self.write("a", 40 * BLOCK, BLOCK)
        await self.zero("a", 0, BLOCK, "trim")
        await self.write("b", 0, 100)

    async def recovered(self) -> None:
        await self.write("a", 41 * BLOCK, BLOCK)
        await self.flush("a")
        await self.read_everything()
        await self.delete_snapshot("a", "one")

    # And afterwards

    async def found_again(self) -> None:
        """What was written is there, and becomes durable again; nothing is damaged."""
        await self.nothing_is_damaged()
        await self.writing_works()
        await self.nothing_is_damaged()

    async def nothing_is_damaged(self) -> None:
        findings = (await self.catalogue.check_directory(None)).findings
        # What a volume that failed had not committed may have been set aside.
        damage = [found for found in findings if "/lost/" not in found.file]
        assert not damage, damage

    async def clear_away(self) -> None:
        """In the end only what the volumes need is left."""
        for name in list(self.model):
            for snapshot in list(self.model[name].snapshots):
                await self.read_all(name, snapshot)
                await self.delete_snapshot(name, snapshot)
        await self.read_everything()
        manifests = self.catalogue._manifests
        layers = set(await self.catalogue._store.list_layers())
        assert layers == manifests.live_layers(), "layers that nobody uses"
        assert not manifests.condemned and not manifests.merges
        left = [str(path) for path in self.data.rglob(".new-*")]
        assert not left, left
        await self.nothing_is_damaged()


ACTS = (
    _Script.written,
    _Script.snapshots_taken,
    _Script.cloned,
    _Script.merged,
    _Script.compacted,
    _Script.killed,
    _Script.recovered,
)
