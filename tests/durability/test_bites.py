"""The simulation bites: each bug that is put in here is found.

Most take some hundred states. The rarest, a merge that punches early, may take 8,000: power must
fail between two calls, and leave the one and not the other. (How many it is depends on the order of
sets, which is another in each process.) Those that take long are for `make torture`.
"""

import os
import zlib

import pytest

from backends import local_data, local_layers
from snapshots import head, manifest_store, merge, punching, recent, volume, wiping
from snapshots.extent_log import SECTOR, encode_extents

from .simulation import Finding, Tally, simulate

SEED = "c"
MOST = 40_000  # states until a bug must be found

BUGS = []


def bug(function):
    """A function that puts a bug in."""
    BUGS.append(pytest.param(function, id=function.__name__))
    return function


def rare_bug(function):
    """One that takes thousands of states, and minutes, to be found."""
    return bug(function) if os.environ.get("NBDSERVE_BITES") == "all" else function


async def nothing(*args):
    pass


@bug
def the_journal_is_synced_before_the_data(patch):
    def persist(self, runs):
        extents = head.flatten(runs)
        begun = self._begun
        if extents:
            sectors = b"".join(encode_extents(self.layer.name, extents, self._sequence))
            self._journal.append(sectors)
            self._journal.sync()
            self._sequence += len(sectors) // SECTOR
            self._end += len(sectors)
        self.data.sync()
        self.synced = begun
        self._captured = 0
        self.extend(ample=True)
        return extents

    patch.setattr(head.Head, "persist", persist)


@bug
def the_journal_is_not_synced(patch):
    patch.setattr(local_layers.LocalLogFile, "sync", lambda self: None)


@bug
def the_data_is_not_synced(patch):
    patch.setattr(local_data.LocalDataFile, "sync", lambda self: None)


@bug
def no_directory_is_synced(patch):
    patch.setattr(local_layers, "_sync_directory", nothing)


@bug
def the_directory_of_a_record_is_not_synced(patch):
    async def commit(self):
        await local_layers.aiofiles.os.replace(self._temporary, self._path)

    patch.setattr(local_layers.LocalStagedRecord, "commit", commit)


@bug
def the_directory_of_layers_is_not_synced(patch):
    real = local_layers._sync_directory

    async def sync(path):
        if path.name != "layers":
            await real(path)

    patch.setattr(local_layers, "_sync_directory", sync)


@bug
def the_directory_of_a_new_data_file_is_not_synced(patch):
    patch.setattr(local_data, "_sync_directory", lambda path: None)


@bug
def what_is_renamed_was_not_synced(patch):
    async def stage(path, content):
        temporary = path.with_name(f".new-{path.name}")
        async with local_layers.aiofiles.open(temporary, "xb") as file:
            await file.write(content)
        return local_layers.LocalStagedRecord(temporary, path)

    patch.setattr(local_layers, "_stage", stage)


@bug
def a_flush_does_not_wait_for_the_commit_of_a_snapshot(patch):
    patch.setattr(volume.Volume, "commit_begins", lambda self: None)


@bug
def a_sealed_head_is_not_made_durable(patch):
    async def finish(self, old, runs):
        await old.idle()
        self._sealing.remove(old)

    patch.setattr(volume.Volume, "finish_seal", finish)


@bug
def a_hole_is_punched_where_blocks_were_written_again(patch):
    patch.setattr(punching, "gaps", lambda owners, first, last: [(first, last)])


@bug
def what_a_head_hides_is_punched_below_a_snapshot(patch):
    def own_layer(self, manifest):
        return manifest.parents[manifest.head] or None

    patch.setattr(manifest_store.ManifestStore, "own_layer", own_layer)


@bug
def what_is_answered_is_not_noted(patch):
    patch.setattr(head.Head, "note", lambda self: None)


@rare_bug
def what_ends_late_in_a_sealed_head_is_not_noted(patch):
    patch.setattr(head.Head, "note_late", lambda self: None)


@bug
def what_comes_behind_the_gate_does_not_follow(patch):
    patch.setattr(recent.Recent, "follow", lambda self, layer: None)


@bug
def a_generation_without_records_takes_its_turn(patch):
    def turn(self):
        self._generation += 1
        self._position = 0
        self._begin()

    patch.setattr(recent.Recent, "turn", turn)


@bug
def a_recent_file_is_believed_after_a_power_cut(patch):
    patch.setattr(recent, "_seed", lambda layer, run: zlib.crc32(layer.encode()))


@rare_bug
def a_merge_punches_before_its_log_is_synced(patch):
    real = merge._copy

    def copy(source, target, log, logged, runs):
        real(source, target, log, logged, runs)
        merge._punch(source, target, runs)

    patch.setattr(merge, "_copy", copy)


@rare_bug
def a_merge_logs_before_its_data_is_synced(patch):
    def copy(source, target, log, logged, runs):
        with patch.context() as inner:
            inner.setattr(target.data, "sync", lambda: None)
            real(source, target, log, logged, runs)

    real = merge._copy
    patch.setattr(merge, "_copy", copy)


@rare_bug
def a_group_is_committed_one_by_one(patch):
    async def finish(self, staged):
        if len(staged.manifests) == 1:
            await real(self, staged)
            return
        await staged.record.discard()
        for manifest in staged.manifests:
            await self.commit([manifest])

    real = manifest_store.ManifestStore.finish
    patch.setattr(manifest_store.ManifestStore, "finish", finish)


@bug
def a_layer_is_deleted_before_the_manifest_is_committed(patch):
    async def commit(self, manifests):
        staged = await self.stage(manifests)
        kept = {layer for new in manifests for layer in new.parents}
        for new in manifests:
            old = self.volumes.get(new.id)
            for layer in set(old.parents if old else ()) - kept:
                if not [user for user in self.uses(layer) if user is not old]:
                    await self._store.delete_layer(layer)
        await self.finish(staged)

    patch.setattr(manifest_store.ManifestStore, "commit", commit)


@rare_bug
def a_volume_is_wiped_before_it_is_removed(patch):
    async def remove(self, manifest, *, wipe=False):
        if wipe:
            data = await self._store.open_data(manifest.head, writable=True)
            wiping._overwrite(data, data.allocated_ranges(0, manifest.size, 1000))
            data.close()
        await real(self, manifest, wipe=wipe)

    real = manifest_store.ManifestStore.remove
    patch.setattr(manifest_store.ManifestStore, "remove", remove)


@bug
def what_a_killed_process_wrote_is_not_synced(patch):
    def settle(self):
        self._journal.sync()
        self.extend()

    patch.setattr(head.Head, "settle", settle)


@bug
def what_a_killed_process_renamed_is_not_synced(patch):
    patch.setattr(local_layers.LocalLayerStore, "_settle_names", nothing)


@rare_bug
def files_that_a_killed_process_made_are_not_synced(patch):
    def init(self, directory, *, writable):
        real(self, directory, writable=writable)
        self._entries_made = False

    real = local_data.LocalDataFile.__init__
    patch.setattr(local_data.LocalDataFile, "__init__", init)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", BUGS)
def test_bug(bug, monkeypatch):
    bug(monkeypatch)
    tally = Tally()
    with pytest.raises(Finding):
        simulate(SEED, MOST, tally)
