"""A merge pauses while clients are served, and goes on at full speed when none is."""

import asyncio

import pytest

from nbdserve import pacing
from nbdserve.measuring import Measuring
from nbdserve.pacing import MOST_PAUSE, Pacing
from nbdserve.protocol.constants import CMD_READ


def test_pauses_are_as_long_as_chunks_while_anybody_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def main() -> None:
        measuring = Measuring()
        meter = measuring.meters.enter("a")
        pace = Pacing(measuring)
        await pace.pause(0.1)
        assert pauses == []
        meter.command(CMD_READ).add(1, 1, 0.001)
        monkeypatch.setattr(pacing.asyncio, "sleep", sleep)
        await pace.pause(0.1)
        meter.command(CMD_READ).add(1, 1, 0.001)
        await pace.pause(100)
        assert pauses == [0.1, MOST_PAUSE]
        await pace.pause(0.1)
        assert len(pauses) == 2

    monkeypatch.setattr(pacing, "INTERVAL", 0.0)
    asyncio.run(main())
