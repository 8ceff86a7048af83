"""Telling whoever serves the data directory how far a push or restore is, and how it ended.

That is for people and monitoring. So nothing here fails the work, or has it wait: a daemon that is
restarted meanwhile is told of the job again, one that does not answer is told nothing.
"""

import threading
from contextlib import suppress
from socket import socket
from types import TracebackType
from typing import Self

import click

from backends.errors import NotFoundError, StorageError, UnavailableError, one_line
from nbdserve.cli.session import Session, connect
from nbdserve.control.client import Answer, Client, path
from snapshots.repository import PushReport

_SECONDS_BETWEEN_UPDATES = 1.0
_PATIENCE = 5.0  # seconds


def report_failure(client: Client, volume: str, url: str, error: BaseException) -> None:
    """Have it noted that a volume could not be backed up; as far as anybody is there to do it."""
    why = one_line(error) if isinstance(error, Exception) else "it was interrupted"
    with suppress(StorageError, OSError):
        client.post(path("history"), {"volume": volume, "repository": url, "failure": why})


class JobReport:
    """One job, for as long as the context lasts; :meth:`update` may be called from any thread.

    A push that ends by an error is reported as a failure; one that ended well is, by
    :meth:`succeeded`.
    """

    def __init__(self, session: Session, kind: str, volume: str, snapshot: str, url: str) -> None:
        self._session = session
        self._job = {"kind": kind, "volume": volume, "snapshot": snapshot, "repository": url}
        self._client = Client(self._connect)
        self._position = (0, 0)
        self._claim: Answer | None = None
        self._identifier = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job report", daemon=True)

    def __enter__(self) -> Self:
        self._tell()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop_updates()
        try:
            if error is not None and self._job["kind"] == "push":
                report_failure(self._client, self._job["volume"], self._job["repository"], error)
        finally:
            self._let_go()

    def update(self, done: int, total: int) -> None:
        """``done`` bytes of ``total`` are done."""
        self._position = (done, total)

    def succeeded(self, repository_id: str, created: float, report: PushReport) -> None:
        """The snapshot, which was ``created`` then (seconds since the epoch), is pushed."""
        self._stop_updates()
        outcome = {
            "volume": self._job["volume"],
            "repository": self._job["repository"],
            "repository_id": repository_id,
            "snapshot": report.snapshot,
            "created": max(0.0, created),
            "uploaded": report.uploaded,
            "seconds": report.seconds,
        }
        try:
            self._session.client.post(path("history"), outcome)
        except (StorageError, OSError) as error:
            line = f"nbdserve: warning: that the push is done cannot be noted: {one_line(error)}"
            click.echo(line, err=True)

    def _stop_updates(self) -> None:
        """No more of them: a job that were told anew now would seem to end without an outcome."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_UPDATES):
            self._tell()

    def _tell(self) -> None:
        """Say how far it is; to a daemon that does not know the job, what it is."""
        done, total = self._position
        try:
            if self._claim is None:
                self._claim = self._client.stream("POST", path("jobs"), self._job)
                self._identifier = self._claim.first()["job"]
            self._client.post(path("jobs", self._identifier), {"done": done, "total": total})
        except NotFoundError:  # it was restarted
            self._let_go()
        except (StorageError, OSError):
            if not self._identifier:
                self._let_go()

    def _let_go(self) -> None:
        claim, self._claim, self._identifier = self._claim, None, ""
        if claim is not None:
            claim.__exit__(None, None, None)

    def _connect(self) -> socket:
        """Only to somebody who serves: this must not take the lock in the place of a daemon."""
        connection = connect(self._session.data)
        if connection is None:
            raise UnavailableError("nobody serves the data directory")
        connection.settimeout(_PATIENCE)
        return connection
