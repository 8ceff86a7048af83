"""What the daemon is told: the command line, which wins, and a file (see file.py).

Each source is read into ``Settings``; ``combine`` makes the ``Configuration`` of both:

- The settings of TLS are those of all listeners, key by key, unless a listener has its own.
- ``--listen`` takes the place of all the addresses that the file names. A table of the file holds
  for its address nevertheless: naming it once more must not let more clients in.
- A listener that the file has no table for lets in whoever can connect.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from backends.errors import InvalidError
from nbdserve.configuration.listeners import (
    ListenerConfiguration,
    ListenerSettings,
    combine_listener,
    find_listeners,
)
from nbdserve.configuration.policies import Policy
from nbdserve.configuration.problems import Problems
from nbdserve.configuration.space import NOTHING_OF_SPACE, SpaceSettings, combine_space
from nbdserve.configuration.tls import NOTHING_OF_TLS, TlsSettings, override
from nbdserve.configuration.watching import (
    NOTHING_OF_WATCHING,
    WatchingConfiguration,
    WatchingSettings,
    combine_watching,
)
from nbdserve.logs import DEFAULT_LOGS, Logs
from nbdserve.server.connection import HANDSHAKE_TIMEOUT
from nbdserve.server.permissions import ExportRule
from snapshots.space import DEFAULT_POLICY, SpacePolicy

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("text", "json")
MAX_WORKERS: Final = 64
MAX_HANDSHAKE_TIMEOUT: Final = 3600
MAX_DRAIN_SECONDS: Final = 3600
DRAIN_SECONDS: Final = 30
"""How long requests in flight may take once the daemon stops, where nothing else is configured."""

MOST_BY_DEFAULT: Final = 4


@dataclass(frozen=True)
class Settings:
    """One source's say; None where it says nothing. Times are in seconds."""

    data: Path | None = None
    listen: tuple[str, ...] | None = None
    log_level: str | None = None
    tls: TlsSettings = NOTHING_OF_TLS
    workers: int | None = None
    handshake_timeout: int | None = None
    drain_seconds: int | None = None
    log_format: str | None = None
    watching: WatchingSettings = NOTHING_OF_WATCHING
    listeners: tuple[ListenerSettings, ...] = ()
    exports: tuple[ExportRule, ...] = ()
    policies: tuple[Policy, ...] = ()
    space: SpaceSettings = NOTHING_OF_SPACE


@dataclass(frozen=True)
class Configuration:
    """What the daemon runs with.

    ``workers`` is the number of processes that serve volumes; 1 is the daemon itself.
    ``handshake_timeout`` and ``drain_seconds`` are in seconds. The first of ``exports`` that is for
    a volume holds.
    """

    data: Path
    listeners: tuple[ListenerConfiguration, ...]
    logs: Logs = DEFAULT_LOGS
    workers: int = 1
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    watching: WatchingConfiguration = field(default_factory=WatchingConfiguration)
    exports: tuple[ExportRule, ...] = ()
    drain_seconds: float = DRAIN_SECONDS
    space: SpacePolicy = DEFAULT_POLICY


def combine(command_line: Settings, file: Settings) -> Configuration:
    """The configuration; what the command line says wins. ConfigurationError has all problems."""
    problems = Problems()
    data = command_line.data or file.data
    if data is None:
        problems.add(
            InvalidError(
                "no data directory: give --data DIR, set NBDSERVE_DATA or write 'data' in the"
                " configuration file"
            )
        )
        data = Path()
    # Absolute, since its parts are shown to people and to other processes.
    data = data.absolute()
    tls = override(file.tls, command_line.tls)
    found = problems.attempt(
        lambda: find_listeners(command_line.listen, file.listen, file.listeners, data)
    )
    combined = [
        problems.attempt(partial(combine_listener, listener, tls)) for listener in found or ()
    ]
    problems.check()
    listeners = tuple(listener for listener in combined if listener is not None)
    _check_certificates_can_be_shown(file.exports, listeners)
    return Configuration(
        data=data,
        listeners=listeners,
        logs=Logs(
            command_line.log_level or file.log_level or DEFAULT_LOGS.level,
            command_line.log_format or file.log_format or DEFAULT_LOGS.form,
        ),
        workers=command_line.workers or file.workers or default_workers(),
        handshake_timeout=(
            command_line.handshake_timeout or file.handshake_timeout or HANDSHAKE_TIMEOUT
        ),
        watching=combine_watching(command_line.watching, file.watching),
        exports=file.exports,
        drain_seconds=command_line.drain_seconds or file.drain_seconds or DRAIN_SECONDS,
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
