"""What the handlers of one control application share."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from backends.layers import LayerStore
from nbdserve.control import history
from nbdserve.control.history import History
from nbdserve.control.jobs import Jobs
from nbdserve.control.operations import Operations
from nbdserve.limiting import Limiting
from nbdserve.measuring import Measuring
from nbdserve.reloading import Outcome
from nbdserve.server.permissions import Permissions
from snapshots.catalogue import Catalogue
from snapshots.transfer import Import


@dataclass
class Host:
    """The process that serves the data directory."""

    data: Path
    daemon: bool
    listening: list[str] = field(default_factory=list)
    http: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.time)


@dataclass(frozen=True, eq=False)
class BackupClaim:
    """A backup that is under way: of which volumes, by which policy (None: by none), and who.

    ``process`` is its number, ``started`` seconds since the epoch.
    """

    volumes: Sequence[str]
    policy: str | None
    process: int
    started: float = field(default_factory=time.time)


@dataclass
class State:
    """Of one application."""

    catalogue: Catalogue
    store: LayerStore
    host: Host
    operations: Operations = field(default_factory=Operations)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    reload: Callable[[], Coroutine[Any, Any, Outcome]] | None = None
    """Reads the configuration again; None where a command serves for a daemon."""
    imports: dict[str, Import] = field(default_factory=dict)
    measuring: Measuring = field(default_factory=Measuring)
    backups: list[BackupClaim] = field(default_factory=list)
    jobs: Jobs = field(default_factory=Jobs)
    history: History = field(init=False)
    rules: Permissions | None = None
    limiting: Limiting = field(init=False)

    def __post_init__(self) -> None:
        self.limiting = Limiting(self.catalogue, self.measuring, self.rules)
        self.history = History(self.host.data / history.FILE, self.catalogue.volume_names_by_id)


STATE = web.AppKey("state", State)


def state_of(request: web.Request) -> State:
    return request.app[STATE]
