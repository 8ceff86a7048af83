"""What the handlers of one control application share."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from backends.layers import LayerStore
from nbdserve.control.operations import Operations
from snapshots.catalogue import Catalogue
from snapshots.transfer import Import


@dataclass
class Host:
    """The process that serves the data directory."""

    data: Path
    daemon: bool
    listening: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.time)


@dataclass
class State:
    """Of one application."""

    catalogue: Catalogue
    store: LayerStore
    host: Host
    operations: Operations = field(default_factory=Operations)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    imports: dict[str, Import] = field(default_factory=dict)
    backups: set[str] = field(default_factory=set)
    """Names of the volumes that are being backed up."""


STATE = web.AppKey("state", State)


def state_of(request: web.Request) -> State:
    return request.app[STATE]
