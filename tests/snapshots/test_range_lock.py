"""Range locks: order, overlap, cancellation."""

from __future__ import annotations

import asyncio
import random

import pytest

from snapshots.range_lock import RangeLock
from tests.snapshots.stores import run


def test_holders_that_overlap_get_their_turn_in_order() -> None:
    async def scenario() -> None:
        lock = RangeLock()
        order: list[str] = []
        held = asyncio.Event()

        async def hold(name: str, first: int, last: int) -> None:
            async with lock.hold(first, last):
                order.append(name)
                await held.wait()

        tasks = [
            asyncio.create_task(hold(*each))
            for each in (("a", 0, 10), ("b", 5, 20), ("c", 15, 30), ("d", 0, 5), ("e", 40, 50))
        ]
        await asyncio.sleep(0.01)
        # d overlaps only a, c only b, which waits itself: both wait. e is free.
        assert order == ["a", "e"]
        assert lock.entries
        assert lock.overlaps(29, 30) and lock.overlaps(0, 1)
        assert not lock.overlaps(30, 40) and not lock.overlaps(50, 60)
        held.set()
        await asyncio.gather(*tasks)
        assert order.index("b") < order.index("c")
        assert not lock.entries
        assert not lock.overlaps(0, 100)

    run(scenario())


def test_a_cancelled_waiter_neither_blocks_nor_lets_anybody_past() -> None:
    async def scenario() -> None:
        lock = RangeLock()
        order: list[str] = []

        async def hold(name: str) -> None:
            async with lock.hold(0, 10):
                order.append(name)

        async with lock.hold(5, 6):
            waiting = [asyncio.create_task(hold(name)) for name in "abc"]
            await asyncio.sleep(0)
            waiting[1].cancel()
            await asyncio.gather(waiting[1], return_exceptions=True)
            await asyncio.sleep(0.01)
            assert order == [], "c got past the holder that b waited for"
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order == ["a", "c"]
        assert not lock.entries

    run(scenario())


def test_an_error_inside_lets_go() -> None:
    async def scenario() -> None:
        lock = RangeLock()
        with pytest.raises(ZeroDivisionError):
            async with lock.hold(0, 1):
                raise ZeroDivisionError
        async with lock.hold(0, 1):
            pass

    run(scenario())


def test_no_block_ever_has_two_holders_and_all_get_done() -> None:
    async def scenario(seed: int) -> None:
        choice = random.Random(seed)
        lock = RangeLock()
        holders = [0] * 50
        done = 0

        async def work() -> None:
            nonlocal done
            first = choice.randrange(49)
            last = choice.randrange(first + 1, 51)
            async with lock.hold(first, last):
                for block in range(first, last):
                    holders[block] += 1
                    assert holders[block] == 1
                for _ in range(choice.randrange(4)):
                    await asyncio.sleep(0)
                for block in range(first, last):
                    holders[block] -= 1
            done += 1

        tasks = [asyncio.create_task(work()) for _ in range(60)]
        await asyncio.sleep(0)
        cancelled = [task for task in tasks if choice.random() < 0.2]
        for task in cancelled:
            # Only a waiter: one inside would leave its count behind.
            if all(holder == 0 for holder in holders):
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(
            result is None or isinstance(result, asyncio.CancelledError) for result in results
        )
        assert done >= 40
        assert not lock.entries

    for seed in range(20):
        run(scenario(seed))
