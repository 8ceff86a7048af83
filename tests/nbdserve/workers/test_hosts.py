"""Volumes on two real worker processes: where they go, and what the end of one leaves."""

import asyncio
import errno
import os
import signal
import subprocess
import sys

import pytest

from backends.errors import InUseError, UnavailableError
from nbdserve.workers.host import WorkerHost
from snapshots import sealing
from snapshots.contexts import ALLOCATION_DEPTH
from snapshots.host import Cell, HostLostError
from tests.nbdserve.workers.remote import ALLOCATION, RemoteHandle, open_over_workers
from tests.snapshots.stores import until

MIB = 1 << 20
BLOCK = 4096


def run(tmp_path, scene):
    """Run ``scene(catalogue)`` over two workers and volumes a and b of 1 MiB."""

    async def main():
        catalogue = await open_over_workers(tmp_path / "data")
        try:
            async with asyncio.timeout(60):
                for name in ("a", "b"):
                    await catalogue.create_volume(name, MIB)
                await scene(catalogue)
        finally:
            await catalogue.close()
        assert not list((tmp_path / "data" / "volumes").glob(".*")), "a staged record was left"

    asyncio.run(main())
    check_layers(tmp_path)


def check_layers(tmp_path):
    """Nothing but the layers of the volumes is left, and no process."""

    async def check():
        catalogue = await open_over_workers(tmp_path / "data", count=1)
        live = catalogue._manifests.live_layers()
        await catalogue.close()
        return live

    before = {path.name for path in (tmp_path / "data" / "layers").iterdir()}
    assert before == asyncio.run(check())


async def open_lease(catalogue, name, revoke=lambda: None, contexts=()):
    volume, _, snapshot = name.partition("@")
    if snapshot:
        return await catalogue.open_snapshot(volume, snapshot, revoke, contexts)
    return await catalogue.open_volume(volume, revoke, contexts)


async def connect(catalogue, name, revoke=lambda: None, contexts=ALLOCATION):
    lease = await open_lease(catalogue, name, revoke, contexts)
    return await RemoteHandle.begin(lease, contexts)


async def read(catalogue, name):
    handle = await connect(catalogue, name)
    buffer = bytearray(handle.size)
    await handle.read(0, memoryview(buffer))
    await handle.end(catalogue)
    return bytes(buffer)


def host_of(catalogue, name):
    return catalogue._views.get(catalogue._manifests.get(name).id).host


async def kill(host, number=signal.SIGKILL):
    pid = host.pid
    os.kill(pid, number)
    if number == signal.SIGKILL:
        await until(lambda: host.pid not in (None, pid))


def test_a_volume_and_its_snapshots_are_in_one_worker(tmp_path):
    async def scene(catalogue):
        await catalogue.create_snapshots([("a", "one")])
        handles = [await connect(catalogue, name) for name in ("a", "b", "a@one")]
        assert [info.volumes for info in catalogue.list_workers()] == [1, 1]
        pids = {info.pid for info in catalogue.list_workers()}
        assert len(pids) == 2
        assert os.getpid() not in pids
        for handle in handles:
            await handle.write(0, b"x" * BLOCK) if not handle.lease.read_only else None
            await handle.end(catalogue)
        assert [info.volumes for info in catalogue.list_workers()] == [0, 0]
        assert (await read(catalogue, "a"))[:BLOCK] == b"x" * BLOCK
        assert not any(await read(catalogue, "a@one"))

    run(tmp_path, scene)


def test_contexts_are_answered_by_the_worker_from_views_beside_the_client_s(tmp_path):
    contexts = (*ALLOCATION, ALLOCATION_DEPTH, "qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two")

    async def scene(catalogue):
        volume = await connect(catalogue, "a")
        await volume.write(0, b"1" * 2 * BLOCK)
        await catalogue.create_snapshots([("a", "one")])
        await volume.write(BLOCK, b"2" * 2 * BLOCK)
        await catalogue.create_snapshots([("a", "two")])
        handle = await connect(catalogue, "a", contexts=contexts)
        await volume.write(5 * BLOCK, b"3" * BLOCK)
        rest = MIB - 6 * BLOCK
        assert list((await handle.list_statuses()).values()) == [
            [(3 * BLOCK, 0), (2 * BLOCK, 3), (BLOCK, 0), (rest, 3)],
            [(BLOCK, 3), (2 * BLOCK, 2), (2 * BLOCK, 0), (BLOCK, 1), (rest, 0)],
            [(BLOCK, 0), (2 * BLOCK, 1), (2 * BLOCK, 0), (BLOCK, 1), (rest, 0)],
            [(5 * BLOCK, 0), (BLOCK, 1), (rest, 0)],
        ]
        snapshot = await connect(catalogue, "a@one", contexts=contexts[2:])
        rest = MIB - 3 * BLOCK
        assert list((await snapshot.list_statuses()).values()) == [
            [(MIB, 0)],
            [(BLOCK, 0), (2 * BLOCK, 1), (rest, 0)],
        ]
        assert sorted(info.volumes for info in catalogue.list_workers()) == [0, 1]
        for each in (volume, handle, snapshot):
            await each.end(catalogue)
        assert not catalogue._views._open

    run(tmp_path, scene)


