"""Counting over workers: nothing is counted twice, and no sum goes back."""

import asyncio
import os
import signal
from pathlib import Path

from backends.local_layers import LocalLayerStore
from nbdserve.logs import Logs
from nbdserve.measuring import Measuring
from nbdserve.workers.host import WorkerHost
from snapshots.catalogue import Catalogue

from .remote import RemoteHandle

SIZE = 1 << 20


async def open_measured(
    path: Path, count: int = 2
) -> tuple[Catalogue, Measuring, list[WorkerHost]]:
    store = LocalLayerStore(path)
    measuring = Measuring()
    hosts = [
        WorkerHost(path, Logs("error"), lambda: store.lock_descriptor, measuring.retire)
        for _ in range(count)
    ]
    measuring.processes = hosts
    return await Catalogue.open(store, hosts), measuring, hosts


async def counts(catalogue: Catalogue, measuring: Measuring) -> dict[str, dict[str, int]]:
    return {
        one.volume: {name: numbers.count for name, numbers in one.numbers.commands.items()}
        for one in await measuring.read(catalogue.names_of)
    }


def test_counts_survive_connections_renaming_and_a_worker_that_dies(tmp_path: Path) -> None:
    async def main() -> None:
        catalogue, measuring, hosts = await open_measured(tmp_path)
        for name in ("a", "b"):
            await catalogue.create_volume(name, SIZE)
        assert await counts(catalogue, measuring) == {}
        for turn in (1, 2):
            for name in ("a", "b"):
                lease = await catalogue.open_volume(name, lambda: None)
                client = await RemoteHandle.begin(lease)
                await client.write(0, b"x" * 4096)
                await client.flush()
                assert (await counts(catalogue, measuring))[name] == {"write": turn, "flush": turn}
                await client.end(catalogue)
        assert await counts(catalogue, measuring) == {
            name: {"write": 2, "flush": 2} for name in ("a", "b")
        }
        await catalogue.rename_volume("b", "c")
        await catalogue.delete_volume("a")
        assert await counts(catalogue, measuring) == {"c": {"write": 2, "flush": 2}}

        lease = await catalogue.open_volume("c", lambda: None)
        client = await RemoteHandle.begin(lease)
        await client.write(0, b"x")
        assert await counts(catalogue, measuring) == {"c": {"write": 3, "flush": 2}}
        serving = next(host for host in hosts if host.counted)
        assert serving.pid is not None
        os.kill(serving.pid, signal.SIGKILL)
        await client.serving.transmit()
        await catalogue.close_export(lease)
        assert await counts(catalogue, measuring) == {"c": {"write": 3, "flush": 2}}
        lease = await catalogue.open_volume("c", lambda: None)
        client = await RemoteHandle.begin(lease)
        await client.write(0, b"x")
        assert await counts(catalogue, measuring) == {"c": {"write": 4, "flush": 2}}
        await client.end(catalogue)
        await catalogue.close()

    asyncio.run(main())


def test_a_worker_that_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    async def main() -> None:
        catalogue, measuring, hosts = await open_measured(tmp_path, 2)
        await catalogue.create_volume("a", SIZE)
        lease = await catalogue.open_volume("a", lambda: None)
        client = await RemoteHandle.begin(lease)
        await client.write(0, b"x")
        before = await counts(catalogue, measuring)
        serving = next(host for host in hosts if host.counted)
        assert serving.pid is not None
        os.kill(serving.pid, signal.SIGSTOP)
        try:
            found = await asyncio.gather(*(counts(catalogue, measuring) for _ in range(20)))
            assert found == [before] * 20
            assert [host.responding for host in hosts] == [host is not serving for host in hosts]
        finally:
            os.kill(serving.pid, signal.SIGCONT)
        await client.write(0, b"x")
        assert (await counts(catalogue, measuring))["a"] == {"write": 2}
        assert all(host.responding for host in hosts)
        await client.end(catalogue)
        await catalogue.close()

    asyncio.run(main())
