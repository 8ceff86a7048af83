"""``nbdserve backup``: one line in a crontab.

In order: open the repository (nothing is changed when it cannot be used), claim the volumes, take a
snapshot of all of them at one instant, push each, and delete a volume's older backup snapshots
once its new one is in the repository. The newest stays: the next backup is cheap because the
volume can tell what was written since. A snapshot whose push failed is deleted again.

A backup of the volume that was killed, or lost its store, is not wasted: the claim makes sure that
no two backups of a volume are under way, so this push goes on with the last one's, whose intent
names the volume's id: what that had uploaded, and what is the same now, is taken from there.

With rules of what to keep, the repository is pruned of older backups of each volume whose push
succeeded: never of the one pushed just now, and never of snapshots that a backup did not make.
"""

import dataclasses
import time
from datetime import UTC, datetime
from typing import Any

import click

from backends.errors import StorageError, one_line
from nbdserve.cli.completing import complete_volume
from nbdserve.cli.keeping import storage_class_option
from nbdserve.cli.key_options import add_key_options
from nbdserve.cli.limits import limit_options
from nbdserve.cli.options import data_directory, data_option, json_option
from nbdserve.cli.output import print_json
from nbdserve.cli.pruning import (
    delete_pruned,
    given_rules,
    keep_options,
    prune_document,
    prune_line,
)
from nbdserve.cli.reports import print_notice, print_warnings, push_line
from nbdserve.cli.session import Session
from nbdserve.cli.snapshot import delete_snapshot
from nbdserve.cli.transfer import push
from nbdserve.cli.unlocking import open_repository
from nbdserve.control.client import path
from snapshots.names import check_name
from snapshots.repository import PushReport, Repository
from snapshots.repository.prune import plan_prune
from snapshots.repository.retention import Rules

LABEL = "backup"
"""Label of a snapshot that a backup made; its value is the repository's id."""


@click.command()
@click.argument("volumes", metavar="VOL…", nargs=-1, required=True, shell_complete=complete_volume)
@click.option("--repo", "url", metavar="URL", required=True, help="Where to.")
@keep_options
@storage_class_option
@limit_options
@data_option
@json_option
def backup(volumes: tuple[str, ...], url: str, as_json: bool, **given: Any) -> None:
    """Take a snapshot of the volumes, all at one instant, and push what changed since the last.

    Of the snapshots that earlier backups made, only the newest stays in the data directory. In the
    repository all of them stay, unless --keep-… options say which.
    """
    names = [check_name("volume", volume) for volume in dict.fromkeys(volumes)]
    data = data_directory()
    repository = open_repository(url)
    print_notice(repository)
    with Session(data) as session:
        run = _Backup(session, repository, url, given_rules(given))
        run.run(names)
    if as_json:
        print_json({"backups": run.reports})
    else:
        for line in run.lines:
            click.echo(line)
    if run.failures:
        raise StorageError("; ".join(run.failures))


add_key_options(backup)


class _Backup:
    """One run; ``reports`` has an object a volume, in order."""

    def __init__(self, session: Session, repository: Repository, url: str, rules: Rules) -> None:
        self._session = session
        self._repository = repository
        self._url = url
        self._rules = rules
        self._labels = {LABEL: repository.config.repository_id}
        self.reports: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.failures: list[str] = []

    def run(self, volumes: list[str]) -> None:
        client = self._session.client
        with client.stream("POST", path("backups"), {"volumes": volumes}) as claim:
            claim.first()
            name = self._new_name(volumes)
            targets = [f"{volume}@{name}" for volume in volumes]
            client.post(path("snapshots"), {"snapshots": targets, "labels": self._labels})
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
            except BaseException:
                for volume in waiting:
                    self._delete(volume, name)
                raise

    def _new_name(self, volumes: list[str]) -> str:
        """The name is the time, in seconds: wait for the next when this one is taken."""
        while True:
            name = datetime.now(UTC).strftime("backup-%Y%m%dT%H%M%SZ")
            if not any(found["name"] == name for v in volumes for found in self._snapshots(v)):
                return name
            time.sleep(0.1)

    def _push(self, volume: str, name: str) -> PushReport | None:
        try:
            line = self._session.client.get(path("volumes", volume))["id"]
            report = push(self._session, self._repository, self._url, volume, name, line)
        except (StorageError, OSError) as error:
            line = one_line(error)
            self.failures.append(
                f"backup of {volume} failed, and its snapshot was deleted again: {line}"
            )
            self.reports.append({"volume": volume, "snapshot": None, "error": line})
            return None
        print_warnings(report)
        self.lines.append(push_line(report))
        self.reports.append(dataclasses.asdict(report))
        return report

    def _prune(self, volume: str, push: str) -> None:
        """Prune the repository of the volume's older backups; ``push`` was made just now."""
        if self._rules.empty:
            return
        try:
            decisions = plan_prune(
                self._repository, volume, self._rules, spared={push}, only_backups=True
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
            if found["name"] != name and found["labels"].get(LABEL) == self._labels[LABEL]:
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
