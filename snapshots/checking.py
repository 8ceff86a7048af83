"""Checking a data directory: what is damaged, what it harms, and what to do.

Everything is read from the store itself, as a process would that starts on it, and nothing is
changed unless ``repair`` is asked for:

1. all records: manifests, transactions, merges, deletions; what they say of each other;
2. of every layer that a volume lists: its logs, whole, and whether its data is as long as they say;
3. layers that no volume lists, and those that were set aside.

With nobody else at the store that is all. In a process that serves volumes, each step runs in a
``quiet`` moment, in which nothing is committed and no view is opened or closed, and takes the
manifests as they are by then; a layer that is gone since is not looked for. What is read there is
judged outside of it. The journal of an open volume is examined where it is written.

Blocks have no checksums: what is wrong in a layer's data itself cannot be seen.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from backends.errors import CorruptError, NotFoundError, StorageError, one_line
from backends.layers import DataFile, LayerStore
from snapshots.examining import examine_log, missing_from
from snapshots.extent_log import FETCHED, INDEX, JOURNAL, MERGE, SECTOR, LogState
from snapshots.head import JOURNAL_STEP
from snapshots.layer import clear_away
from snapshots.lazy import LAZY, unpack_lazy
from snapshots.manifest import (
    MAX_LAYERS,
    Manifest,
    Merge,
    salvage_name,
    unpack_deletion,
    unpack_manifest,
    unpack_merge,
    unpack_transaction,
)
from snapshots.manifest_store import ManifestStore
from snapshots.names import BLOCK_SHIFT, check_name, check_volume_size

Progress = Callable[[int, int], None]

_OFFSET = re.compile(r"\boffset (\d+)")
_RESTORE = (
    "restore what is named from a repository, or the file from a copy of the data directory that"
    " was made with nbdserve stopped"
)
_RECORD = (
    "put back the file from a copy of the data directory that was made with nbdserve stopped, or"
    " move it away: then its layers are moved to lost/ at the next start"
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``problem`` in ``file``, at ``offset`` in bytes where it has one.

    ``harms`` are the volumes and snapshots (VOL, VOL@SNAP) that cannot be read because of it, or
    not wholly; a volume whose name is lost is called by its id.
    """

    file: str
    offset: int | None
    problem: str
    harms: tuple[str, ...]
    advice: str
    repaired: bool = False


@dataclass(frozen=True)
class CheckReport:
    """How much was checked, and what was found."""

    volumes: int
    snapshots: int
    layers: int
    findings: list[Finding]


@dataclass
class _Layer:
    """What was read of one layer in a quiet moment."""

    blocks: int
    head: bool
    merging: bool
    logs: dict[str, bytes] = field(default_factory=dict)
    lazy: bytes | None = None


async def _never_open(volume: str) -> bool:
    return False


