"""Limits of bandwidth, over a clock of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backends.bandwidth as bandwidth_module
from backends.bandwidth import LimitedObjectStore, check_rate
from backends.errors import InvalidError, UnavailableError
from backends.memory_objects import MemoryObjectStore
from backends.objects import ObjectStore
from tests.backends.test_objects_contract import ObjectStoreContract

KIB = 1024


class Clock:
    """Stands in for ``time``; who waits on it is woken at once, later."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        self.now += seconds
        return False


def limited(upload: int | None, download: int | None) -> tuple[LimitedObjectStore, Clock]:
    store, clock = LimitedObjectStore(MemoryObjectStore(), upload, download), Clock()
    for bucket in (store._upload, store._download):
        bucket._stopped.wait = clock.wait  # type: ignore[method-assign, assignment]
    return store, clock


class TestLimitedObjects(ObjectStoreContract):
    """All that a store promises, limited but not slow."""

    @pytest.fixture
    def make(self) -> Callable[[], ObjectStore]:
        store = LimitedObjectStore(MemoryObjectStore(), 1 << 60, 1 << 60)
        return lambda: store


@given(
    rate=st.integers(KIB, 1 << 20),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "put_if_absent", "get", "get_range"]),
            st.integers(0, 8 * KIB),
            st.floats(0, 20),
        ),
        max_size=40,
    ),
)
def test_no_span_of_time_has_more_than_the_rate_and_one_request(
    rate: int, steps: list[tuple[str, int, float]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        store, clock = limited(rate, 2 * rate)
        patch.setattr(bandwidth_module, "time", clock)
        begun: dict[str, list[tuple[float, int]]] = {"put": [], "get": []}
        for number, (call, size, idle) in enumerate(steps):
            clock.now += idle
            if call == "put":
                store.put(f"k{number}", bytes(size))
            elif call == "put_if_absent":
                assert store.put_if_absent(f"k{number}", bytes(size))
            else:
                store._inner.put("there", bytes(size))
                if call == "get":
                    store.get("there", size)
                else:
                    store.get_range("there", 0, size)
            begun[call[:3]].append((clock.now, size))
    for direction, allowed in (("put", rate), ("get", 2 * rate)):
        requests = begun[direction]
        for first in range(len(requests)):
            total = 0
            for when, size in requests[first:]:
                # All before this one fit into the span; it is the one more.
                span = when - requests[first][0]
                assert total <= allowed * span + 1e-3 * allowed
                total += size


def test_the_time_that_a_series_takes() -> None:
    """Neither slower than it must be, nor one direction at the cost of the other."""
    with pytest.MonkeyPatch.context() as patch:
        store, clock = limited(KIB, 4 * KIB)
        patch.setattr(bandwidth_module, "time", clock)
        for number in range(5):
            store.put(f"k{number}", bytes(16 * KIB))
        assert clock.now == pytest.approx(1000 + 4 * 16)
        for number in range(5):
            store.get(f"k{number}", 16 * KIB)
        assert clock.now == pytest.approx(1064 + 4 * 4)
        clock.now += 100  # an idle bucket saves nothing up
        for number in range(3):
            store.put(f"k{number}", bytes(16 * KIB))
        assert clock.now == pytest.approx(1180 + 2 * 16)


def test_what_is_not_limited_does_not_wait() -> None:
    store, clock = limited(None, KIB)
    for _ in range(3):
        store.put("key", bytes(1 << 20))
    assert clock.now == 1000
    assert list(store.list("")) == [("key", 1 << 20)]
    assert store.size("key") == 1 << 20
    store.delete("key")
    assert clock.now == 1000


def test_stop_wakes_who_waits() -> None:
    store = LimitedObjectStore(MemoryObjectStore(), KIB, KIB)
    store.put("key", bytes(1 << 20))  # a thousand seconds
    calls: list[Callable[[], object]] = [
        lambda: store.put("other", bytes(9)),
        lambda: store.put_if_absent("other", bytes(9)),
    ]
    both = store._upload._free + 17 / KIB  # what is owed when both have taken their 9 bytes
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(call) for call in calls]
        while store._upload._free < both:
            threading.Event().wait(0.001)
        store.stop_retrying()
        for future in waiting:
            with pytest.raises(UnavailableError, match=r"cannot write other in .*interrupted"):
                future.result()
    assert store.size("other") is None
    assert len(store.get("key", 1 << 20)) == 1 << 20  # nothing to wait for: it goes
    with pytest.raises(UnavailableError, match=r"cannot read key in .*interrupted"):
        store.get_range("key", 0, 1)


def test_a_rate_that_would_never_end() -> None:
    assert check_rate(KIB) == KIB
    for rate in (0, 1, KIB - 1):
        with pytest.raises(InvalidError, match="at least 1K"):
            check_rate(rate)
