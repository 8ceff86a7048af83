"""The long work on repositories that commands are at, as far as they tell.

A job is there for as long as the command that does it holds its claim on the control socket
(``reports``), so a command that is killed leaves none. What is told of it is for people and
monitoring alone; nothing depends on it.
"""

import secrets
import time
from dataclasses import dataclass, field
from typing import Final

from backends.errors import InUseError, NotFoundError

KINDS: Final = ("push", "restore")
MOST_JOBS: Final = 1000


@dataclass
class Job:
    """One piece of work.

    ``kind`` is one of KINDS; ``volume`` and ``snapshot`` are what is pushed, or the volume that is
    made and the VOL@SNAP that it is made of. ``repository`` is its URL. ``done`` of ``total`` bytes
    are done; both may still grow, and are 0 until the command knows. ``started`` is in seconds
    since the epoch.
    """

    kind: str
    volume: str
    snapshot: str
    repository: str
    done: int = 0
    total: int = 0
    started: float = field(default_factory=time.time)
    settled: bool = False
    """Whether its outcome was reported."""


class Jobs:
    """Those that are under way, by an identifier that their command is told."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def list(self) -> list[Job]:
        """In the order of their beginning."""
        return [*self._jobs.values()]

    def begin(self, job: Job) -> str:
        """Its identifier. InUseError when there are too many."""
        if len(self._jobs) >= MOST_JOBS:
            raise InUseError(f"{MOST_JOBS} jobs are under way, more are not listed")
        identifier = secrets.token_hex(8)
        self._jobs[identifier] = job
        return identifier

    def find(self, identifier: str) -> Job:
        """NotFoundError when it has ended, or this process was not told of it."""
        try:
            return self._jobs[identifier]
        except KeyError:
            raise NotFoundError("there is no such job") from None

    def end(self, identifier: str) -> None:
        """Its command has ended, or was killed."""
        del self._jobs[identifier]

    def settle(self, volume: str, repository: str) -> None:
        """How the pushes of this volume to this repository ended was reported."""
        for job in self._jobs.values():
            if job.kind == "push" and (job.volume, job.repository) == (volume, repository):
                job.settled = True
