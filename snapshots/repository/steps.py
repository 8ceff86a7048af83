"""Steps: what a protocol asks of the store, apart from the store that does it (sans-IO).

Push, delete, collection and repacking are generators that yield one step at a time and are sent its
result, or thrown the StorageError with which it failed. :func:`perform` does the steps with a real
store; the tests do them with a simulated one, one by one, in every order they can think of. So what
is checked there is what runs here.

==============  ====================================================================
Put             store a record, replacing what was there; None
PutOnce         store a record where there is none; whether it was stored
Get             the record; NotFoundError, CorruptError, or InvalidError for a newer version
Exists          whether there is such an object
List            (key, size in bytes) of every object whose key begins so
Delete          remove an object, also one that is not there; None
SegmentsOf      the segments that some pages of one object refer to: (push, number) -> bytes
PagesOf         the same pages, decoded
Each            many steps at once, in no particular order; ``take`` is called with each and its
                result, which is the error where it is none of the store's being unavailable
Upload          the work on data of a push: store segments and pages; see ``pushing``
Move            the work on data of a repack; see ``repacking``
==============  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from backends.errors import CorruptError, InvalidError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.holdings import THREADS, describe_object
from snapshots.repository.insisting import insist
from snapshots.repository.layout import OUTCOME_LIMIT, PLAN_LIMIT, RECORD_LIMIT
from snapshots.repository.pages import Entry, PageRef
from snapshots.repository.pipeline import Crew, leaving_promptly
from snapshots.repository.reading import read_pages, read_segments_of
from snapshots.repository.records import Config, Intent, Outcome, Plan, Repacked, Root

Result = TypeVar("Result")


class Record(Protocol):
    """What is put: it becomes bytes only where there is a real store."""

    def encode(self) -> bytes:
        """The bytes of the object."""


class Put(NamedTuple):
    key: str
    record: Record


class PutOnce(NamedTuple):
    key: str
    record: Record


class Get(NamedTuple):
    key: str
    kind: type[Intent] | type[Outcome] | type[Plan] | type[Repacked]


class Exists(NamedTuple):
    key: str


class List(NamedTuple):
    prefix: str


class Delete(NamedTuple):
    key: str


class SegmentsOf(NamedTuple):
    refs: list[PageRef]


class PagesOf(NamedTuple):
    refs: list[PageRef]


class Upload(NamedTuple):
    parent: Root | None
    donors: list[str]


class Move(NamedTuple):
    push: str
    entries: list[Entry]
    refs: list[PageRef]


Single: TypeAlias = Put | PutOnce | Get | Exists | List | Delete | SegmentsOf | PagesOf


class Each(NamedTuple):
    steps: Iterable[Single]
    take: Callable[[Any, Any], None]


Step: TypeAlias = Single | Each | Upload | Move
Steps: TypeAlias = Generator[Step, Any, Result]

#: What ``Each`` hands over rather than raises: it says something of one object, not of the store.
OF_ONE_OBJECT = (NotFoundError, CorruptError, InvalidError)


def raise_error(_: Any, result: Any) -> None:
    """``take`` for steps of which none may fail."""
    if isinstance(result, Exception):
        raise result


def perform(
    store: ObjectStore,
    config: Config,
    steps: Steps[Result],
    work: Callable[[Any], Any] | None = None,
) -> Result:
    """Do the steps, and return what the generator returns. ``work`` does ``Upload`` or ``Move``."""
    performer = _Performer(store, config)
    result: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(result) if error is None else steps.throw(error)
        except StopIteration as done:
            found: Result = done.value
            return found
        result = error = None
        try:
            if isinstance(step, Each):
                performer.do_each(step)
            elif isinstance(step, Upload | Move):
                assert work is not None
                result = work(step)
            else:
                result = performer.do(step)
        except BaseException as raised:  # the generator decides what it means
            error = raised


class _Performer:
    def __init__(self, store: ObjectStore, config: Config) -> None:
        self._store = store
        self._config = config

    def do(self, step: Single) -> Any:
        store = self._store
        if isinstance(step, Put):
            return store.put(step.key, step.record.encode())
        if isinstance(step, PutOnce):
            return put_once(store, self._config, step.key, step.record.encode())
        if isinstance(step, Get):
            return insist(lambda: self._get(step))
        if isinstance(step, Exists):
            return store.size(step.key) is not None
        if isinstance(step, List):
            return list(store.list(step.prefix))
        if isinstance(step, Delete):
            return store.delete(step.key)
        if isinstance(step, PagesOf):
            return read_pages(store, self._config.chunk_size, step.refs)
        return read_segments_of(store, step.refs)

    def do_each(self, step: Each) -> None:
        with Crew(THREADS, "steps") as crew, leaving_promptly(self._store):
            for single, result in crew.ordered(self._try, step.steps, 4 * THREADS):
                step.take(single, result)

    def _try(self, step: Single) -> tuple[Single, Any]:
        try:
            return step, self.do(step)
        except OF_ONE_OBJECT as error:
            return step, error

    def _get(self, step: Get) -> Intent | Outcome | Plan | Repacked:
        where = describe_object(self._store, step.key)
        if step.kind is Outcome:
            record = self._store.get(step.key, OUTCOME_LIMIT)
            push = step.key.rpartition("/")[2]
            return Outcome.decode(record, push, self._config.chunk_size, where)
        if step.kind is Repacked:
            record = self._store.get(step.key, OUTCOME_LIMIT)
            return Repacked.decode(record, step.key, self._config.chunk_size, where)
        if step.kind is Intent:
            return Intent.decode(self._store.get(step.key, RECORD_LIMIT), where)
        return Plan.decode(self._store.get(step.key, PLAN_LIMIT), where)


def put_once(store: ObjectStore, config: Config, key: str, data: bytes) -> bool:
    """``put_if_absent``, or what comes next to it where there is but a single writer."""
    if config.conditional_put:
        return store.put_if_absent(key, data)
    if store.size(key) is not None:
        return False
    store.put(key, data)
    return True