class Checker:
    """One check (see the module's text); the caller holds the store's lock.

    In a process that serves volumes, ``manifests`` are those that it serves, ``in_use`` the layers
    that it needs besides, and ``check_head`` examines the journal of a volume, if it is open, and
    says whether it is: CorruptError.
    """

    def __init__(
        self,
        store: LayerStore,
        quiet: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
        manifests: ManifestStore | None = None,
        in_use: Callable[[], Set[str]] = frozenset,
        check_head: Callable[[str], Awaitable[bool]] = _never_open,
    ) -> None:
        self._store = store
        self._quiet = quiet
        self._manifests = manifests
        self._in_use = in_use
        self._check_head = check_head
        self._volumes: dict[str, Manifest] = {}
        self._merges: dict[str, Merge] = {}
        self._condemned: set[str] = set()
        self._lost_names: dict[str, str | None] = {}
        self._damaged_merges: set[str] = set()
        self._all_read = True
        self._repair = False
        self._findings: list[Finding] = []

    async def run(
        self, volume: str | None, repair: bool = False, progress: Progress | None = None
    ) -> CheckReport:
        """Check one volume or everything; progress in layers: done, all. NotFoundError.

        Of one volume, only what concerns it is found.
        """
        self._repair = repair
        async with self._quiet():
            await self._check_records()
        chosen = self._choose(volume)
        layers = list(dict.fromkeys(layer for found in chosen for layer in found.parents))
        for done, layer in enumerate(layers):
            if progress is not None:
                progress(done, len(layers))
            await self._check_layer(layer)
        if volume is None:
            async with self._quiet():
                await self._check_strangers()
        else:
            self._findings = [found for found in self._findings if _concerns(found, volume)]
        if progress is not None:
            progress(len(layers), len(layers))
        snapshots = sum(len(found.snapshots) for found in chosen)
        return CheckReport(len(chosen), snapshots, len(layers), self._findings)

    def _choose(self, volume: str | None) -> list[Manifest]:
        if volume is None:
            return sorted(self._volumes.values(), key=lambda found: found.name)
        chosen = [found for found in self._volumes.values() if found.name == volume]
        if not chosen and volume not in self._lost_names.values():
            unknown = [name for name, known in self._lost_names.items() if known is None]
            where = [self._store.describe_record("volumes", name) for name in unknown]
            hint = f", or is one of those that cannot be read: {', '.join(where)}" if where else ""
            raise NotFoundError(f"volume {volume} does not exist{hint}")
        return chosen

    def _find(
        self,
        problem: str,
        advice: str,
        harms: Iterable[str] = (),
        file: str | None = None,
        *,
        repaired: bool = False,
    ) -> None:
        """Note a finding; a ``problem`` that begins with its file, as errors do, names it."""
        if file is None:
            file, _, problem = problem.partition(": ")
        offset = _OFFSET.search(problem)
        at = None if offset is None else int(offset[1])
        self._findings.append(
            Finding(file, at, problem, tuple(dict.fromkeys(harms)), advice, repaired)
        )

    async def _mend(self, advice: str, mend: Callable[[], Awaitable[None]]) -> tuple[bool, str]:
        """Repair something if that is asked for; whether it was done, and the advice if not."""
        if not self._repair:
            return False, advice
        try:
            await mend()
        except (OSError, StorageError) as error:
            return False, f"see to this, then check again: {one_line(error)}"
        return True, advice

    # Records

    async def _check_records(self) -> None:
        store = self._store
        for name in await store.list_records("volumes"):
            await self._check_manifest_record(name)
        for name in await store.list_records("transactions"):
            where = store.describe_record("transactions", name)
            with self._noting(where, _RESTORE, lambda: ["every volume"]):
                content = await store.read_record("transactions", name)
                for manifest in unpack_transaction(content, where):
                    current = self._volumes.get(manifest.id)
                    if current is not None and current.generation < manifest.generation:
                        self._volumes[manifest.id] = manifest
        for name in await store.list_records("deletions"):
            await self._check_deletion(name)
        for name in await store.list_records("merges"):
            await self._check_merge_record(name)
        for manifest in self._volumes.values():
            self._check_manifest(manifest)
        self._check_agreement()

    @contextlib.contextmanager
    def _noting(
        self, where: str, advice: str, harms: Callable[[], Iterable[str]]
    ) -> Iterator[None]:
        """Turn what goes wrong with a record inside into a finding."""
        try:
            yield
        except (OSError, CorruptError, NotFoundError) as error:
            self._all_read = False
            self._find(_one_problem(error, where), advice, harms())

    async def _check_manifest_record(self, name: str) -> None:
        store = self._store
        where = store.describe_record("volumes", name)
        content = b""

        def harmed() -> list[str]:
            self._lost_names[name] = salvage_name(content)
            served = self._manifests and self._manifests.volumes.get(name)
            if not served:
                return [self._lost_names[name] or name]
            self._volumes[name] = served
            return _names(served)

        served = self._manifests is not None and name in self._manifests.volumes
        advice = _RECORD
        if served:
            advice = "rename the volume and back: nbdserve knows it still, and writes the file anew"
        with self._noting(where, advice, harmed):
            content = await store.read_record("volumes", name)
            self._volumes[name] = unpack_manifest(content, where, name)

    async def _check_deletion(self, name: str) -> None:
        store = self._store
        where = store.describe_record("deletions", name)
        try:
            content = await store.read_record("deletions", name)
            self._condemned |= unpack_deletion(content, where).layers
        except (OSError, CorruptError) as error:
            advice = (
                "--repair removes it: the layers that it names belong to no volume, and are moved"
                " to lost/ at the next start"
            )
            repaired, advice = await self._mend(
                advice, lambda: store.delete_record("deletions", name)
            )
            self._find(_one_problem(error, where), advice, repaired=repaired)

    async def _check_merge_record(self, name: str) -> None:
        store = self._store
        where = store.describe_record("merges", name)
        try:
            merge = unpack_merge(await store.read_record("merges", name), where, name)
        except (OSError, CorruptError) as error:
            self._all_read = False
            self._damaged_merges.add(name)
            harmed = [each for found in self._users(name) for each in _names(found)]
            self._find(_one_problem(error, where), _RESTORE, harmed)
            return
        self._merges[name] = merge
        for manifest in self._users(merge.source):
            if manifest.parents.get(merge.upper) != merge.lower:
                self._find(
                    f"{merge.lower} does not lie right below {merge.upper}",
                    _RESTORE,
                    _names(manifest),
                    where,
                )

    def _users(self, layer: str) -> list[Manifest]:
        return [found for found in self._volumes.values() if layer in found.parents]

    def _check_manifest(self, manifest: Manifest) -> None:
        """What no damage makes, but a manifest that somebody edited may have."""
        where = self._store.describe_record("volumes", manifest.id)
        wrong: list[str] = []
        try:
            check_name("volume", manifest.name)
            check_volume_size(manifest.size)
            for snapshot in manifest.snapshots:
                check_name("snapshot", snapshot.name)
                check_volume_size(snapshot.size)
        except (StorageError, TypeError) as error:
            wrong.append(one_line(error))
        for kind in ("name", "id"):
            found = [getattr(snapshot, kind) for snapshot in manifest.snapshots]
            if len(set(found)) != len(found):
                wrong.append(f"two snapshots have the same {kind}")
        for top in (manifest.head, *manifest.tops()):
            if len(manifest.stack(top)) > MAX_LAYERS:
                wrong.append(f"more than {MAX_LAYERS} layers lie below {top}")
        if manifest.head in [*manifest.tops(), *manifest.parents.values()]:
            wrong.append(f"the head {manifest.head} is also part of a snapshot")
        for problem in wrong:
            self._find(problem, _RECORD, _names(manifest), where)

    def _check_agreement(self) -> None:
        """What manifests say of the same name and of the same layer."""
        names: dict[str, Manifest] = {}
        layers: dict[str, Manifest] = {}
        for manifest in sorted(self._volumes.values(), key=lambda each: (each.created, each.id)):
            where = self._store.describe_record("volumes", manifest.id)
            other = names.setdefault(manifest.name, manifest)
            if other is not manifest:
                self._find(
                    f"volume {other.id} is named {manifest.name}, too",
                    "move this file away, rename the other volume, and put it back",
                    [manifest.name],
                    where,
                )
            for layer, parent in manifest.parents.items():
                other = layers.setdefault(layer, manifest)
                if other.parents[layer] != parent or (
                    other is not manifest and layer in (manifest.head, other.head)
                ):
                    self._find(
                        f"volume {other.name} says something else of layer {layer}",
                        _RESTORE,
                        [manifest.name, other.name],
                        where,
                    )

    # Layers

    async def _check_layer(self, layer: str) -> None:
        read = await self._read_layer(layer)
        if read is None:
            return
        if read.lazy is not None:
            await self._check_lazy(layer, read.lazy)
        for log, content in read.logs.items():
            where = self._store.describe(layer, log)
            try:
                state = await examine_log(content, layer, log, read.blocks, where)
                if len(content) % SECTOR:
                    raise CorruptError(f"{where}: cut short at offset {len(content)}")
                if state.ragged and log == JOURNAL and not read.head:
                    raise CorruptError(
                        f"{where}: unsynced sectors in a sealed layer, from offset {state.end} on"
                    )
                if log == MERGE and not read.merging and state.sequence:
                    raise CorruptError(
                        f"{where}: the record of this merge, of {state.sequence} sectors, is lost"
                    )
            except CorruptError as error:
                if log == FETCHED:
                    self._find(one_line(error), "nothing: what it listed is fetched again")
                else:
                    self._find_in(layer, one_line(error))
                continue
            if state.ragged:
                await self._check_torn(layer, log, content, state)
            if log != FETCHED:
                await self._check_data(layer, functools.partial(missing_from, state=state))

    async def _check_lazy(self, layer: str, content: bytes) -> None:
        try:
            lazy = unpack_lazy(content, self._store.describe(layer, LAZY))
        except CorruptError as error:
            self._find_in(layer, one_line(error))
            return
        await self._check_data(layer, lambda data: data.find_short(lazy.ends()))

    async def _read_layer(self, layer: str) -> _Layer | None:
        """What is to be examined of a layer; None when nothing, or nothing else, is."""
        store = self._store
        async with self._quiet():
            users = self._current_users(layer)
            if not users:
                return None  # it went while others were examined
            merges = self._merges if self._manifests is None else self._manifests.merges
            merging = layer in merges or layer in self._damaged_merges
            heads = [user for user in users if user.head == layer]
            found = _Layer(
                max(user.largest() for user in users) >> BLOCK_SHIFT, bool(heads), merging
            )
            try:
                files = await store.list_files(layer)
                for name in files.strange:
                    self._find(
                        "not a file of nbdserve",
                        "move it away",
                        file=name,
                    )
                if heads and await self._check_head(heads[0].id):
                    return None
                wanted = JOURNAL if heads or INDEX not in files.logs else INDEX
                if LAZY in files.logs and INDEX not in files.logs:
                    found.lazy = await store.read_log(layer, LAZY)
                    # While it is served, it is written to; what is wrong with it harms nobody.
                    content = await store.read_log(layer, FETCHED)
                    if content is not None and self._manifests is None:
                        found.logs[FETCHED] = content
                    return found
                if heads and INDEX in files.logs:
                    raise CorruptError(
                        f"{store.describe(layer, INDEX)}: an index in a layer that is written"
                    )
                for log in (wanted, MERGE):
                    content = await store.read_log(layer, log)
                    if content is not None:
                        found.logs[log] = content
                if not found.logs.keys() & {INDEX, JOURNAL}:
                    # An index may just have taken a journal's place.
                    content = await store.read_log(layer, INDEX)
                    if content is None:
                        raise CorruptError(
                            f"{store.describe(layer, wanted)}: is missing, and so is any other log"
                            " of what the layer holds"
                        )
                    found.logs[INDEX] = content
                merge = merges.get(layer)
                # One that has come to its end loses its log first, then its record.
                wanting = merge is not None and self._current_users(merge.source)
                if wanting and MERGE not in found.logs:
                    raise CorruptError(f"{store.describe(layer, MERGE)}: is missing")
            except (OSError, CorruptError, NotFoundError) as error:
                self._find_in(layer, _one_problem(error, store.describe(layer, JOURNAL)))
                return None
            return found

    def _current_users(self, layer: str) -> list[Manifest]:
        """The manifests that list a layer now."""
        users = self._users(layer)
        if self._manifests is None:
            return users
        served = self._manifests.uses(layer)
        return served + [user for user in users if user.id in self._manifests.unreadable]

    def _find_in(self, layer: str, problem: str) -> None:
        harmed = [each for user in self._current_users(layer) for each in _names(user, layer)]
        if harmed or not self._manifests:
            self._find(problem, _RESTORE, harmed)

    async def _check_torn(self, layer: str, log: str, content: bytes, state: LogState) -> None:
        where = self._store.describe(layer, log)
        advice = "--repair cuts it off, as opening the volume does"
        repaired = False
        if log == MERGE:
            advice = "nothing: it is cut off when the merge goes on"
        elif log == FETCHED:
            advice = "nothing: what it listed is fetched again"
        else:
            whole = content[: state.end] + bytes(JOURNAL_STEP)
            async with self._quiet():
                if self._repair and await self._store.read_log(layer, log) != content:
                    return  # the volume was opened, or has gone
                repaired, advice = await self._mend(
                    advice, lambda: self._store.create_log(layer, log, whole)
                )
        self._find(
            f"{where}: a torn tail from offset {state.end} on, of writes that nobody was told were"
            " durable",
            advice,
            repaired=repaired,
        )

    async def _check_data(self, layer: str, find: Callable[[DataFile], str | None]) -> None:
        try:
            data = await self._store.open_data(layer, writable=False)
            try:
                missing = find(data)
            finally:
                data.close()
        except (OSError, NotFoundError) as error:
            missing = _one_problem(error, self._store.describe(layer, JOURNAL))
        if missing is not None:
            self._find_in(layer, missing)

    # Layers of nobody

    async def _check_strangers(self) -> None:
        store = self._store
        known = self._condemned | set(self._in_use())
        for manifest in self._volumes.values():
            known.update(manifest.parents)
        if self._manifests is not None:
            known |= self._manifests.live_layers() | self._manifests.provisional
        for merge in self._merges.values():
            known.update((merge.lower, merge.upper))
        strangers = sorted(set(await store.list_layers()) - known)
        served = self._manifests
        if not self._all_read or (served and (served.unreadable or served.in_doubt)):
            strangers = []  # any may belong to a volume that cannot be read
        for layer in strangers:

            async def mend(layer: str = layer) -> None:
                await clear_away(store, layer)

            advice = "--repair moves it to lost/ if its logs list data, and removes it if not"
            repaired, advice = await self._mend(advice, mend)
            where = store.describe_layer(layer)
            self._find("belongs to no volume", advice, file=where, repaired=repaired)
        for where in await store.list_set_aside():
            self._find(
                "a layer with data that belonged to no volume",
                "put it back into layers/ with the manifest of its volume in volumes/, or remove it"
                " when nothing is missing",
                file=where,
            )


