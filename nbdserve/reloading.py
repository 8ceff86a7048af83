"""A changed configuration is applied while the daemon runs: all of it, or nothing.

Each part of the daemon that a configuration says something about registers a function. It compares
the old configuration with the new one and *prepares* a ``Change``: it reads files and binds
sockets, whatever may fail, and changes nothing yet. When all parts are prepared, every change is
applied, which cannot fail; when one is not, what the others prepared is discarded.

What only a restart can change keeps its old value, and is said at each reload.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from backends.errors import StorageError, UnavailableError, one_line
from nbdserve.configuration.problems import ConfigurationError
from nbdserve.configuration.settings import Configuration
from nbdserve.configuration.watching import WATCHING_KEYS
from nbdserve.systemd.notify import Notifier

T = TypeVar("T")

log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Change:
    """``what`` is changed, a line each; ``apply`` does it, ``discard`` takes it back unapplied."""

    what: Sequence[str]
    apply: Callable[[], None]
    discard: Callable[[], None] = _nothing


Prepare = Callable[[Configuration, Configuration], Awaitable[Change | None]]
"""Of the old and the new configuration; None where nothing is changed. StorageError."""


@dataclass(frozen=True)
class Outcome:
    """What a reload has changed, and what it could not; a line each."""

    changed: list[str]
    needs_restart: list[str]


def change_of(
    name: str,
    get: Callable[[Configuration], T],
    use: Callable[[T], None],
    *,
    show: Callable[[T], str] | None = str,
) -> Prepare:
    """For what is one value: ``use`` is called with the new one; ``show`` None says no values."""

    async def prepare(old: Configuration, new: Configuration) -> Change | None:
        before, after = get(old), get(new)
        if before == after:
            return None
        what = name if show is None else f"{name}: {show(after)} instead of {show(before)}"
        return Change([what], lambda: use(after))

    return prepare


class Reloader:
    """``read`` returns the configuration as it now is; parts are prepared in their order."""

    def __init__(
        self,
        configuration: Configuration,
        read: Callable[[], Configuration],
        notifier: Notifier,
    ) -> None:
        self.configuration = configuration
        self._notifier = notifier
        self._read = read
        self._parts: list[Prepare] = []
        self._running = asyncio.Lock()
        self._closed = False

    def add(self, part: Prepare) -> None:
        self._parts.append(part)

    def close(self) -> None:
        """Apply nothing any more: the daemon stops."""
        self._closed = True

    async def reload(self) -> Outcome:
        """Apply what has changed; raises StorageError, and then nothing is changed."""
        async with self._running:
            self._notifier.reloading()
            try:
                outcome = await self._reload()
            except ConfigurationError as error:
                for problem in error.problems:
                    log.error("the configuration stays as it was: %s", problem)
                raise
            except StorageError as error:
                log.error("the configuration stays as it was: %s", one_line(error))
                raise
            finally:
                self._notifier.ready("Serving")
        for line in outcome.changed:
            log.info("changed: %s", line)
        for line in outcome.needs_restart:
            log.warning("needs a restart: %s", line)
        if not outcome.changed and not outcome.needs_restart:
            log.info("nothing has changed that the daemon goes by")
        return outcome

    async def _reload(self) -> Outcome:
        old = self.configuration
        wanted = await asyncio.to_thread(self._read)
        new = replace(wanted, data=old.data, workers=old.workers, watching=old.watching)
        prepared: list[Change] = []
        try:
            for part in self._parts:
                change = await part(old, new)
                if change is not None:
                    prepared.append(change)
        except BaseException:
            for change in reversed(prepared):
                change.discard()
            raise
        if self._closed:
            for change in reversed(prepared):
                change.discard()
            raise UnavailableError("nbdserve is shutting down")
        for change in prepared:
            change.apply()
        self.configuration = new
        return Outcome(
            [line for change in prepared for line in change.what],
            [
                f"{name}: {_shown(after)} instead of {_shown(before)}"
                for name, before, after in (
                    ("data", old.data, wanted.data),
                    ("workers", old.workers, wanted.workers),
                    *(
                        (key, getattr(old.watching, key), getattr(wanted.watching, key))
                        for key in WATCHING_KEYS
                    ),
                )
                if before != after
            ],
        )


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
