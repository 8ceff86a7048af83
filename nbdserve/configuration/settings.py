"""What the daemon is told: the command line, which wins, and a file (see file.py).

Each source is read into ``Settings``; ``combine`` makes the ``Configuration`` of both:

- The settings of TLS are those of all listeners, key by key, unless a listener has its own.
- ``--listen`` takes the place of all the addresses that the file names. A table of the file holds
  for its address nevertheless: naming it once more must not let more clients in.
- A listener that the file has no table for lets in whoever can connect.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backends.errors import InvalidError
from nbdserve.configuration.listeners import (
    ListenerConfiguration,
    ListenerSettings,
    combine_listener,
    find_listeners,
)
from nbdserve.configuration.space import NOTHING_OF_SPACE, SpaceSettings, combine_space
from nbdserve.configuration.tls import NOTHING_OF_TLS, TlsSettings, override
from nbdserve.server.connection import HANDSHAKE_TIMEOUT
from nbdserve.server.permissions import ExportRule
from snapshots.space import DEFAULT_POLICY, SpacePolicy

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
MAX_WORKERS: Final = 64
MOST_BY_DEFAULT: Final = 4


@dataclass(frozen=True)
class Settings:
    """One source's say; None where it says nothing. ``handshake_timeout`` is in seconds."""

    data: Path | None = None
    listen: tuple[str, ...] | None = None
    log_level: str | None = None
    tls: TlsSettings = NOTHING_OF_TLS
    workers: int | None = None
    handshake_timeout: int | None = None
    listeners: tuple[ListenerSettings, ...] = ()
    exports: tuple[ExportRule, ...] = ()
    space: SpaceSettings = NOTHING_OF_SPACE


@dataclass(frozen=True)
class Configuration:
    """What the daemon runs with.

    ``workers`` is the number of processes that serve volumes; 1 is the daemon itself.
    ``handshake_timeout`` is in seconds. The first of ``exports`` that is for a volume holds.
    """

    data: Path
    listeners: tuple[ListenerConfiguration, ...]
    log_level: str
    workers: int = 1
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    exports: tuple[ExportRule, ...] = ()
    space: SpacePolicy = DEFAULT_POLICY


def combine(command_line: Settings, file: Settings) -> Configuration:
    """The configuration; what the command line says wins."""
    data = command_line.data or file.data
    if data is None:
        raise InvalidError(
            "no data directory: give --data DIR, set NBDSERVE_DATA or write 'data' in the"
            " configuration file"
        )
    # Absolute, since its parts are shown to people and to other processes.
    data = data.absolute()
    tls = override(file.tls, command_line.tls)
    listeners = tuple(
        combine_listener(found, tls)
        for found in find_listeners(command_line.listen, file.listen, file.listeners, data)
    )
    _check_certificates_can_be_shown(file.exports, listeners)
    return Configuration(
        data=data,
        listeners=listeners,
        log_level=command_line.log_level or file.log_level or "info",
        workers=command_line.workers or file.workers or default_workers(),
        handshake_timeout=file.handshake_timeout or HANDSHAKE_TIMEOUT,
        exports=file.exports,
        space=combine_space(command_line.space, file.space),
    )


def default_workers() -> int:
    """One for each core that this process may use, up to MOST_BY_DEFAULT."""
    return min(len(os.sched_getaffinity(0)), MOST_BY_DEFAULT)


def _check_certificates_can_be_shown(
    exports: Sequence[ExportRule], listeners: Sequence[ListenerConfiguration]
) -> None:
    if any(found.tls is not None and found.tls.client_ca is not None for found in listeners):
        return
    for rule in exports:
        if rule.certificates:
            raise InvalidError(
                f"exports named {rule.pattern!r} want clients' certificates, and no listener asks"
                " for any: give a tls_client_ca"
            )