def _names(manifest: Manifest, layer: str | None = None) -> list[str]:
    """The volume and its snapshots, as they are named; those that stand on ``layer``."""
    tops = [(manifest.name, manifest.head)]
    tops += [(f"{manifest.name}@{each.name}", each.layer) for each in manifest.snapshots]
    return [name for name, top in tops if layer is None or layer in manifest.stack(top)]


def _one_problem(error: OSError | StorageError, where: str) -> str:
    """One line that begins with a file."""
    if isinstance(error, OSError):
        return f"{error.filename or where}: {error.strerror or error}"
    line = one_line(error)
    return line if isinstance(error, CorruptError) else f"{where}: {line}"


def _concerns(found: Finding, volume: str) -> bool:
    return any(name.partition("@")[0] in (volume, "every volume") for name in found.harms)


def remaining(findings: Iterable[Finding]) -> list[Finding]:
    """Those that were not repaired."""
    return [found for found in findings if not found.repaired]


async def check_store(
    store: LayerStore, volume: str | None, repair: bool, progress: Progress | None = None
) -> CheckReport:
    """Check a store that no other process uses; takes its lock. InUseError, NotFoundError."""
    await store.lock()
    try:
        return await Checker(store).run(volume, repair, progress)
    finally:
        await store.unlock()