def test_a_context_fails_when_its_snapshot_is_deleted_before_or_behind_the_hand_over(tmp_path):
    contexts = ("qemu:dirty-bitmap:one",)

    async def scene(catalogue):
        await catalogue.create_snapshots([("a", "one")])
        early = await connect(catalogue, "a", contexts=contexts)
        lease = await open_lease(catalogue, "a", contexts=contexts)
        assert await early.list_statuses() == {contexts[0]: [(MIB, 0)]}
        await catalogue.delete_snapshot("a", "one")
        late = await RemoteHandle.begin(lease, contexts)
        for handle in (early, late):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                await handle.list_statuses()
            await handle.write(0, b"x" * BLOCK)  # the rest goes on
        await catalogue.create_snapshots([("a", "one")])
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            await early.list_statuses()
        for handle in (early, late):
            await handle.end(catalogue)

    run(tmp_path, scene)


def test_views_that_are_compared_with_are_gone_with_their_worker(tmp_path):
    contexts = ("qemu:dirty-bitmap:one",)

    async def scene(catalogue):
        await catalogue.create_snapshots([("a", "one")])
        handle = await connect(catalogue, "a", contexts=contexts)
        await kill(host_of(catalogue, "a"))
        with pytest.raises(ConnectionError):
            await handle.list_statuses()
        await handle.serving.transmit()
        await catalogue.close_export(handle.lease)
        assert not catalogue._views._open
        handle = await connect(catalogue, "a", contexts=contexts)
        assert await handle.list_statuses() == {contexts[0]: [(MIB, 0)]}
        await handle.end(catalogue)

    run(tmp_path, scene)


def test_a_worker_that_is_killed_again_and_again_comes_later_each_time(tmp_path):
    async def scene(catalogue):
        host = catalogue._views.hosts[0]
        pauses = []
        for _ in range(4):
            pauses.append(host._pause)
            pid = host.pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: host.pid != pid)
            if pauses[-1]:
                host._restart.cancel()
                host._start_again()
            await until(lambda: host.pid is not None)
        assert pauses == [0, 1, 2, 4]
        host._pause = 1000.0
        host._plan_restart()
        host._restart.cancel()
        assert host._pause == 60

    run(tmp_path, scene)


def test_calls_and_connections_of_a_lost_worker_end(tmp_path):
    async def scene(catalogue):
        revoked = []
        handle = await connect(catalogue, "a", lambda: revoked.append(1))
        kept = await connect(catalogue, "b")
        await handle.write(0, b"f" * BLOCK)
        await handle.flush()
        host = host_of(catalogue, "a")
        key = catalogue._manifests.get("a").id
        pid = host.pid
        os.kill(pid, signal.SIGSTOP)
        waiting = [asyncio.ensure_future(host.flush(key)) for _ in range(3)]
        writing = asyncio.ensure_future(handle.write(0, b"g" * BLOCK))
        await asyncio.sleep(0.05)
        assert not any(call.done() for call in waiting)
        await kill(host)
        for call in waiting:
            with pytest.raises(HostLostError, match=f"worker process {pid} has ended"):
                await call
        with pytest.raises(ConnectionError):
            await writing
        await handle.serving.transmit()
        await handle.serving.linger()
        assert catalogue.list_snapshots() == []
        assert (await catalogue.show_volume("a")).clients == 0
        # A new client before the old one's lease is back: it is another view.
        again = await connect(catalogue, "a")
        await handle.end(catalogue)
        assert (await catalogue.show_volume("a")).clients == 1
        await again.end(catalogue)
        assert (await read(catalogue, "a"))[:BLOCK] in (b"f" * BLOCK, b"g" * BLOCK)
        await kept.write(0, b"k" * BLOCK)
        await kept.end(catalogue)
        assert (await read(catalogue, "b"))[:BLOCK] == b"k" * BLOCK
        assert not revoked

    run(tmp_path, scene)


def test_a_lease_of_a_worker_that_ended_before_the_client_came(tmp_path):
    async def scene(catalogue):
        lease = await catalogue.open_volume("a", lambda: None)
        await kill(host_of(catalogue, "a"))
        handle = await RemoteHandle.begin(lease)
        with pytest.raises(ConnectionError):
            await handle.flush()
        await handle.end(catalogue)

    run(tmp_path, scene)


