"""What the control socket answers: JSON objects with sizes in bytes and times in ISO 8601, UTC."""

import dataclasses
from datetime import UTC, datetime

from snapshots.checking import CheckReport
from snapshots.listings import SnapshotInfo, VolumeInfo
from snapshots.manifest_store import UnreadableVolume

Document = dict[str, object]


def timestamp(seconds: float) -> str:
    """``seconds`` since the epoch as ``2024-05-01T12:00:00.123Z``."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def volume(info: VolumeInfo) -> Document:
    return dataclasses.asdict(info) | {"created": timestamp(info.created)}


def check_report(report: CheckReport) -> Document:
    return dataclasses.asdict(report)


def unreadable(volume: UnreadableVolume) -> Document:
    return dataclasses.asdict(volume)


def snapshot(info: SnapshotInfo) -> Document:
    return dataclasses.asdict(info) | {"created": timestamp(info.created)}
