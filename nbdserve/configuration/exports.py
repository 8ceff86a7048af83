"""Which exports are for whom: the tables ``[[export]]``."""

import re
from typing import Final

from backends.errors import InvalidError
from nbdserve.configuration.listeners import MOST_CONNECTIONS
from nbdserve.configuration.table import Table
from nbdserve.server.permissions import ExportRule
from snapshots.limits import LIMIT_NAMES, MOST, Limits
from snapshots.names import parse_size

EXPORT_KEYS: Final = ("name", "allow_certificates", "max_connections", *LIMIT_NAMES)

_PATTERN: Final = re.compile(r"[A-Za-z0-9._*?\[\]!-]+", re.ASCII)


def read_export(table: Table) -> ExportRule:
    pattern = table.required_text("name", "a volume, or a pattern such as 'web*'")
    if not _PATTERN.fullmatch(pattern):
        raise table.error(
            "name",
            "a pattern over names of volumes, of letters, digits, '.', '_', '-', '*', '?' and"
            " '[a-z]'; their snapshots are included",
        )
    names = table.texts("allow_certificates", "each a name that a client's certificate may have")
    return ExportRule(
        pattern,
        frozenset(name.lower() for name in names or ()),
        table.number("max_connections", MOST_CONNECTIONS),
        _read_limits(table),
    )


def _read_limits(table: Table) -> Limits:
    limits = Limits(
        table.number("iops", MOST["iops"], "requests a second"),
        table.number("iops_burst", MOST["iops_burst"], "requests"),
        _read_size(table, "bandwidth", "bytes a second"),
        _read_size(table, "bandwidth_burst", "bytes"),
    )
    try:
        return limits.check()
    except InvalidError as error:
        raise InvalidError(f"{table.where}: {error}") from None


def _read_size(table: Table, key: str, unit: str) -> int | None:
    meaning = f"a number of {unit}, or a text such as '50M'"
    value = table.text_or_number(key, meaning)
    if value is None:
        return None
    try:
        size = parse_size(value) if isinstance(value, str) else value
    except InvalidError:
        raise table.error(key, meaning) from None
    if not 1 <= size <= MOST[key]:
        raise table.error(key, f"{unit} from 1 to {MOST[key]}")
    return size
