"""What the control socket answers: JSON objects with sizes in bytes and times in ISO 8601, UTC."""

import dataclasses
from datetime import UTC, datetime

from nbdserve.labels import BACKUP
from snapshots.checking import CheckReport
from snapshots.comparing import Comparison, State
from snapshots.listings import SnapshotInfo, VolumeInfo
from snapshots.manifest import Snapshot
from snapshots.manifest_store import UnreadableVolume
from snapshots.mapping import VolumeMap
from snapshots.names import BLOCK_SHIFT, BLOCK_SIZE
from snapshots.wiping import Deleted, Wipe

Document = dict[str, object]

_FIRST = -62_135_596_800  # the years 1 and 9999
_LAST = 253_402_300_799


def timestamp(seconds: float) -> str:
    """``seconds`` since the epoch as ``2024-05-01T12:00:00.123Z``.

    A time that no calendar has, from a record that somebody made up, is the first or last of it.
    """
    moment = datetime.fromtimestamp(min(max(seconds, _FIRST), _LAST), UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def volume(info: VolumeInfo) -> Document:
    return dataclasses.asdict(info) | {"created": timestamp(info.created)}


def deleted(found: Deleted) -> Document:
    return {
        "deleted": found.volume,
        "wiped": found.wiped,
        "shared": found.shared,
        "others": list(found.others),
    }


def wipe(found: Wipe) -> Document:
    return {name: getattr(found, name) for name in ("volume", "done", "total", "problem")}


def check_report(report: CheckReport) -> Document:
    return dataclasses.asdict(report)


def unreadable(volume: UnreadableVolume) -> Document:
    return dataclasses.asdict(volume)


def snapshot(info: SnapshotInfo) -> Document:
    return dataclasses.asdict(info) | {"created": timestamp(info.created)}


def comparison(found: Comparison) -> Document:
    """What is compared; the extents are lines of their own."""
    return {
        "volume": found.volume,
        "block_size": BLOCK_SIZE,
        "from": _state(found.older),
        "to": _state(found.newer),
    }


def _state(state: State) -> Document:
    created = None if state.created is None else timestamp(state.created)
    return dataclasses.asdict(state) | {"created": created}


def volume_map(found: VolumeMap) -> Document:
    """``layer`` of a cell is an index into ``layers``; cells that hold nothing are left out."""
    return {
        "volume": found.volume,
        "size": found.size,
        "mapped": found.mapped,
        "changed": found.changed,
        "since": None if found.since is None else _base(found.since),
        "layers": [dataclasses.asdict(layer) for layer in found.layers],
        "cell_size": found.cell_size,
        "cells": [
            {
                "offset": cell.number * found.cell_size,
                "mapped": cell.mapped << BLOCK_SHIFT,
                "layer": cell.layer,
                "most": cell.most << BLOCK_SHIFT,
                "changed": cell.changed << BLOCK_SHIFT,
            }
            for cell in found.filled
        ],
    }


def _base(snapshot: Snapshot) -> Document:
    return {
        "snapshot": snapshot.name,
        "created": timestamp(snapshot.created),
        "repository_id": snapshot.labels[BACKUP],
    }
