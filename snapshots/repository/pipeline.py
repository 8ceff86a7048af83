"""Bounded work on threads.

Work is handed out in order and results come back in order, with a bounded number under way, so
memory is bounded whatever the volume's size. Leaving a crew's ``with`` block, for whatever reason
(an error, ctrl-C), drops what has not begun and waits for what has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from backends.objects import ObjectStore

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crew:
    """Some threads that work for one caller; use it in a ``with`` statement."""

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def ordered(
        self, work: Callable[[Item], Result], items: Iterable[Item], window: int
    ) -> Iterator[Result]:
        """Yield ``work(item)`` for each item in order; at most ``window`` are ahead."""
        under_way: deque[Future[Result]] = deque()
        for item in items:
            under_way.append(self._executor.submit(work, item))
            if len(under_way) >= window:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        return self._executor.submit(work)


class Uploader:
    """Puts objects in parallel, at most ``in_flight`` at a time; used by one thread.

    The first failure is raised by the ``put`` after it, or by ``finish``.
    """

    def __init__(self, store: ObjectStore, crew: Crew, in_flight: int) -> None:
        self._store = store
        self._crew = crew
        self._in_flight = in_flight
        self._pending: set[Future[None]] = set()
        self.objects = 0
        self.bytes = 0

    def put(self, key: str, data: bytes | bytearray) -> None:
        """Begin to store ``data``, after waiting until fewer than ``in_flight`` are stored."""
        self._wait_below(self._in_flight)
        self.objects += 1
        self.bytes += len(data)
        self._pending.add(self._crew.submit(lambda: self._store.put(key, data)))

    def finish(self) -> None:
        """Wait until the store has acknowledged everything."""
        self._wait_below(1)

    def _wait_below(self, count: int) -> None:
        while len(self._pending) >= count:
            done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()


@contextmanager
def leaving_promptly(store: ObjectStore) -> Iterator[None]:
    """On ctrl-C let calls that are being retried fail, so that waiting for threads is short."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        store.stop_retrying()
        raise
