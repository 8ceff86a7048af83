"""When a connection may try to receive again without the event loop."""

from __future__ import annotations

import pytest

from nbdserve.server import polling
from nbdserve.server.polling import Polling

SOON = 50e-6
LATE = 10e-3


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(polling, "perf_counter", lambda: self.now)

    def serve(self, client: Polling, gap: float, times: int = 1) -> bool:
        """The loop wakes ``client`` that long after its last reply; whether it then polls."""
        may = False
        for _ in range(times):
            self.now += gap
            client.woken()
            may = client.replied(self.now)
        return may


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(Polling, "_served", None)
    return Clock(monkeypatch)


def test_only_a_client_that_was_quick_for_a_while_is_polled(clock: Clock) -> None:
    client = Polling()
    assert not clock.serve(client, SOON, times=8)
    assert clock.serve(client, SOON)
    assert not clock.serve(client, LATE)
    assert not clock.serve(client, SOON)


def test_polling_in_vain_ends_it(clock: Clock) -> None:
    client = Polling()
    assert clock.serve(client, SOON, times=20)
    client.missed()
    client.missed()
    client.hit()
    assert client.replied(clock.now)
    for _ in range(3):
        client.missed()
    assert not client.replied(clock.now)


def test_nobody_is_polled_while_two_are_served(clock: Clock) -> None:
    one, other = Polling(), Polling()
    for _ in range(50):
        assert not clock.serve(one, SOON)
        assert not clock.serve(other, SOON)


def test_the_rest_of_a_request_is_waited_for_while_nobody_else_is_served(clock: Clock) -> None:
    one, other = Polling(), Polling()
    assert not one.woken()
    assert one.woken()
    assert not other.woken()
    assert not one.woken()
    clock.now += LATE
    assert one.woken()
    Polling.disturb()
    assert not one.woken()


def test_another_client_ends_it(clock: Clock) -> None:
    one, other = Polling(), Polling()
    assert clock.serve(one, SOON, times=20)
    assert not clock.serve(other, SOON)
    assert not clock.serve(one, SOON)


def test_nobody_is_polled_behind_a_relay(clock: Clock) -> None:
    client = Polling()
    for _ in range(50):
        Polling.disturb()
        assert not clock.serve(client, SOON)
    assert clock.serve(client, SOON, times=20)