def test_no_worker_is_left(tmp_path):
    async def scene(catalogue):
        for host in catalogue._views.hosts:
            host._pause = 100.0
            os.kill(host.pid, signal.SIGKILL)
            await until(lambda host=host: host.pid is None)
        with pytest.raises(UnavailableError, match="have all ended"):
            await catalogue.open_volume("a", lambda: None)
        assert [info.pid for info in catalogue.list_workers()] == [None, None]
        for host in catalogue._views.hosts:
            host._restart.cancel()
            host._start_again()
        assert not any(await read(catalogue, "a"))

    run(tmp_path, scene)


def test_a_failed_volume_stays_failed_when_its_worker_is_gone(tmp_path):
    async def scene(catalogue):
        handle = await connect(catalogue, "a")
        host = host_of(catalogue, "a")
        await host.fail(catalogue._manifests.get("a").id, "a sync failed: Input/output error")
        with pytest.raises(OSError) as caught:
            await handle.write(0, b"x" * BLOCK)
        assert caught.value.errno == errno.EIO
        await kill(host)
        await handle.end(catalogue)
        again = await connect(catalogue, "a")
        with pytest.raises(OSError):
            await again.write(0, b"x" * BLOCK)
        await again.end(catalogue)

    run(tmp_path, scene)


STEPS = ("add_head", "settle", "freeze", "swap_heads", "finish_seal", "end_commit")


@pytest.mark.parametrize("victim", ["a", "b"])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_worker_ends_at_any_step_of_a_group_snapshot(tmp_path, monkeypatch, step, behind, victim):
    async def scene(catalogue):
        handles = {name: await connect(catalogue, name) for name in ("a", "b")}
        for name, handle in handles.items():
            await handle.write(0, name.encode() * BLOCK)
            await handle.flush()
        target = host_of(catalogue, victim)
        original = getattr(WorkerHost, step)
        done = []

        async def deadly(self, *arguments):
            if self is not target or done:
                return await original(self, *arguments)
            done.append(1)
            if behind:
                await original(self, *arguments)
                os.kill(self.pid, signal.SIGKILL)
                return None
            os.kill(self.pid, signal.SIGKILL)
            return await original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(WorkerHost, step, deadly)
            taken = True
            try:
                await catalogue.create_snapshots([("a", "s"), ("b", "s")])
            except UnavailableError as error:
                taken = False
                assert "\n" not in str(error)
        assert done
        await until(lambda: target.pid is not None and target.available)
        assert len(catalogue.list_snapshots()) == (2 if taken else 0)
        if step == "end_commit":
            assert taken
        elif not behind:
            assert not taken
        # The other one goes on: writes, flushes, snapshots.
        other = "b" if victim == "a" else "a"
        async with asyncio.timeout(10):
            await handles[other].write(BLOCK, b"+" * BLOCK)
            await handles[other].flush()
            await handles[victim].end(catalogue)
            handles[victim] = await connect(catalogue, victim)
            await handles[victim].write(BLOCK, b"+" * BLOCK)
            await handles[victim].flush()
            await catalogue.create_snapshots([("a", "t"), ("b", "t")])
        for name, handle in handles.items():
            await handle.end(catalogue)
            expected = name.encode() * BLOCK + b"+" * BLOCK
            assert (await read(catalogue, name))[: 2 * BLOCK] == expected
            assert (await read(catalogue, f"{name}@t"))[: 2 * BLOCK] == expected
            if taken:
                assert (await read(catalogue, f"{name}@s"))[: 2 * BLOCK] == (
                    name.encode() * BLOCK + bytes(BLOCK)
                )

    run(tmp_path, scene)


