"""The model of test_model.py with volumes that are restored lazily, from a store that fails.

Hydration runs, or stands still, under every operation; kills come in the middle of it. In the end
every volume is made whole.
"""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from backends.errors import UnavailableError
from snapshots import lazy_data
from snapshots import volume as volume_module
from snapshots.catalogue import Catalogue
from snapshots.handle import Handle
from snapshots.repository import hydrating
from snapshots.repository.local_fetcher import LocalFetcher
from tests.snapshots.lazy_parts import BLOCK, URL, make_content, make_repository, push
from tests.snapshots.stores import until
from tests.snapshots.test_model import MAX_BLOCKS, Modelled, VolumeModel, volumes

counted: list[str] = []


class LazyModel(VolumeModel):
    def new_store(self) -> Any:
        self.objects, self.repository = make_repository()
        self.choice = random.Random(3)
        self.trouble = 0.0
        self.objects.rig = self.spoil
        return super().new_store()

    def spoil(self, key: str, offset: int, data: bytes) -> bytes:
        if self.choice.random() < self.trouble:
            if self.choice.random() < 0.5:
                raise UnavailableError("forced: the connection broke")
            return data[: self.choice.randrange(len(data))]
        return data

    async def open_catalogue(self) -> Catalogue:
        self.fetcher = LocalFetcher(self.store, lambda: 1 << 40, lambda url: self.repository)
        catalogue = await Catalogue.open(self.store, fetcher=self.fetcher)
        catalogue.hydrate()
        return catalogue

    def check_own_layer(self, name: str, handle: Handle) -> None:
        manifests = self.catalogue._manifests
        if manifests.own_layer(manifests.get(name)) not in self.catalogue._hydration._names:
            super().check_own_layer(name, handle)

    def abandon(self) -> None:
        for fetching in self.fetcher._layers.values():
            if fetching.hydrator is not None:
                fetching.hydrator._filling.sync = lambda: []  # type: ignore[method-assign]
                fetching.hydrator.stop()
        counted.append("abandoned" if self.fetcher._layers else "idle")
        super().abandon()

    def teardown(self) -> None:
        self.trouble = 0.0
        for name in sorted(self.model):
            self.make_whole(name)
            self.check_volume(name)
        super().teardown()

    @initialize(seed=st.integers(0, 1 << 16), clone=st.sampled_from([None, "b"]))
    def first_volume(self, seed: int, clone: str | None) -> None:
        self.restore("a", MAX_BLOCKS, seed, 0, clone)

    @rule(
        name=volumes,
        blocks=st.integers(1, MAX_BLOCKS),
        seed=st.integers(0, 1 << 16),
        rate=st.sampled_from([0, 0, None]),
        clone=st.one_of(st.none(), volumes),
    )
    def restore(
        self, name: str, blocks: int, seed: int, rate: int | None, clone: str | None
    ) -> None:
        """And maybe clone it at once: two volumes on one lazy layer."""
        if name in self.model:
            return
        self.names += 1
        content = make_content(blocks * BLOCK, seed)
        # The store is as it should be while a snapshot is looked up.
        trouble, self.trouble = self.trouble, 0.0
        push(self.repository, content, snapshot=f"s{self.names}")
        self.run(self.catalogue.restore_lazily(name, URL, "web", f"s{self.names}", rate))
        self.trouble = trouble
        self.model[name] = Modelled(content)
        counted.append("restored")
        if clone is not None and clone not in self.model:
            self.snapshot({name}, "s0")
            self.clone(clone, name, "s0", 1)
            counted.append("cloned")

    @rule(trouble=st.sampled_from([0.0, 0.2, 0.5]))
    def worsen(self, trouble: float) -> None:
        self.trouble = trouble

    @rule(name=volumes, rate=st.sampled_from([None, 0, 1 << 20]))
    def hydrate(self, name: str, rate: int | None) -> None:
        if name in self.model:
            self.run(self.catalogue.set_hydration_rate(name, rate))

    @rule(name=volumes)
    def make_whole(self, name: str) -> None:
        if name in self.model and self.catalogue.hydration(name) is not None:
            self.hydrate(name, None)
            self.run(until(lambda: self.catalogue.hydration(name) is None))
            counted.append("whole")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits and short pauses."""
    monkeypatch.setattr(volume_module, "INLINE_WRITE", 2 * BLOCK)
    monkeypatch.setattr(volume_module, "SYNC_FROM", 8)
    monkeypatch.setattr(hydrating, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(hydrating, "_LONGEST_PAUSE", 0.005)
    monkeypatch.setattr(hydrating, "_LOOK_SECONDS", 0.002)
    monkeypatch.setattr(hydrating, "SYNC_SECONDS", 0.003)
    monkeypatch.setattr(hydrating, "PASS_SECONDS", 0.002)
    # Few neighbours, or the first read of these small volumes would bring all of them.
    monkeypatch.setattr(hydrating, "AHEAD", BLOCK)
    monkeypatch.setattr(hydrating, "MAX_AHEAD", 2 * BLOCK)
    monkeypatch.setattr(lazy_data, "_TICK", 0.002)
    monkeypatch.setattr(lazy_data, "ASK_AGAIN", 0.004)


@pytest.mark.timeout(600)
def test_random_operations_on_lazy_volumes_match_the_model() -> None:
    run_state_machine_as_test(
        LazyModel,
        settings=settings(
            max_examples=50,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert {"restored", "whole"} <= set(counted)


@pytest.mark.parametrize("steps", [0, 7, 60])
def test_a_kill_with_two_volumes_on_one_lazy_layer_matches_the_model(steps: int) -> None:
    """What random operations do only if they happen to."""
    model = LazyModel()
    try:
        model.restore("a", MAX_BLOCKS, 5, 0, "b")
        before = len(counted)
        model.kill("snapshot", "a", "s1", steps)
        assert "abandoned" in counted[before:]
        model.check_volume("b")
    finally:
        model.teardown()
