"""How many requests are under way at once: against a list of the rules, and with real threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backends.turns as turns_module
from backends.turns import Answer, Turn, Turns


def finish(turn: Turn, answer: Answer) -> None:
    with turn:
        turn.answer = answer


def must(turn: Turn | None) -> Turn:
    assert turn is not None
    return turn


def recover(turns: Turns, most: int) -> int:
    """Serve one after another until the bound is ``most`` again; how many that took."""
    served = 0
    while turns.bound < most:
        finish(must(turns.take(0)), Answer.SERVED)
        served += 1
        assert served <= most * most
    return served


@given(
    most=st.integers(1, 24),
    steps=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(Answer)), max_size=200),
)
def test_the_bound_is_kept_and_recovers(most: int, steps: list[tuple[int, Answer]]) -> None:
    turns = Turns(most)
    out: list[tuple[Turn, int]] = []  # with the halvings before each
    halvings = 0
    for choice, answer in steps:
        before = turns.bound
        if choice >= len(out):
            turn = turns.take(0)
            assert (turn is None) == (len(out) >= before)
            if turn is not None:
                out.append((turn, halvings))
            assert turns.bound == before
            continue
        in_flight = len(out)
        turn, seen = out.pop(choice)
        finish(turn, answer)
        if answer is Answer.THROTTLED and seen == halvings:
            halvings += 1
            assert turns.bound == max(1, min(before, in_flight) // 2)
        elif answer is Answer.SERVED:
            assert before <= turns.bound <= min(most, before + 1)
        else:
            assert turns.bound == before
        assert 1 <= turns.bound <= most
    for turn, _ in out:
        finish(turn, Answer.OTHER)
    recover(turns, most)
    everything = [must(turns.take(0)) for _ in range(most)]
    assert turns.take(0) is None
    for turn in everything:
        finish(turn, Answer.OTHER)


def test_all_that_was_sent_under_the_old_bound_halves_it_once() -> None:
    turns = Turns(16)
    out = [must(turns.take(0)) for _ in range(16)]
    finish(out[0], Answer.THROTTLED)
    assert turns.bound == 8
    for turn in out[1:]:
        finish(turn, Answer.THROTTLED)
    assert turns.bound == 8
    finish(must(turns.take(0)), Answer.THROTTLED)
    assert turns.bound == 1  # it was the only one in flight, and even that was too much
    assert recover(turns, 16) > 16


def test_an_exception_gives_the_turn_back() -> None:
    turns = Turns(1)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), must(turns.take(0)):
            raise error
    finish(must(turns.take(0)), Answer.SERVED)


def test_turns_are_handed_out_in_order() -> None:
    turns = Turns(1)
    order: list[int] = []
    held = must(turns.take(0))

    def wait(number: int) -> None:
        with must(turns.take(60)) as turn:
            order.append(number)
            turn.answer = Answer.SERVED

    threads = []
    for number in range(8):
        thread = threading.Thread(target=wait, args=(number,))
        thread.start()
        threads.append(thread)
        until(lambda count=number + 1: len(turns._waiting) == count)
    finish(held, Answer.OTHER)
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_patience_begins_anew_when_somebody_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock but ours, and no thread: what happens while it waits is done by ``wait``."""
    now = 100.0
    monkeypatch.setattr(turns_module.time, "monotonic", lambda: now)
    turns = Turns(2)
    held = [must(turns.take(0)) for _ in range(2)]
    happening: list[Callable[[], None]] = []
    waits: list[float] = []

    def wait(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        if happening:
            now += 6
            happening.pop(0)()
        else:
            now += seconds

    monkeypatch.setattr(turns._changed, "wait", wait)
    assert turns.take(10) is None
    assert waits == [10]

    def serve_another() -> None:
        turns._served = now

    happening += [serve_another, lambda: None, lambda: finish(held.pop(), Answer.OTHER)]
    waits.clear()
    turn = must(turns.take(10))
    assert waits == [10, 10, 4]
    assert turn.excused == 6  # of 18 seconds: those up to the answer to another


def test_stop_refuses_who_waits_and_nobody_else() -> None:
    turns = Turns(1)
    held = must(turns.take(0))
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(turns.take, 3600) for _ in range(3)]
        until(lambda: len(turns._waiting) == 3)
        turns.stop()
        assert [future.result() for future in waiting] == [None] * 3
    assert turns.take(3600) is None
    finish(held, Answer.SERVED)
    finish(must(turns.take(3600)), Answer.SERVED)


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.001)
