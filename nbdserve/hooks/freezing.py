"""The backup's side of a freeze: see the package's text."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backends.errors import StorageError, UnavailableError
from nbdserve.hooks.commands import say, still_frozen, thaw

Document = dict[str, Any]

DEFAULT_SECONDS = 30
MOST_SECONDS = 3600


@dataclass(frozen=True)
class Hooks:
    """The words of both commands; ``seconds`` are the most from one to the other."""

    freeze: tuple[str, ...]
    thaw: tuple[str, ...]
    seconds: float = DEFAULT_SECONDS


class Freezing:
    """A context in which guests are frozen: entering it raises StorageError when they are not.

    They are thawed when it is left, in whatever way, before it is left. ``freeze`` and ``thaw`` are
    then how the commands ended, ``{"status", "seconds", "attempts", "error"}``.
    """

    def __init__(
        self, hooks: Hooks, volumes: Sequence[str], policy: str | None, snapshot: str
    ) -> None:
        self._hooks = hooks
        self._environment = {
            **os.environ,
            "NBDSERVE_VOLUMES": " ".join(volumes),
            "NBDSERVE_POLICY": policy or "",
            "NBDSERVE_SNAPSHOT": snapshot,
        }
        self.freeze: Document | None = None
        self.thaw: Document | None = None
        self._late = False
        # Started before it is needed: once guests are frozen, or are about to be, time counts.
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nbdserve.hooks.watcher", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": _module_path()},
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise StorageError(f"cannot start what freezes: {error.strerror}") from None
        except BaseException:
            ours.close()  # which ends it
            raise
        finally:
            theirs.close()
        self._socket = ours
        self._answers = ours.makefile("rb")

    def __enter__(self) -> Self:
        told = {
            "freeze": self._hooks.freeze,
            "thaw": self._hooks.thaw,
            "seconds": self._hooks.seconds,
            "environment": self._environment,
        }
        try:
            self._socket.sendall(json.dumps(told).encode() + b"\n")
            self.freeze = self._answer()
        except BaseException as error:
            self._end()
            if isinstance(error, OSError):
                raise UnavailableError("what freezes has ended unexpectedly") from None
            raise
        if self.freeze is None or self.freeze["error"] is not None:
            self._end()
            why = "it ended unexpectedly" if self.freeze is None else self.freeze["error"]
            raise StorageError(f"not frozen: {why}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def check_in_time(self) -> None:
        """StorageError when the thaw came before the context was left."""
        if self._late:
            raise StorageError(
                f"the snapshot was not there {self._hooks.seconds:g} s after the freeze had begun,"
                " and what was frozen is thawed: see freeze_timeout"
            )

    @property
    def problem(self) -> str | None:
        """What to say about the thaw; None when it is well."""
        if self.thaw is None or self.thaw["error"] is None:
            return None
        return still_frozen(self.thaw["error"], self.thaw["attempts"])

    def _end(self) -> None:
        """Have it thawed, and wait until it is. When this is interrupted, the watcher goes on."""
        try:
            try:
                self._socket.shutdown(socket.SHUT_WR)
                self.thaw = self._answer() if self.freeze is not None else self._last_answer()
            except OSError:
                self.thaw = None
            if self.thaw is None:  # it was killed
                self._late = True
                say("warning: what freezes has ended unexpectedly; thawing")
                done = thaw(self._hooks.thaw, self._environment, self._hooks.seconds)
                self.thaw = done.document()
            else:
                self._late = self.thaw.pop("late")
        finally:
            self._answers.close()
            self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # it stays where a freeze command cannot be killed

    def _answer(self) -> Document | None:
        """The next line; None at the end."""
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            return None
        document: Document = json.loads(line)
        return document

    def _last_answer(self) -> Document | None:
        """The line about the thaw, behind the one about the freeze if that has not come yet."""
        self.freeze = self._answer()
        return None if self.freeze is None else self._answer()


def _module_path() -> str:
    """Where this process finds modules, for one that shall find the same."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
