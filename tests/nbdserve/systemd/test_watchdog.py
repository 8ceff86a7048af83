"""Workers that hang, one look of the watchdog after the other."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.local_layers import LocalLayerStore
from nbdserve.logs import Logs
from nbdserve.systemd import watchdog
from nbdserve.systemd.notify import Notifier
from nbdserve.systemd.watchdog import Watchdog
from nbdserve.workers.host import WorkerHost
from snapshots.catalogue import Catalogue


def over_workers(path: Path, test: Callable[[list[WorkerHost], Watchdog], object]) -> None:
    """Run the coroutine function ``test`` with two workers, which are watched."""

    async def main() -> None:
        store = LocalLayerStore(path)
        hosts = [WorkerHost(path, Logs("error"), lambda: store.lock_descriptor) for _ in "12"]
        catalogue = await Catalogue.open(store, hosts)
        try:
            await test(hosts, Watchdog(Notifier(), hosts, 7))  # type: ignore[misc]
        finally:
            await catalogue.close()

    asyncio.run(main())


async def answered(watching: Watchdog, *hosts: WorkerHost) -> None:
    """Wait until they have answered what they were asked."""
    for host in hosts:
        _, question = watching._asked[host]
        await question


async def replaced(host: WorkerHost, pid: int | None) -> None:
    async with asyncio.timeout(60):
        while host.pid in (pid, None):  # noqa: ASYNC110 - seen from outside
            await asyncio.sleep(0.01)


def test_one_that_hangs_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(hosts: list[WorkerHost], watching: Watchdog) -> None:
        healthy, hanging = hosts
        other, victim = healthy.pid, hanging.pid
        assert victim is not None
        for _ in range(2):
            watching.look()
            await answered(watching, *hosts)
        watching.look()
        await answered(watching, *hosts)
        os.kill(victim, signal.SIGSTOP)
        watching.look()  # asks
        await answered(watching, healthy)
        assert caplog.records == []
        watching.look()
        await replaced(hanging, victim)
        assert healthy.pid == other
        line = f"worker process {victim} has not answered for 7 seconds, and is ended"
        assert line in caplog.text
        # Its successor is looked at like any other.
        for _ in range(4):
            watching.look()
            await answered(watching, *hosts)
        assert caplog.text.count("has not answered") == 1

    over_workers(tmp_path / "data", test)


def test_one_that_has_not_answered_yet_is_starting(tmp_path: Path) -> None:
    async def test(hosts: list[WorkerHost], watching: Watchdog) -> None:
        pids = [host.pid for host in hosts]
        for _ in range(5):
            watching.look()
        await answered(watching, *hosts)
        assert [host.pid for host in hosts] == pids

    over_workers(tmp_path / "data", test)


@pytest.mark.parametrize(("state", "why"), [("D", "waits for a disk"), ("t", "by a debugger")])
def test_one_that_cannot_help_it_is_left_alone(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    why: str,
) -> None:
    async def test(hosts: list[WorkerHost], watching: Watchdog) -> None:
        _, hanging = hosts
        victim = hanging.pid
        assert victim is not None
        watching.look()
        await answered(watching, *hosts)
        watching.look()
        await answered(watching, *hosts)
        os.kill(victim, signal.SIGSTOP)
        monkeypatch.setattr(watchdog, "_state", lambda process: state)
        for _ in range(4):
            watching.look()
            await answered(watching, hosts[0])
        assert caplog.text.count(why) == 1
        os.kill(victim, signal.SIGCONT)
        await answered(watching, *hosts)
        assert hanging.pid == victim

    over_workers(tmp_path / "data", test)