@pytest.mark.parametrize("step", ["freeze", "swap_heads"])
def test_a_worker_that_stands_still_at_the_gate_releases_the_others(tmp_path, monkeypatch, step):
    monkeypatch.setattr(sealing, "_FREEZE_SECONDS", 0.3)
    monkeypatch.setattr(sealing, "_SWAP_SECONDS", 0.3)

    async def scene(catalogue):
        handles = {name: await connect(catalogue, name) for name in ("a", "b")}
        target = host_of(catalogue, "a")
        pid = target.pid
        original = getattr(WorkerHost, step)

        stopped = asyncio.Event()

        async def still(self, *arguments):
            if self is target:
                os.kill(self.pid, signal.SIGSTOP)
                stopped.set()
            return await original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(WorkerHost, step, still)
            with pytest.raises(UnavailableError, match="no snapshot was taken"):
                async with asyncio.timeout(20):
                    snapshot = asyncio.ensure_future(
                        catalogue.create_snapshots([("a", "s"), ("b", "s")])
                    )
                    if step == "freeze":
                        await stopped.wait()
                        async with asyncio.timeout(10):
                            # Frozen or not yet, reads go on; writes do once it is given up.
                            await handles["b"].read(0, memoryview(bytearray(BLOCK)))
                            await handles["b"].write(0, b"b" * BLOCK)
                        os.kill(pid, signal.SIGCONT)
                    await snapshot
        async with asyncio.timeout(10):
            await handles["b"].write(0, b"b" * BLOCK)
            await handles["b"].flush()
            if step == "freeze":
                assert target.pid == pid
                await handles["a"].write(0, b"a" * BLOCK)
                await handles["a"].flush()
            else:
                await until(lambda: target.pid not in (pid, None))
        for handle in handles.values():
            await handle.end(catalogue)
        await catalogue.create_snapshots([("a", "s"), ("b", "s")])
        assert (await read(catalogue, "b@s"))[:BLOCK] == b"b" * BLOCK

    run(tmp_path, scene)


def test_a_forced_rollback_reaches_clients_of_a_worker(tmp_path):
    async def scene(catalogue):
        await catalogue.create_snapshots([("a", "s")])
        revoked = asyncio.Event()
        handle = await connect(catalogue, "a", revoked.set)
        await handle.write(0, b"x" * BLOCK)
        await handle.flush()
        with pytest.raises(InUseError):
            await catalogue.rollback("a", "s")
        rollback = asyncio.ensure_future(catalogue.rollback("a", "s", force=True))
        await revoked.wait()
        handle.serving.abort()
        await handle.end(catalogue)
        await rollback
        assert not any(await read(catalogue, "a"))

    run(tmp_path, scene)


def test_merges_and_growth_reach_views_of_a_worker(tmp_path):
    async def scene(catalogue):
        handle = await connect(catalogue, "a")
        for number in range(5):
            await handle.write(number * BLOCK, bytes([number + 1]) * (3 * BLOCK))
            await catalogue.create_snapshots([("a", f"s{number}")])
        last = await connect(catalogue, "a@s4")
        await handle.trim(0, BLOCK)
        await catalogue.resize_volume("a", 2 * MIB)
        for number in range(4):
            await catalogue.delete_snapshot("a", f"s{number}")
        expected = b"".join(bytes([number]) * BLOCK for number in (1, 2, 3, 4, 5, 5, 5))
        for each, content in ((last, expected), (handle, bytes(BLOCK) + expected[BLOCK:])):
            buffer = bytearray(MIB)
            await each.read(0, memoryview(buffer))
            assert buffer == content.ljust(MIB, b"\0")
        extents = (await catalogue.diff("a", "s4")).extents
        assert [(extent.offset, extent.length, extent.zero) for extent in extents] == [
            (0, BLOCK, True)
        ]
        assert (await catalogue.show_volume("a")).layers == 2
        await last.end(catalogue)
        await handle.end(catalogue)
        again = await connect(catalogue, "a")
        await again.write(2 * MIB - BLOCK, b"z" * BLOCK)
        await again.end(catalogue)
        assert len(await read(catalogue, "a")) == 2 * MIB

    run(tmp_path, scene)


def test_a_worker_imports_no_more_than_it_needs():
    program = "import nbdserve.workers.__main__, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.decode().split()}
    assert "snapshots" in loaded
    assert not loaded & {"aiohttp", "boto3", "botocore", "click", "lz4"}


def test_a_map_is_counted_where_the_volume_is_open(tmp_path):
    async def scene(catalogue):
        handle = await connect(catalogue, "a")
        await handle.write(0, b"x" * 2 * BLOCK)
        await catalogue.create_snapshots([("a", "one")], {"backup": "r"})
        await handle.write(BLOCK, b"y" * BLOCK)
        found = await catalogue.map_volume("a", 256, "backup")
        assert [layer.mapped for layer in found.layers] == [BLOCK, BLOCK]
        assert found.filled == (Cell(0, 1, 0, 1, 0), Cell(1, 1, 1, 1, 1))
        assert found.changed == BLOCK
        mapping = asyncio.ensure_future(catalogue.map_volume("a", 1, "backup"))
        await asyncio.sleep(0)
        worker = next(info for info in catalogue.list_workers() if info.volumes)
        os.kill(worker.pid, signal.SIGKILL)
        # What was not flushed is lost with the worker; what a snapshot has is not.
        assert (await mapping).layers[0].mapped >= BLOCK
        await handle.end(catalogue)

    run(tmp_path, scene)
