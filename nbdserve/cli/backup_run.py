"""One run of a backup.

In order: find the volumes, claim them (and the policy), open the repository, freeze, take a
snapshot of all of them at one instant, thaw, push each, and delete a volume's older backup
snapshots once its new one is in the repository. The newest stays: the next backup is cheap because
the volume can tell what was written since. A snapshot whose push failed is deleted again. When
anything before the first push fails, nothing has changed.

A backup of the volume that was killed, or lost its store, is not wasted: the claim makes sure that
no two backups of a volume are under way, so this push goes on with the last one's, whose intent
names the volume's id: what that had uploaded, and what is the same now, is taken from there.

With rules of what to keep, the repository is pruned of older backups of each volume whose push
succeeded: never of the one pushed just now, and never of snapshots that a backup did not make.

How it went is in ``reports``, ``lines`` and ``failures`` as far as it came; and whoever serves the
data directory is told of each volume (nbdserve/control/history.py).
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click

from backends.errors import InUseError, StorageError, one_line
from nbdserve.cli.backup_plan import Plan, Selection
from nbdserve.cli.job_report import report_failure
from nbdserve.cli.pruning import delete_pruned, prune_document, prune_line
from nbdserve.cli.reports import print_notice, print_warnings, push_line
from nbdserve.cli.session import Session
from nbdserve.cli.snapshot import delete_snapshot
from nbdserve.cli.transfer import push
from nbdserve.cli.unlocking import open_repository
from nbdserve.control.client import path
from nbdserve.hooks.freezing import Freezing
from nbdserve.labels import BACKUP
from snapshots.repository import PushReport, Repository
from snapshots.repository.prune import plan_prune

_SECONDS_BETWEEN_TRIES = 1.0


class AnotherRunsError(InUseError):
    """Nothing was done: another backup of a volume, or another run of the policy, is under way."""


class BackupRun:
    """``reports`` has an object a volume, in order; ``hooks`` is None as long as none has run."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self._session = session
        self._plan = plan
        self._repository: Repository
        self._labels: dict[str, str]
        self.snapshot: str | None = None
        self.hooks: dict[str, Any] | None = None
        self.reports: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.failures: list[str] = []

    def run(self, patience: float) -> None:
        """Wait for others at most so many seconds; StorageError when no push was come to."""
        with self._claimed(patience) as selection:
            for volume, why in selection.lost.items():
                self._fail(volume, why, f"volume {volume} is not backed up: {why}")
            if selection.volumes:
                with self._noting_failures(selection.volumes):
                    self._begin(selection.volumes)
                self._push_all(selection.volumes)

    @contextmanager
    def _claimed(self, patience: float) -> Iterator[Selection]:
        """What is backed up; nobody else backs it up inside."""
        client = self._session.client
        deadline = time.monotonic() + patience
        told = False
        while True:
            selection = self._plan.select(client)
            if not selection.volumes:
                yield selection
                return
            body = {"volumes": selection.volumes, "policy": self._plan.policy_name}
            try:
                claim = client.stream("POST", path("backups"), body)
                break
            except InUseError as error:
                if time.monotonic() >= deadline:
                    raise AnotherRunsError(f"nothing is backed up: {error}") from None
                if not told:
                    click.echo(f"nbdserve: waiting, for {error}", err=True)
                    told = True
            time.sleep(_SECONDS_BETWEEN_TRIES)
        with claim:
            claim.first()
            yield selection

    @contextmanager
    def _noting_failures(self, volumes: list[str]) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            for volume in volumes:
                report_failure(self._session.client, volume, self._plan.url, error)
            raise

    def _begin(self, volumes: list[str]) -> None:
        """Open the repository, and take the snapshot; with an error, none is left."""
        self._repository = open_repository(self._plan.url)
        print_notice(self._repository)
        self._labels = {BACKUP: self._repository.config.repository_id}
        name = self._new_name(volumes)
        body = {"snapshots": [f"{volume}@{name}" for volume in volumes], "labels": self._labels}
        if self._plan.hooks is None:
            self._session.client.post(path("snapshots"), body)
        else:
            freezing = Freezing(self._plan.hooks, volumes, self._plan.policy_name, name)
            try:
                with freezing:
                    self._session.client.post(path("snapshots"), body)
            finally:
                self.hooks = {"freeze": freezing.freeze, "thaw": freezing.thaw}
                if freezing.problem is not None:
                    self.failures.append(freezing.problem)
            try:
                freezing.check_in_time()
            except StorageError:
                for volume in volumes:
                    self._delete(volume, name)
                raise
        self.snapshot = name

    def _new_name(self, volumes: list[str]) -> str:
        """The name is the time, in seconds: wait for the next when this one is taken."""
        while True:
            name = datetime.now(UTC).strftime("backup-%Y%m%dT%H%M%SZ")
            if not any(found["name"] == name for v in volumes for found in self._snapshots(v)):
                return name
            time.sleep(0.1)

    def _push_all(self, volumes: list[str]) -> None:
        assert self.snapshot is not None
        name = self.snapshot
        waiting = list(volumes)
        try:
            while waiting:
                report = self._push(waiting[0], name)
                volume = waiting.pop(0)
                if report is None:
                    self._delete(volume, name)
                else:
                    self._delete_older(volume, name)
                    self._prune(volume, report.push)
        except BaseException as error:
            for volume in waiting:
                self._delete(volume, name)
                report_failure(self._session.client, volume, self._plan.url, error)
            raise

    def _push(self, volume: str, name: str) -> PushReport | None:
        session, url = self._session, self._plan.url
        try:
            line = session.client.get(path("volumes", volume))["id"]
            report = push(session, self._repository, url, volume, name, line)
        except (StorageError, OSError) as error:
            report_failure(session.client, volume, url, error)
            line = one_line(error)
            told = f"backup of {volume} failed, and its snapshot was deleted again: {line}"
            self._fail(volume, line, told)
            return None
        print_warnings(report)
        self.lines.append(push_line(report))
        self.reports.append(dataclasses.asdict(report))
        return report

    def _fail(self, volume: str, why: str, line: str) -> None:
        self.failures.append(line)
        self.reports.append({"volume": volume, "snapshot": None, "error": why})

    def _prune(self, volume: str, push: str) -> None:
        """Prune the repository of the volume's older backups; ``push`` was made just now."""
        if self._plan.rules.empty:
            return
        try:
            decisions = plan_prune(
                self._repository, volume, self._plan.rules, spared={push}, only_backups=True
            )
            decisions = delete_pruned(self._repository, volume, decisions)
        except (StorageError, OSError) as error:
            line = one_line(error)
            self.failures.append(f"{volume} is backed up, but older backups stay: {line}")
            self.reports[-1]["prune"] = {"error": line}
            return
        self.lines.append(prune_line(volume, decisions))
        self.reports[-1]["prune"] = prune_document(volume, decisions)

    def _delete_older(self, volume: str, name: str) -> None:
        """Delete what earlier backups to this repository left; a failed one's rest included."""
        for found in self._snapshots(volume):
            if found["name"] != name and found["labels"].get(BACKUP) == self._labels[BACKUP]:
                self._delete(volume, found["name"])

    def _delete(self, volume: str, name: str) -> None:
        try:
            delete_snapshot(self._session.client, volume, name)
        except StorageError as error:
            click.echo(f"nbdserve: warning: {volume}@{name} stays: {error}", err=True)

    def _snapshots(self, volume: str) -> list[dict[str, Any]]:
        where = path("volumes", volume, "snapshots")
        snapshots: list[dict[str, Any]] = self._session.client.get(where)["snapshots"]
        return snapshots
