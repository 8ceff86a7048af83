"""Views on hosts: the freeze before a gate, and the model over two hosts of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from backends.local_layers import LocalLayerStore
from backends.memory_layers import MemoryLayerStore
from snapshots import volume as volume_module
from snapshots.catalogue import Catalogue
from snapshots.host import HostLostError
from snapshots.local_host import LocalHost
from snapshots.threads import Threads
from tests.snapshots.stores import BLOCK, FaultyStore, run
from tests.snapshots.test_model import VolumeModel


async def with_two_hosts(store: MemoryLayerStore) -> tuple[Catalogue, Threads]:
    threads = Threads()
    hosts = [LocalHost(store, threads) for _ in range(2)]
    return await Catalogue.open(store, hosts), threads


def test_frozen_volumes_are_read_but_not_written() -> None:
    async def scenario() -> None:
        catalogue, threads = await with_two_hosts(FaultyStore())
        handles: dict[str, Any] = {}
        for name in "ab":
            await catalogue.create_volume(name, 16 * BLOCK)
            handles[name] = await catalogue.open_volume(name, lambda: None)
            await handles[name].write(0, name.encode() * BLOCK)
        hosts = catalogue._views.hosts
        key = catalogue._manifests.get("a").id
        assert [catalogue._views.volumes_on(host) for host in hosts] == [1, 1]
        await hosts[0].freeze([key])
        await hosts[0].freeze([key])
        handle = handles["a"]
        # Blocks that the head owns, and others.
        for block in (0, 5):
            assert not handle.try_write(block * BLOCK, memoryview(b"x" * BLOCK))
        later: list[Coroutine[Any, Any, None]] = [
            handle.write(0, b"x" * BLOCK),
            handle.write(5 * BLOCK, b"x" * 10),
            handle.trim(0, 2 * BLOCK),
            handle.write_zeroes(3 * BLOCK, 100, no_hole=True),
        ]
        waiting = [asyncio.ensure_future(each) for each in later]
        buffer = bytearray(BLOCK)
        assert handle.try_read(0, memoryview(buffer))
        assert buffer == b"a" * BLOCK
        await handle.flush()
        await handles["b"].write(0, b"c" * BLOCK)
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in waiting)
        await hosts[0].thaw([key])
        await asyncio.gather(*waiting)
        assert handle.try_write(BLOCK, memoryview(b"y" * BLOCK))

        # A write that had not begun when its volume was frozen is in no snapshot of the group.
        await hosts[0].freeze([key])
        late = asyncio.ensure_future(handle.write(2 * BLOCK, b"z" * BLOCK))
        await asyncio.sleep(0)
        await catalogue.create_snapshots([("a", "s"), ("b", "s")])
        await late
        snapshot: Any = await catalogue.open_snapshot("a", "s", lambda: None)
        await snapshot.read(2 * BLOCK, memoryview(buffer))
        assert buffer == bytes(BLOCK)
        await handle.read(2 * BLOCK, memoryview(buffer))
        assert buffer == b"z" * BLOCK
        for each in (*handles.values(), snapshot):
            await catalogue.close_export(each)
        await catalogue.close()
        threads.close()

    run(scenario())


def test_what_a_host_does_not_know_was_lost() -> None:
    async def scenario() -> None:
        threads = Threads()
        host = LocalHost(FaultyStore(), threads)
        for call in (
            host.flush("x"),
            host.settle("x"),
            host.freeze(["x"]),
            host.swap_heads(["x"]),
            host.close_view("x"),
        ):
            with pytest.raises(HostLostError, match="open it again"):
                await call
        threads.close()

    run(scenario())


class TwoHostsModel(VolumeModel):
    """Groups of volumes on different hosts take the way of freeze and swap."""

    async def open_catalogue(self) -> Catalogue:
        catalogue, self.threads = await with_two_hosts(self.store)
        return catalogue

    def abandon(self) -> None:
        self.threads.close()
        super().abandon()

    def teardown(self) -> None:
        super().teardown()
        self.threads.close()


@pytest.mark.timeout(300)
def test_random_operations_over_two_hosts_match_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_module, "INLINE_WRITE", 2 * BLOCK)
    monkeypatch.setattr(volume_module, "SYNC_FROM", 8)
    run_state_machine_as_test(
        TwoHostsModel,
        settings=settings(
            max_examples=50,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_opening_a_volume_takes_no_space_but_a_snapshot_readies_its_next_head(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        store = LocalLayerStore(tmp_path)
        catalogue = await Catalogue.open(store)
        await catalogue.create_volume("v", 2 << 40)
        handle: Any = await catalogue.open_volume("v", lambda: None)
        for offset in (0, 1 << 40):
            await handle.write(offset, b"\7" * BLOCK)
        await catalogue.create_snapshots([("v", "s")])
        head = tmp_path / "layers" / handle.view.head.layer.name
        # Where the volume has data: its writes have no file to make, and no room to wait for.
        assert sorted(path.name for path in head.glob("data-*")) == ["data-00000", "data-00001"]
        assert await store.allocated(head.name) >= 1 << 20
        await catalogue.close_export(handle)

        made = await catalogue.clone_volume("c", "v", "s")
        handle = await catalogue.open_volume("c", lambda: None)
        buffer = bytearray(BLOCK)
        await handle.read(1 << 40, memoryview(buffer))
        assert buffer == b"\7" * BLOCK
        clone = tmp_path / "layers" / handle.view.head.layer.name
        assert list(clone.glob("data-*")) == []
        await catalogue.close_export(handle)
        assert (await catalogue.show_volume("c")).own == made.own
        await catalogue.close()

    run(scenario())
