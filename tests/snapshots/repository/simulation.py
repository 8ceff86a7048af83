"""The protocol's own steps over a simulated store, one at a time, in any order.

An actor is a generator of steps: the real ``pushing``, ``deleting`` and ``collecting``,
and a reader. The store holds records as objects, not bytes, and does one step of one actor at a
time; so a schedule (who goes next, whose request is lost, late, or answered with an error although
it took effect) is all that there is to chance, and thousands of them run in a second.

A volume has a few chunks, each a page and a number: which snapshot wrote it last. ``Upload``, the
work on data, is done here as the real one does it: chunks that differ from the parent's are taken
from a donor's segments or put, and then the pages.

At every step: a committed, undeleted snapshot has all that it refers to, and means what it should.
A reader in the middle gets what it should, or its snapshot was deleted. In the end, when all is
quiet, some collections leave what live snapshots need and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from backends.errors import NotFoundError, StorageError, UnavailableError
from snapshots.repository.collecting import collecting
from snapshots.repository.layout import (
    TOMBSTONES,
    outcome_key,
    pages_key,
    segment_key,
    tombstone_key,
)
from snapshots.repository.packing import ParentUnusableError
from snapshots.repository.pages import Entry, PageRef
from snapshots.repository.pushing import deleting, finding_unfinished, pushing
from snapshots.repository.records import Outcome, Root, Summary
from snapshots.repository.roots import finding_root
from snapshots.repository.steps import (
    Delete,
    Each,
    Exists,
    Get,
    List,
    Move,
    PagesOf,
    Put,
    PutOnce,
    SegmentsOf,
    Upload,
)

CHUNKS = 3
COLLECTIONS = 5  # after which nothing dead may be left
BYTES = 100  # that a chunk has in a segment
VOLUME = "disk"


class Broken(AssertionError):  # noqa: N818
    """A rule was broken."""


class PutData(NamedTuple):
    key: str
    record: Any


class GetData(NamedTuple):
    key: str


@dataclass(frozen=True)
class Version:
    """A snapshot of the volume: ``writes`` are the chunks that it wrote since the one before."""

    number: int
    content: tuple[int, ...]
    older: tuple[Version, ...]

    volume = VOLUME
    created = 1.0
    size = CHUNKS

    @property
    def snapshot(self) -> str:
        return f"s{self.number}"

    @property
    def snapshot_id(self) -> str:
        return f"id{self.number}"


def versions(writes: list[tuple[int, ...]]) -> list[Version]:
    """Versions of which each writes the chunks named; 0 is a hole."""
    made: list[Version] = []
    content = (0,) * CHUNKS
    for number, chunks in enumerate(writes, 1):
        content = tuple(number if c in chunks else content[c] for c in range(CHUNKS))
        made.append(Version(number, content, tuple(made[::-1])))
    return made


class Stored(NamedTuple):
    table: list[PageRef]
    data: int = 0
    stored: int = 0
    uploaded: int = 0
    retained: float = 0.0


class World:
    """The store, and what must be true of it."""

    def __init__(self, made: list[Version]) -> None:
        self.versions = {version.snapshot_id: version for version in made}
        self.objects: dict[str, dict[str, Any]] = {
            name: {}
            for name in (
                "intents", "outcomes", "tombstones", "segments", "pages", "snapshots", "plans",
                "roots",
            )
        }  # fmt: skip
        self.needed: dict[str, set[str]] = {}  # key -> live snapshots that refer to it
        self.live: dict[str, Outcome] = {}
        self.deleted: set[str] = set()  # a tombstone was there, once
        self.aborted: set[str] = set()
        self.newest: dict[str, tuple[int, str]] = {}  # by snapshot: generation and repack
        self.repacks = 0
        self.late: list[Any] = []  # requests that take effect later
        self.ids = 0

    def copy(self) -> World:
        twin = World.__new__(World)
        twin.versions = self.versions
        twin.objects = {name: dict(objects) for name, objects in self.objects.items()}
        twin.needed = {key: set(users) for key, users in self.needed.items()}
        twin.live = dict(self.live)
        twin.deleted = set(self.deleted)
        twin.aborted = set(self.aborted)
        twin.newest = dict(self.newest)
        twin.repacks = self.repacks
        twin.late = []
        twin.ids = self.ids
        return twin

    def new_id(self) -> str:
        self.ids += 1
        return f"{self.ids:032x}"

    def do(self, step: Any) -> Any:
        """Do one step; returns its result or raises NotFoundError."""
        kind = type(step)
        if kind is List:
            return self._list(step.prefix)
        if kind is Get or kind is GetData:
            return self.get(step.key)
        if kind is Exists:
            key = step.key
            return key in self.objects[key[: key.index("/")]]
        if kind is SegmentsOf:
            found: dict[tuple[str, int], int] = {}
            for ref in step.refs:
                entry = self.get(pages_key(ref.push, ref.number))[0]
                found[entry[:2]] = found.get(entry[:2], 0) + entry.length
            return found
        if kind is PagesOf:
            return [(ref, self.get(pages_key(ref.push, ref.number))) for ref in step.refs]
        if kind is Delete:
            return self._delete(step.key)
        return self._put(step.key, step.record, kind is PutOnce)

    def get(self, key: str) -> Any:
        try:
            return self.objects[key[: key.index("/")]][key]
        except KeyError:
            raise NotFoundError(key) from None

    def _list(self, prefix: str) -> list[tuple[str, int]]:
        place = prefix.index("/")
        objects = self.objects[prefix[:place]]
        if prefix == "segments/":
            return [(key, BYTES * len(record)) for key, record in objects.items()]
        if place == len(prefix) - 1:
            return [(key, 1) for key in objects]
        return [(key, 1) for key in objects if key.startswith(prefix)]

    def _put(self, key: str, record: Any, once: bool) -> bool | None:
        name = key[: key.index("/")]
        objects = self.objects[name]
        if key in objects:
            if once:
                return False
            if name in ("segments", "pages") and objects[key] != record:
                raise Broken(f"{key} is written again with other content")
            if name == "outcomes" and (record.root is None) != (objects[key].root is None):
                raise Broken(f"{key} is overwritten")
        objects[key] = record
        if name == "tombstones":
            push = key.rpartition("/")[2]
            self.deleted.add(push)
            self._retire(push)
        elif name == "outcomes":
            self._end(key.rpartition("/")[2], record)
        return True if once else None

    def _end(self, push: str, outcome: Outcome) -> None:
        if outcome.repacked:
            self._repack(push)
            return
        if outcome.root is None:
            if push not in self.deleted:  # of a deleted snapshot it means nothing any more
                self.aborted.add(push)
            if push in self.live:
                raise Broken(f"{push} was committed and is aborted")
            return
        if push in self.aborted:
            raise Broken(f"{push} was aborted and is committed")
        if push in self.objects_of("tombstones"):
            return
        if push in self.deleted:
            raise Broken(f"the deleted {push} came back")
        self.live[push] = outcome
        self._need(push, outcome.root, [])

    def _need(self, push: str, root: Root, keys: list[str]) -> None:
        """From now on the snapshot ``push`` is what ``root`` refers to, and needs ``keys``."""
        version = self.versions[root.summary.snapshot_id]
        found, content = self.read(root)
        if content != version.content:
            raise Broken(f"{version.snapshot} holds {content}, not {version.content}")
        for users in self.needed.values():
            users.discard(push)
        for key in found + keys:
            self.needed.setdefault(key, set()).add(push)

    def _repack(self, repack: str) -> None:
        """The roots of a repack count from now on, where they are the newest."""
        if repack in self.aborted:
            raise Broken(f"{repack} was aborted and is committed")
        if tombstone_key(repack) in self.objects["tombstones"]:
            return
        if repack in self.deleted:
            raise Broken(f"the deleted {repack} came back")
        self.repacks += 1
        for key, record in list(self.objects["roots"].items()):
            _, snapshot, generation, owner = key.split("/")
            if owner == repack and snapshot in self.live:
                order = (int(generation, 16), owner)
                if order > self.newest.get(snapshot, (0, "")):
                    self.newest[snapshot] = order
                    self._need(snapshot, record.root, [key, outcome_key(repack)])

    def objects_of(self, name: str) -> set[str]:
        return {key.rpartition("/")[2] for key in self.objects[name]}

    def read(self, root: Root) -> tuple[list[str], tuple[int, ...]]:
        """All keys that a root refers to, and the content; Broken where one is missing."""
        content = [0] * CHUNKS
        keys = [outcome_key(root.summary.push)]
        try:
            for ref in root.table:
                key = pages_key(ref.push, ref.number)
                keys.append(key)
                for entry in self.get(key):
                    if entry:
                        segment = segment_key(*entry[:2])
                        keys.append(segment)
                        content[ref.page] = self.get(segment)[ref.page]
        except NotFoundError as error:
            raise Broken(f"{root.summary.push} needs {error}, which is gone") from None
        return keys, tuple(content)

    def _retire(self, push: str) -> None:
        if self.live.pop(push, None) is not None:
            for users in self.needed.values():
                users.discard(push)

    def _delete(self, key: str) -> None:
        if self.needed.get(key):
            raise Broken(f"{key} is deleted; {sorted(self.needed[key])} need it")
        self.objects[key[: key.index("/")]].pop(key, None)

    def left_over(self) -> str:
        """What is wrong in the store when all is quiet and collected; empty when nothing is."""
        wanted = {key for key, users in self.needed.items() if users}
        wanted |= {outcome_key(push) for push in self.aborted}
        wanted |= {tombstone_key(push) for push in self.deleted}
        found = {key for objects in self.objects.values() for key in objects}
        missing = {key for key, users in self.needed.items() if users} - found
        if missing:
            return f"missing: {sorted(missing)}"
        pointers = {key for key in found if key.startswith("snapshots/")}
        if any(key.rpartition("/")[2] not in self.live for key in pointers):
            return "a pointer to nothing is left"
        found -= pointers
        return f"left over: {sorted(found - wanted)}" if found - wanted else ""


class Actor:
    """Runs a generator, one step of the store at a time; ``step`` is what it wants next."""

    def __init__(
        self,
        name: str,
        world: World,
        steps: Generator[Any, Any, Any],
        shuffle: Shuffle | None = None,
    ) -> None:
        self.name = name
        self.world = world
        self._stack = [steps]
        self._each: tuple[Iterator[Any], Callable[[Any, Any], None]] | None = None
        self._shuffle = shuffle
        self.step: Any = None
        self.done = False
        self.error: Exception | None = None
        self._advance(None, None)

    def go(self) -> None:
        """Do the next step."""
        try:
            result = self.world.do(self.step)
        except NotFoundError as error:
            self._answer(None, error)
        else:
            self._answer(result, None)

    def lose(self, *, effect: bool, late: bool = False) -> None:
        """The store answers with an error; with ``effect`` it does the step all the same."""
        if late:
            self.world.late.append(self.step)
        elif effect:
            with suppress(NotFoundError):
                self.world.do(self.step)
        self._each = None
        self._advance(None, UnavailableError("lost"))

    def kill(self) -> None:
        self.done = True
        self._each = None
        while self._stack:
            self._stack.pop().close()

    def _answer(self, result: Any, error: Exception | None) -> None:
        if self._each is not None:
            steps, take = self._each
            take(self.step, result if error is None else error)
            following = next(steps, None)
            if following is not None:
                self.step = following
                return
            self._each = None
            result = error = None
        self._advance(result, error)

    def _advance(self, result: Any, error: Exception | None) -> None:
        while True:
            try:
                step = (
                    self._stack[-1].send(result) if error is None else self._stack[-1].throw(error)
                )
            except StopIteration as finished:
                self._stack.pop()
                result, error = finished.value, None
                if self._stack:
                    continue
                self.done = True
                return
            except (StorageError, ParentUnusableError) as raised:
                self._stack.pop()
                result, error = None, raised
                if self._stack:
                    continue
                self.done, self.error = True, raised
                return
            result = error = None
            if isinstance(step, Each):
                steps = iter(step.steps)
                if self._shuffle is not None:
                    steps = self._shuffle(steps)
                first = next(steps, None)
                if first is None:
                    continue
                self._each = (steps, step.take)
                step = first
            elif isinstance(step, Upload):
                self._stack.append(self.upload(step))
                continue
            elif isinstance(step, Move):
                self._stack.append(move(step))
                continue
            self.step = step
            return

    def upload(self, step: Upload) -> Generator[Any, Any, Any]:
        raise AssertionError(f"{self.name} uploads nothing")


Shuffle = Callable[[Iterable[Any]], Iterator[Any]]


def move(step: Move) -> Generator[Any, Any, Any]:
    """The work on data of a repack."""
    moved = {}
    for number, entry in enumerate(step.entries):
        segment = yield GetData(segment_key(entry.push, entry.segment))
        chunk = entry.offset
        yield PutData(segment_key(step.push, number), {chunk: segment[chunk]})
        moved[entry] = entry._replace(push=step.push, segment=number)
    refs = {}
    for number, ref in enumerate(step.refs):
        page = yield GetData(pages_key(ref.push, ref.number))
        yield PutData(pages_key(step.push, number), tuple(moved.get(e, e) for e in page))
        refs[ref.push, ref.number, ref.offset] = ref._replace(push=step.push, number=number)
    return refs


class Pusher(Actor):
    """Pushes a version as ``push_snapshot`` does."""

    commit_early = False  # to be caught
    trust_listing = False  # to be caught

    def __init__(
        self, world: World, version: Version, shuffle: Shuffle | None = None, line: str = ""
    ) -> None:
        self.version = version
        self.push = ""
        self.line = line
        super().__init__(f"push {version.snapshot}", world, self._steps(world), shuffle)

    def _steps(self, world: World) -> Generator[Any, Any, Any]:
        yield List(TOMBSTONES)  # stands for all listings: one moment
        live = {outcome.root.summary.snapshot_id: outcome.root.summary
                for outcome in world.live.values() if outcome.root}  # fmt: skip
        if self.version.snapshot_id in live:
            return
        candidates = [live[v.snapshot_id] for v in self.version.older if v.snapshot_id in live]
        unfinished = yield from finding_unfinished(self.version, self.line)
        for parent in (*candidates, None):
            push = self.push = world.new_id()
            try:
                yield from pushing(push, self.version, parent, unfinished, self.line)
            except ParentUnusableError:
                unfinished = []
                continue
            if push not in world.live and push not in world.deleted:
                raise Broken(f"{push} was reported as committed")
            return

    def upload(self, step: Upload) -> Generator[Any, Any, Stored]:
        push = self.push
        content = self.version.content
        donated: dict[int, tuple[str, int]] = {}
        prefixes = [f"segments/{donor}/" for donor in step.donors]
        if self.trust_listing:
            prefixes = ["segments/"]
        for prefix in prefixes:
            for key, _ in (yield List(prefix)):
                try:
                    segment = yield GetData(key)
                except NotFoundError:
                    continue
                for chunk, value in segment.items():
                    if value == content[chunk]:
                        donated[chunk] = (key.split("/")[1], int(key[-8:], 16))
        inherited: dict[int, PageRef] = {}
        base = (0,) * CHUNKS
        if step.parent is not None:
            inherited = {ref.page: ref for ref in step.parent.table}
            base = self.world.versions[step.parent.summary.snapshot_id].content
        changed = [chunk for chunk in range(CHUNKS) if content[chunk] != base[chunk]]
        for chunk in changed:
            if chunk in inherited:  # the real one reads the page, for its other chunks
                try:
                    yield GetData(pages_key(inherited[chunk].push, inherited[chunk].number))
                except NotFoundError as error:
                    raise ParentUnusableError(str(error)) from None
        # Two segments at most, so that one may hold several chunks.
        fresh = [chunk for chunk in changed if chunk not in donated]
        for number, chunks in enumerate(filter(None, (fresh[:2], fresh[2:]))):
            yield PutData(segment_key(push, number), {chunk: content[chunk] for chunk in chunks})
            donated.update((chunk, (push, number)) for chunk in chunks)
        table = [ref for page, ref in inherited.items() if page not in changed]
        for number, chunk in enumerate(changed):
            entry = Entry(*donated[chunk], chunk, BYTES, 1, b"")
            if not self.commit_early:
                yield PutData(pages_key(push, number), (entry,))
            table.append(PageRef(chunk, push, number, 0, 1, 1, 1, b""))
        return Stored(sorted(table))


class Deleter(Actor):
    """Deletes all that there is of a version when it begins."""

    def __init__(self, world: World, version: Version, shuffle: Shuffle | None = None) -> None:
        self.version = version
        super().__init__(f"delete {version.snapshot}", world, self._steps(world), shuffle)

    def _steps(self, world: World) -> Generator[Any, Any, Any]:
        yield List(TOMBSTONES)
        for summary in [o.root.summary for o in world.live.values() if o.root]:
            if summary.snapshot_id == self.version.snapshot_id:
                yield from deleting(summary)


class Collector(Actor):
    def __init__(
        self,
        world: World,
        give_up_after: float = 1e12,
        shuffle: Shuffle | None = None,
        *,
        repack: bool = False,
    ) -> None:
        steps = collecting(give_up_after, repack=repack)
        super().__init__("collect", world, steps, shuffle)


class Reader(Actor):
    """Restores a snapshot that is live when it begins."""

    def __init__(self, world: World, summary: Summary) -> None:
        self.summary = summary
        super().__init__(f"restore {summary.snapshot}", world, self._steps(world))

    def _steps(self, world: World) -> Generator[Any, Any, Any]:
        push = self.summary.push
        missed = None
        while True:
            content = [0] * CHUNKS
            root = None
            try:
                root = (yield from finding_root(push)).root
                for ref in root.table:
                    for entry in (yield GetData(pages_key(ref.push, ref.number))):
                        segment = yield GetData(segment_key(*entry[:2]))
                        content[ref.page] = segment[ref.page]
                break
            except NotFoundError as error:
                if push in world.deleted:
                    return
                if root is None or root is missed:
                    raise Broken(f"a reader of {push} misses {error}") from None
                missed = root  # it was the newest: look whether there is a newer one
        if tuple(content) != world.versions[self.summary.snapshot_id].content:
            raise Broken(f"a reader of {push} gets {content}")


def run_alone(actor: Actor) -> None:
    while not actor.done:
        actor.go()


def settle(world: World) -> None:
    """All is quiet: what was late has come; after some collections only what is needed is left."""
    for step in world.late:
        world.do(step)
    world.late = []
    for _ in range(COLLECTIONS):
        collector = Collector(world, 0)
        run_alone(collector)
        if collector.error is not None:
            raise Broken(f"in the quiet a collection fails: {collector.error}")
        left_over = world.left_over()
        if not left_over:
            return
    raise Broken(left_over)


def shuffler(rng: random.Random) -> Shuffle:
    def shuffle(steps: Iterable[Any]) -> Iterator[Any]:
        listed = list(steps)
        rng.shuffle(listed)
        return iter(listed)

    return shuffle


MUTATING = (Put, PutOnce, PutData, Delete)


def run_random(start: World, make: Callable[[World, Shuffle], list[Actor]], seed: int) -> None:
    """One random schedule. Some actors are killed, some sleep until all others have finished."""
    rng = random.Random(seed)
    world = start.copy()
    actors = make(world, shuffler(rng))
    chance = rng.random
    trouble = rng.choice((0.0, 0.0, 0.03, 0.1))
    stay = rng.choice((0.0, 0.5, 0.8, 0.9))
    asleep: list[Actor] = []
    actor = actors[0]
    while actors or asleep:
        if not actors:
            actors, asleep = asleep, []
            actors.append(Collector(world, rng.choice((0, 1e12)), shuffler(rng)))
        if actor.done or actor not in actors or chance() >= stay:
            actor = actors[int(chance() * len(actors))]
        if trouble and chance() < trouble:
            what = chance()
            if what < 0.25:
                actor.kill()
            elif what < 0.5:
                actors.remove(actor)
                asleep.append(actor)
                continue
            elif isinstance(actor.step, MUTATING):
                if what < 0.9:
                    actor.lose(effect=what < 0.8, late=what >= 0.8)
                else:  # it comes twice
                    world.late.append(actor.step)
                    actor.go()
            else:
                actor.lose(effect=False)
        else:
            actor.go()
        if world.late and chance() < 0.1:
            world.do(world.late.pop())
        if actor.done:
            actors.remove(actor)
    settle(world)


def run_all(
    start: World,
    make: Callable[[World], list[Actor]],
    preemptions: int,
    kill_first_after: int | None = None,
) -> int:
    """Every schedule in which actors are interrupted so many times; returns how many there were.

    Who is interrupted goes on when another is, or when the others have finished. With
    ``kill_first_after`` the first actor is killed after so many steps.
    """
    count = 0
    stack: list[tuple[tuple[int, int], ...]] = [()]  # (step before which to switch, to whom), …
    while stack:
        switches = stack.pop()
        count += 1
        world = start.copy()
        actors = make(world)
        current: Actor | None = None
        position = index = used = steps_of_first = 0
        frontier = switches[-1][0] if switches else -1
        while True:
            told = index < len(switches) and switches[index][0] == position
            if current is None or current.done:
                waiting = [number for number, actor in enumerate(actors) if not actor.done]
                if not waiting:
                    break
                if told:
                    current = actors[switches[index][1]]
                    index += 1
                else:
                    current = actors[waiting[0]]
                    if position > frontier:
                        stack.extend((*switches, (position, other)) for other in waiting[1:])
            elif told:
                current = actors[switches[index][1]]
                index += 1
                used += 1
            elif position > frontier and used < preemptions:
                stack.extend(
                    (*switches, (position, number))
                    for number, other in enumerate(actors)
                    if other is not current and not other.done
                )
            current.go()
            position += 1
            if current is actors[0] and kill_first_after is not None:
                steps_of_first += 1
                if steps_of_first >= kill_first_after:
                    current.kill()
        settle(world)
    return count
