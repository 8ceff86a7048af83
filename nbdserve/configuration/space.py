"""How much may be promised of a disk, and when it is nearly full: the table ``[space]``.

A threshold is a size, such as "20G", or a part of the file system, such as "10%".
"""

import re
from dataclasses import dataclass
from typing import Final

from backends.errors import InvalidError
from nbdserve.configuration.table import Table
from snapshots.names import parse_size
from snapshots.space import DEFAULT_POLICY, SpacePolicy
from snapshots.space_watch import Threshold

SPACE_KEYS: Final = ("max_overcommit", "warn_free", "critical_free", "min_free")
MOST_OVERCOMMIT: Final = 1_000_000.0

_SHARE: Final = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,3})?) ?%", re.ASCII)


@dataclass(frozen=True)
class SpaceSettings:
    """One source's say; None where it says nothing."""

    max_overcommit: float | None = None
    warn_free: Threshold | None = None
    critical_free: Threshold | None = None
    min_free: Threshold | None = None


NOTHING_OF_SPACE: Final = SpaceSettings()


def parse_threshold(text: str) -> Threshold:
    """A size or a percentage below 100; InvalidError."""
    share = _SHARE.fullmatch(text.strip())
    if share is not None:
        return Threshold(share=float(share[1]) / 100)
    try:
        return Threshold(size=parse_size(text))
    except InvalidError:
        raise InvalidError(
            f"{text!r} is no size such as '20G' and no part of the disk such as '10%'"
        ) from None


def read_space(table: Table) -> SpaceSettings:
    return SpaceSettings(
        table.decimal("max_overcommit", MOST_OVERCOMMIT),
        *(_read_threshold(table, key) for key in SPACE_KEYS[1:]),
    )


def _read_threshold(table: Table, key: str) -> Threshold | None:
    meaning = "a size such as '20G', or a part of the disk such as '10%'"
    text = table.text(key, meaning)
    try:
        return None if text is None else parse_threshold(text)
    except InvalidError:
        raise table.error(key, f"a string: {meaning}") from None


def combine_space(command_line: SpaceSettings, file: SpaceSettings) -> SpacePolicy:
    """The policy; what the command line says wins. InvalidError."""
    default = DEFAULT_POLICY
    most = command_line.max_overcommit or file.max_overcommit
    policy = SpacePolicy(
        most,
        command_line.warn_free or file.warn_free or default.warn_free,
        command_line.critical_free or file.critical_free or default.critical_free,
        command_line.min_free or file.min_free or default.min_free,
    )
    warn, critical = policy.warn_free, policy.critical_free
    if critical.share > warn.share > 0 or critical.size > warn.size > 0:
        raise InvalidError("[space]: 'critical_free' must not be more than 'warn_free'")
    return policy
