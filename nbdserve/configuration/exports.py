"""Which exports are for whom: the tables ``[[export]]``."""

import re
from typing import Final

from nbdserve.configuration.listeners import MOST_CONNECTIONS
from nbdserve.configuration.table import Table
from nbdserve.server.permissions import ExportRule

EXPORT_KEYS: Final = ("name", "allow_certificates", "max_connections")

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
    )
