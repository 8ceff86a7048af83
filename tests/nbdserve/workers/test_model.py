"""The model of tests/snapshots, over two real worker processes and real files.

Every request of a client goes over a socket that a worker was given. A kill ends the workers, and
with them the daemon's side; or one worker alone, and the catalogue goes on.
"""

import asyncio
import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import rule, run_state_machine_as_test

from backends.errors import StorageError
from tests.nbdserve.workers.remote import RemoteHandle, open_over_workers
from tests.snapshots.stores import until
from tests.snapshots.test_model import TIMES, VolumeModel, fractions, snapshots, volumes

counted: list[str] = []


class WorkersModel(VolumeModel):
    def new_store(self):
        self.directory = tempfile.TemporaryDirectory()

    async def open_catalogue(self):
        return await open_over_workers(Path(self.directory.name) / "data", log_level="error")

    def teardown(self):
        super().teardown()
        self.directory.cleanup()

    async def open_handle(self, name, snapshot=None):
        if snapshot is None:
            lease = await self.catalogue.open_volume(name, lambda: None)
        else:
            lease = await self.catalogue.open_snapshot(name, snapshot, lambda: None)
        return await RemoteHandle.begin(lease)

    async def end_handle(self, handle):
        await handle.end(self.catalogue)

    async def extents(self, handle):
        return await handle.list_extents()

    def check_own_layer(self, name, handle):
        """What is in which layer's file is for the other models to see."""
        self.run(self.catalogue._freeing.free(self.catalogue._manifests.get(name).id))

    def abandon(self):
        """The daemon ends with its workers, or so soon after them that nobody notices."""
        for host in self.catalogue._views.hosts:
            host.closing = True
            process = host._process.child._process
            process.kill()
            process.wait()
        self.catalogue._views.threads.close()
        self.catalogue._store._lock.release()
        self.runner.close()
        counted.append("abandoned")

    @rule(
        which=st.integers(0, 1),
        snapshot=snapshots,
        names=st.sets(volumes, min_size=1),
        taken=st.booleans(),
        steps=st.integers(0, 40),
        where=fractions,
    )
    def kill_one_worker(self, which, snapshot, names, taken, steps, where):
        """In the middle of a snapshot or not; volumes of the other worker notice nothing."""
        host = self.catalogue._views.hosts[which]
        targets = [
            (name, snapshot)
            for name in sorted(names)
            if name in self.model and snapshot not in self.model[name].snapshots
        ]

        def served():
            views = self.catalogue._views
            ids = {view.volume for view in views._open.values() if view.host is host}
            found = self.catalogue._manifests
            return {name for name in self.model if found.get(name).id in ids}

        async def scene():
            work = asyncio.ensure_future(
                self.catalogue.create_snapshots(targets) if taken and targets else asyncio.sleep(0)
            )
            for _ in range(steps):
                await asyncio.sleep(0.0002)
            lost = served()
            pid = host.pid
            os.kill(pid, 9)
            await until(lambda: host.pid not in (None, pid) and host.available)
            try:
                await work
            except StorageError:
                return lost, False
            return lost, taken and bool(targets)

        host._pause = 0.0
        lost, done = self.run(scene())
        for name, _ in targets if taken else []:
            there = {found.name for found in self.catalogue.list_snapshots(name)}
            assert (snapshot in there) == done
            if done:
                modelled = self.model[name]
                modelled.snapshots[snapshot] = bytes(modelled.content)
                modelled.durable()
        for name in lost:
            modelled = self.model[name]
            if modelled.handle is not None:
                self.run(modelled.handle.end(self.catalogue))
                modelled.handle = None
            self.adopt(name, modelled)
        counted.append("snapshot" if done else "lost" if lost else "idle")


@pytest.mark.timeout(600 * TIMES)
def test_random_operations_over_two_workers_match_the_model():
    run_state_machine_as_test(
        WorkersModel,
        settings=settings(
            max_examples=4 * TIMES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert {"lost", "snapshot", "abandoned"} & set(counted), "no worker was ever killed"
