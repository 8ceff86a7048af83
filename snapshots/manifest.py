"""Manifests: what the data directory knows of volumes, snapshots and merges, as records.

A **volume's manifest** is the truth about it: its size, the tree of layers that it and its
snapshots stand on, and which layer is the head. A snapshot names the layer on top of its stack;
a stack is read from there down through the parents. Layers are shared by clones, so a layer
may stand in several manifests; it lives as long as any names it.

``generation`` grows with every commit, so a transaction (several manifests committed as one) can be
replayed after a crash without undoing anything later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import msgpack

from backends.errors import CorruptError, InvalidError
from snapshots.limits import Limits, limits_from_map
from snapshots.names import MAX_NAME, check_name
from snapshots.records import pack_record, unpack_record

T = TypeVar("T")

VERSION = 1
WIPING_VERSION = 2  # of a deletion whose layers are to be wiped
MAX_LAYERS = 250
# A manifest begins with its id, of 32 digits, and its name.
_NAME_KEY = msgpack.packb("name")
_NAME_WITHIN = 100


@dataclass(frozen=True)
class Snapshot:
    """A named, immutable state: ``layer`` is the top of its stack; times in seconds since 1970."""

    name: str
    id: str
    size: int
    created: float
    layer: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """One volume (see the module's text); ``parents`` maps each layer to the one below or ''.

    ``limits`` None: the volume has none of its own, and what the configuration says holds.
    ``reserve`` is how many bytes are reserved for it (reservations.py).
    """

    id: str
    name: str
    size: int
    created: float
    generation: int
    head: str
    parents: dict[str, str]
    snapshots: tuple[Snapshot, ...] = field(default=())
    limits: Limits | None = None
    reserve: int = 0

    def stack(self, top: str) -> list[str]:
        """Layers from the oldest to ``top``."""
        layers: list[str] = []
        while top:
            layers.append(top)
            if len(layers) > len(self.parents):
                raise CorruptError(
                    f"volume {self.name}: the layers below {layers[0]} form a circle"
                )
            top = self.parents[top]
        layers.reverse()
        return layers

    def find(self, snapshot: str) -> Snapshot | None:
        """The snapshot of that name."""
        return next((found for found in self.snapshots if found.name == snapshot), None)

    def largest(self) -> int:
        """Bytes of the largest state: a volume rolled back is smaller than its later snapshots."""
        return max(self.size, *(snapshot.size for snapshot in self.snapshots), 0)

    def tops(self) -> Iterator[str]:
        """The layers on which a snapshot ends."""
        return (snapshot.layer for snapshot in self.snapshots)

    def changed(self, **changes: Any) -> Manifest:
        """The next generation, with ``changes``; layers that nothing stands on are left out."""
        new = replace(self, generation=self.generation + 1, **changes)
        reachable: dict[str, str] = {}
        for top in (new.head, *new.tops()):
            layer = top
            while layer and layer not in reachable:
                reachable[layer] = new.parents[layer]
                layer = new.parents[layer]
        return replace(new, parents=reachable)

    def merged(self, merge: Merge) -> Manifest:
        """The next generation, in which a merge's target stands for both of its layers."""
        source, target = merge.source, merge.target
        parents = dict(self.parents)
        below = parents.pop(source)
        for layer, parent in parents.items():
            if parent == source:
                parents[layer] = target if layer != target else below
        snapshots = tuple(
            replace(snapshot, layer=target) if snapshot.layer == source else snapshot
            for snapshot in self.snapshots
        )
        return self.changed(parents=parents, snapshots=snapshots)

    def pack(self) -> bytes:
        """As a record."""
        return pack_record(VERSION, self.as_map())

    def as_map(self) -> dict[str, Any]:
        """As msgpack can hold it; what few have is left out where it is not."""
        found = asdict(self)
        del found["limits"]
        if self.limits is not None:
            found["limits"] = self.limits.as_map()
        if not self.reserve:
            del found["reserve"]
        return found


def unpack_manifest(content: bytes, where: str, volume: str) -> Manifest:
    """Read the record of the volume with that id; CorruptError when it is not a sound one of it."""
    manifest = _checked(where, lambda: manifest_from_map(unpack_record(content, VERSION, where)))
    if manifest.id != volume:
        raise CorruptError(f"{where}: is the manifest of another volume, {manifest.id}")
    return manifest


def salvage_name(content: bytes) -> str | None:
    """The volume's name as a damaged record has it, for messages only; None when there is none."""
    at = content.find(_NAME_KEY, 0, _NAME_WITHIN)
    try:
        unpacker = msgpack.Unpacker()
        unpacker.feed(content[at + len(_NAME_KEY) : at + _NAME_WITHIN + MAX_NAME])
        return check_name("volume", unpacker.unpack()) if at >= 0 else None
    except (ValueError, msgpack.OutOfData, InvalidError):
        return None


def manifest_from_map(found: dict[str, Any]) -> Manifest:
    """Inverse of ``as_map``; TypeError, KeyError or ValueError when something does not fit."""
    snapshots = tuple(Snapshot(**snapshot) for snapshot in found["snapshots"])
    limits = limits_from_map(found["limits"]) if "limits" in found else None
    manifest = Manifest(**{**found, "snapshots": snapshots, "limits": limits})
    if not isinstance(manifest.reserve, int) or manifest.reserve < 0:
        raise ValueError("what is reserved is no number of bytes")
    layers = [manifest.head, *manifest.tops(), *(p for p in manifest.parents.values() if p)]
    if not all(layer in manifest.parents for layer in layers):
        raise ValueError("a layer is named but not listed")
    for top in (manifest.head, *manifest.tops()):
        try:
            manifest.stack(top)
        except CorruptError as error:
            raise ValueError(str(error)) from error
    return manifest


def pack_transaction(manifests: list[Manifest]) -> bytes:
    """Several manifests that are committed as one."""
    return pack_record(VERSION, {"manifests": [manifest.as_map() for manifest in manifests]})


def unpack_transaction(content: bytes, where: str) -> list[Manifest]:
    """Read a transaction's record."""
    return _checked(
        where,
        lambda: [
            manifest_from_map(found)
            for found in unpack_record(content, VERSION, where)["manifests"]
        ],
    )


@dataclass(frozen=True)
class Deletion:
    """Layers to be deleted where no manifest lists them; ``wipe``: of a volume of this name,
    and to be overwritten first."""

    layers: frozenset[str]
    wipe: str | None = None


def pack_deletion(layers: Iterable[str], wipe: str | None = None) -> bytes:
    """A deletion as a record."""
    fields: dict[str, Any] = {"layers": sorted(layers)}
    if wipe is not None:
        fields["wipe"] = wipe
    # A program that knows nothing of wiping must not delete what was to be wiped.
    return pack_record(VERSION if wipe is None else WIPING_VERSION, fields)


def unpack_deletion(content: bytes, where: str) -> Deletion:
    """Read a deletion's record."""

    def read() -> Deletion:
        found = unpack_record(content, WIPING_VERSION, where)
        wipe = found.get("wipe")
        return Deletion(
            frozenset(found["layers"]), None if wipe is None else check_name("volume", wipe)
        )

    return _checked(where, read)


@dataclass(frozen=True)
class Merge:
    """Two neighbouring sealed layers that become one: ``target``, which is one of them."""

    lower: str
    upper: str
    target: str

    def __post_init__(self) -> None:
        if self.lower == self.upper or self.target not in (self.lower, self.upper):
            raise ValueError("the target is not one of two layers")

    @property
    def source(self) -> str:
        """The layer that goes."""
        return self.lower if self.target == self.upper else self.upper

    def pack(self) -> bytes:
        """As a record; its name is the target's."""
        return pack_record(VERSION, asdict(self))


def unpack_merge(content: bytes, where: str, target: str) -> Merge:
    """Read the record of the merge into ``target``; CorruptError when it is no sound one of it."""
    merge = _checked(where, lambda: Merge(**unpack_record(content, VERSION, where)))
    if merge.target != target:
        raise CorruptError(f"{where}: is the record of another merge, {merge.target}")
    return merge


def _checked(where: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except (TypeError, KeyError, ValueError, AttributeError, InvalidError) as error:
        raise CorruptError(f"{where}: not what it should be: {error!r}") from error
