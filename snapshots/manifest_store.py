"""All manifests of a data directory, in memory and on disk.

A commit of one manifest replaces one record. A commit of several writes them into a transaction's
record first: that is the commit; then each record is replaced and the transaction removed. What
a crash leaves of that is replayed when the store is loaded.

Reference counts are nowhere stored: a layer lives when a manifest lists it. A commit after which
no manifest lists a layer any more first **condemns** it in a deletion's record: only such layers
are ever deleted. A layer that nothing lists and nothing condemned may be somebody's only copy,
whose manifest was lost.

**In doubt.** When a commit fails after its record may have been replaced (the sync of a directory
failed, say), nobody knows which of two manifests the next start will find. Then nothing more is
committed and no layer is removed until it has found one. Clients' reads and writes go on.

**Unreadable** volumes are those whose manifest is damaged, or the record of a merge that moves
their blocks. They are refused, one by one; all others are served. As nobody knows which layers are
theirs, no layer is deleted, merged or set aside until every record can be read at a start. Only a
damaged transaction stops everything: any volume might have to be replaced by what it holds.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Set
from dataclasses import dataclass

from backends.errors import (
    CorruptError,
    NoSpaceError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from backends.layers import LayerStore, StagedRecord
from snapshots.extent_log import MERGE, SECTOR, encode_header
from snapshots.manifest import (
    Manifest,
    Merge,
    pack_deletion,
    pack_transaction,
    salvage_name,
    unpack_deletion,
    unpack_manifest,
    unpack_merge,
    unpack_transaction,
)
from snapshots.reserve import with_reserve

_log = logging.getLogger(__name__)

_VOLUMES = "volumes"
_TRANSACTIONS = "transactions"
_MERGES = "merges"
_DELETIONS = "deletions"


@dataclass(frozen=True)
class StagedCommit:
    """Manifests that are written, and count once ``ManifestStore.finish`` has been called."""

    manifests: tuple[Manifest, ...]
    record: StagedRecord
    kind: str
    name: str
    content: bytes


@dataclass(frozen=True)
class UnreadableVolume:
    """A volume that cannot be served; ``problem`` names the file and what is wrong with it.

    ``name`` may come from a damaged record: it is for messages only. None when it is not known.
    """

    id: str
    name: str | None
    problem: str


class ManifestStore:
    """``volumes`` by id and ``merges`` under way by their target layer; both read-only outside.

    ``unreadable`` volumes, by id, are not among ``volumes``.
    """

    def __init__(self, store: LayerStore) -> None:
        self._store = store
        self.volumes: dict[str, Manifest] = {}
        self.merges: dict[str, Merge] = {}
        self.condemned: dict[str, frozenset[str]] = {}
        # The volumes whose layers are overwritten before they are deleted, by the records' names.
        self.wipes: dict[str, str] = {}
        self.provisional: set[str] = set()
        self.in_doubt: str | None = None
        self.unreadable: dict[str, UnreadableVolume] = {}
        self._names: dict[str, str] = {}

    async def load(self) -> None:
        """Read everything, finish what a crash left half done; CorruptError (see above)."""
        store = self._store
        for name in await store.list_records(_VOLUMES):
            await self._load_volume(name)
        for name in await store.list_records(_TRANSACTIONS):
            where = store.describe_record(_TRANSACTIONS, name)
            content = await store.read_record(_TRANSACTIONS, name)
            manifests = unpack_transaction(content, where)
            for manifest in manifests:
                current = self.volumes.get(manifest.id)
                if current is not None and current.generation < manifest.generation:
                    await store.commit_record(_VOLUMES, manifest.id, manifest.pack())
                    self.volumes[manifest.id] = manifest
            if not any(manifest.id in self.unreadable for manifest in manifests):
                await store.delete_record(_TRANSACTIONS, name)
        for manifest in sorted(self.volumes.values(), key=lambda found: (found.created, found.id)):
            other = self._names.setdefault(manifest.name, manifest.id)
            if other != manifest.id:
                where = store.describe_record(_VOLUMES, manifest.id)
                self._refuse(manifest, f"{where}: volume {other} is named {manifest.name}, too")
        for name in await store.list_records(_DELETIONS):
            where = store.describe_record(_DELETIONS, name)
            try:
                content = await store.read_record(_DELETIONS, name)
                deletion = unpack_deletion(content, where)
                self.condemned[name] = deletion.layers
                if deletion.wipe is not None:
                    self.wipes[name] = deletion.wipe
            except (OSError, CorruptError) as error:
                # Its layers belong to no volume: they are set aside.
                _log.warning("a deletion is not finished: %s", error)
        for name in await store.list_records(_MERGES):
            await self._load_merge(name)
        for merge in list(self.merges.values()):
            if not self.unreadable and not self.uses(merge.source):
                await self.end_merge(merge)
        for lost in self.unreadable.values():
            _log.error("volume %s cannot be served: %s", lost.name or lost.id, lost.problem)

    async def _load_volume(self, name: str) -> None:
        where = self._store.describe_record(_VOLUMES, name)
        content = b""
        try:
            content = await self._store.read_record(_VOLUMES, name)
            manifest = unpack_manifest(content, where, name)
        except (OSError, CorruptError) as error:
            problem = _problem(error, where)
            self.unreadable[name] = UnreadableVolume(name, salvage_name(content), problem)
        else:
            self.volumes[name] = manifest

    async def _load_merge(self, name: str) -> None:
        where = self._store.describe_record(_MERGES, name)
        try:
            merge = unpack_merge(await self._store.read_record(_MERGES, name), where, name)
        except (OSError, CorruptError) as error:
            problem = _problem(error, where)
            # Some of their blocks have been moved, and nothing says which.
            for manifest in self.uses(name):
                del self._names[manifest.name]
                self._refuse(manifest, problem)
        else:
            self.merges[name] = merge

    def _refuse(self, manifest: Manifest, problem: str) -> None:
        del self.volumes[manifest.id]
        self.unreadable[manifest.id] = UnreadableVolume(manifest.id, manifest.name, problem)

    # Looking up

    def find(self, name: str) -> Manifest | None:
        """The manifest of the volume of that name."""
        found = self._names.get(name)
        return None if found is None else self.volumes[found]

    def get(self, name: str) -> Manifest:
        """The same, or NotFoundError, or CorruptError when it is (or may be) unreadable."""
        manifest = self.find(name)
        if manifest is not None:
            return manifest
        self.check_readable(name)
        for lost in self.unreadable.values():
            if lost.name is None:
                raise NotFoundError(
                    f"volume {name} does not exist, or is one that cannot be read: {lost.problem}"
                )
        raise NotFoundError(f"volume {name} does not exist")

    def check_readable(self, name: str) -> None:
        """CorruptError when a volume of that name is there and unreadable."""
        for lost in self.unreadable.values():
            if lost.name == name:
                raise CorruptError(f"volume {name} cannot be read: {lost.problem}")

    def uses(self, layer: str) -> list[Manifest]:
        """The manifests that list a layer."""
        return [manifest for manifest in self.volumes.values() if layer in manifest.parents]

    def live_layers(self) -> set[str]:
        """Every layer that a manifest lists."""
        return {layer for manifest in self.volumes.values() for layer in manifest.parents}

    def mergeable(self) -> Iterator[tuple[str, str]]:
        """(lower, upper) layers that nothing tells apart any more.

        Both sealed, no snapshot ends on the lower one, and no other layer stands on it.
        """
        children: dict[str, set[str]] = {}
        fixed: set[str] = set()
        heads: set[str] = set()
        for manifest in self.volumes.values():
            heads.add(manifest.head)
            fixed.update(manifest.tops())
            for layer, parent in manifest.parents.items():
                if parent:
                    children.setdefault(parent, set()).add(layer)
        for lower, uppers in children.items():
            if len(uppers) == 1 and lower not in fixed:
                (upper,) = uppers
                if upper not in heads:
                    yield lower, upper

    def own_layer(self, manifest: Manifest) -> str | None:
        """The layer right below a volume's head when nobody else sees it (hidden.py).

        No snapshot ends on it, and no other layer stands on it.
        """
        layer = manifest.parents[manifest.head]
        if not layer or self.unreadable or layer in manifest.tops():
            return None  # an unreadable volume may have it as well
        if list(manifest.parents.values()).count(layer) > 1 or len(self.uses(layer)) > 1:
            return None
        return layer

    # Committing

    async def commit(self, manifests: list[Manifest]) -> None:
        """Make these the manifests of their volumes, all or none, durably."""
        await self.finish(await self.stage(manifests))

    async def stage(self, manifests: list[Manifest]) -> StagedCommit:
        """Write everything that ``finish`` needs, which then needs no space."""
        self.check()
        new = {manifest.id: manifest for manifest in manifests}
        await self._condemn(new)
        if len(manifests) == 1:
            kind, name, content = _VOLUMES, manifests[0].id, manifests[0].pack()
        else:
            kind, name, content = _TRANSACTIONS, secrets.token_hex(8), pack_transaction(manifests)
        record = await with_reserve(
            self._store, lambda: self._store.stage_record(kind, name, content)
        )
        return StagedCommit(tuple(manifests), record, kind, name, content)

    async def finish(self, staged: StagedCommit) -> None:
        """Commit what was staged."""
        kind, name = staged.kind, staged.name
        try:
            await self._commit_surely(staged.record.commit, kind, name, staged.content)
        except BaseException:
            await staged.record.discard()
            raise
        if kind == _TRANSACTIONS:
            # Committed. What fails from here on is done again when the store is loaded.
            try:
                for manifest in staged.manifests:
                    await self._commit_record(_VOLUMES, manifest.id, manifest.pack())
                await self._store.delete_record(_TRANSACTIONS, name)
            except (OSError, StorageError) as error:
                self.in_doubt = None  # whichever is found there, the transaction settles it
                where = self._store.describe_record(_TRANSACTIONS, name)
                _log.warning("%s is finished at the next start: %s", where, error)
        for manifest in staged.manifests:
            old = self.volumes.get(manifest.id)
            if old is not None:
                del self._names[old.name]
            self.volumes[manifest.id] = manifest
            self._names[manifest.name] = manifest.id

    async def remove(self, manifest: Manifest, *, wipe: bool = False) -> None:
        """Forget a volume durably; layers that nothing lists then are condemned.

        With ``wipe`` they are left to be overwritten first (wiping.py).
        """
        self.check()
        await self._condemn({manifest.id: None}, manifest.name if wipe else None)
        try:
            await self._store.delete_record(_VOLUMES, manifest.id)
        except BaseException as error:
            if not await self._is_there(_VOLUMES, manifest.id):
                self._doubt(_VOLUMES, manifest.id, error)
            raise
        del self.volumes[manifest.id]
        del self._names[manifest.name]

    # Condemned layers

    async def _condemn(self, new: Mapping[str, Manifest | None], wipe: str | None = None) -> None:
        """Note the layers that no manifest lists any more once ``new`` replaces what there is."""
        lost: set[str] = set()
        for volume in new:
            if volume in self.volumes:
                lost.update(self.volumes[volume].parents)
        for volume, manifest in {**self.volumes, **new}.items():
            if lost and manifest is not None and (volume in new or lost & manifest.parents.keys()):
                lost.difference_update(manifest.parents)
        if lost:
            await self._note_deletion(frozenset(lost), wipe)

    async def condemn_unless_committed(self, layer: str) -> None:
        """Note a layer to be made that goes unless a manifest lists it; it is ``provisional``."""
        self.provisional.add(layer)
        await self._note_deletion(frozenset((layer,)))

    async def _note_deletion(self, layers: frozenset[str], wipe: str | None = None) -> None:
        name = secrets.token_hex(8)
        # Whether a failed one is there does not matter: it touches no layer that is listed.
        await self._commit_deletion(name, pack_deletion(layers, wipe))
        self.condemned[name] = layers
        if wipe is not None:
            self.wipes[name] = wipe

    async def delete_condemned(self, keep: Set[str]) -> None:
        """Delete condemned layers but for those in ``keep``, which live or are still in use.

        Those to be wiped are left to ``end_wiping``.
        """
        if self.unreadable:
            return
        live = self.live_layers()
        to_wipe = frozenset[str]().union(*(self.condemned[name] for name in self.wipes))
        keep = keep | self.provisional | to_wipe
        for name, layers in list(self.condemned.items()):
            if name in self.wipes:
                continue
            waiting = layers & keep - live - to_wipe
            for layer in layers - keep - live:
                await self._store.delete_layer(layer)
            if not waiting:
                await self._store.delete_record(_DELETIONS, name)
                del self.condemned[name]

    async def end_wiping(self, name: str) -> None:
        """Forget a deletion whose layers have been wiped and deleted, but for those that live."""
        await self._store.delete_record(_DELETIONS, name)
        del self.condemned[name]
        del self.wipes[name]

    async def wipe_condemned(self, layer: str, volume: str) -> None:
        """Let a condemned layer be wiped first, as one of a volume of that name."""
        for name, layers in self.condemned.items():
            if layer in layers:
                await self._commit_deletion(name, pack_deletion(layers, volume))
                self.wipes[name] = volume

    async def _commit_deletion(self, name: str, content: bytes) -> None:
        await with_reserve(
            self._store, lambda: self._store.commit_record(_DELETIONS, name, content)
        )

    async def give_up_wiping(self, name: str) -> None:
        """Let the layers of a deletion go as they are."""
        await self._commit_deletion(name, pack_deletion(self.condemned[name]))
        del self.wipes[name]

    async def begin_merge(self, merge: Merge) -> None:
        """Note durably that a merge is under way, with an empty log."""
        self.check()
        empty = encode_header(merge.target, MERGE) + bytes(SECTOR)
        await with_reserve(self._store, lambda: self._store.create_log(merge.target, MERGE, empty))
        await self._commit_record(_MERGES, merge.target, merge.pack())
        self.merges[merge.target] = merge

    async def end_merge(self, merge: Merge) -> None:
        """Forget a merge whose source no manifest lists any more."""
        # The log first: a log without its record could be taken for a later merge's.
        await self._store.delete_log(merge.target, MERGE)
        await self._store.delete_record(_MERGES, merge.target)
        del self.merges[merge.target]

    def check(self) -> None:
        """UnavailableError when a commit is in doubt."""
        if self.in_doubt is not None:
            raise UnavailableError(
                f"{self.in_doubt} may or may not have been written; restart nbdserve to find out"
            )

    async def _commit_record(self, kind: str, name: str, content: bytes) -> None:
        self.check()

        async def commit() -> None:
            await with_reserve(self._store, lambda: self._store.commit_record(kind, name, content))

        await self._commit_surely(commit, kind, name, content)

    async def _commit_surely(
        self, commit: Callable[[], Awaitable[None]], kind: str, name: str, content: bytes
    ) -> None:
        """Commit a record; when it fails, know that it did, or be in doubt."""
        self.check()
        try:
            await commit()
        except BaseException as error:
            known = isinstance(error, OSError | NoSpaceError)
            if not known or await self._may_be(kind, name, content):
                self._doubt(kind, name, error)
            raise

    def _doubt(self, kind: str, name: str, error: BaseException) -> None:
        self.in_doubt = self._store.describe_record(kind, name)
        _log.error("nothing is committed from now on: %s: %s", self.in_doubt, error)

    async def _may_be(self, kind: str, name: str, content: bytes) -> bool:
        """Whether a record may have this content after a failed commit of it."""
        try:
            return await self._store.read_record(kind, name) == content
        except NotFoundError:
            return False
        except OSError:
            return True

    async def _is_there(self, kind: str, name: str) -> bool:
        """Whether a record surely has not been removed by a failed removal."""
        try:
            await self._store.read_record(kind, name)
        except (NotFoundError, OSError):
            return False
        return True


def _problem(error: OSError | CorruptError, where: str) -> str:
    return f"{where}: {error.strerror}" if isinstance(error, OSError) else str(error)


def is_no_space(error: OSError) -> bool:
    """Whether an operation failed for want of space."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
