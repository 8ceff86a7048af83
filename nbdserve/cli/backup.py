"""``nbdserve backup``: one line in a crontab.

In order: open the repository (nothing is changed when it cannot be used), claim the volumes, take a
snapshot of all of them at one instant, push each, and delete a volume's older backup snapshots
once its new one is in the repository. The newest stays: the next backup is cheap because the
volume can tell what was written since. A snapshot whose push failed is deleted again.
"""

import dataclasses
import time
from datetime import UTC, datetime
from typing import Any

import click

from backends.errors import StorageError, one_line
from nbdserve.cli.options import data_directory, data_option, json_option
from nbdserve.cli.output import print_json
from nbdserve.cli.repo import print_notice, print_warnings, push_line
from nbdserve.cli.session import Session
from nbdserve.cli.snapshot import delete_snapshot
from nbdserve.cli.transfer import push
from nbdserve.cli.unlocking import add_key_options, open_repository
from nbdserve.control.client import path
from snapshots.names import check_name
from snapshots.repository import Repository

LABEL = "backup"
"""Label of a snapshot that a backup made; its value is the repository's id."""


@click.command()
@click.argument("volumes", metavar="VOL…", nargs=-1, required=True)
@click.option("--repo", "url", metavar="URL", required=True, help="Where to.")
@data_option
@json_option
def backup(volumes: tuple[str, ...], url: str, as_json: bool) -> None:
    """Take a snapshot of the volumes, all at one instant, and push what changed since the last.

    Of the snapshots that earlier backups made, only the newest stays in the data directory.
    """
    names = [check_name("volume", volume) for volume in dict.fromkeys(volumes)]
    data = data_directory()
    repository = open_repository(url)
    print_notice(repository)
    with Session(data) as session:
        run = _Backup(session, repository)
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

    def __init__(self, session: Session, repository: Repository) -> None:
        self._session = session
        self._repository = repository
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
                    if self._push(waiting[0], name):
                        self._delete_older(waiting.pop(0), name)
                    else:
                        self._delete(waiting.pop(0), name)
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

    def _push(self, volume: str, name: str) -> bool:
        try:
            report = push(self._session, self._repository, volume, name)
        except (StorageError, OSError) as error:
            line = one_line(error)
            self.failures.append(
                f"backup of {volume} failed, and its snapshot was deleted again: {line}"
            )
            self.reports.append({"volume": volume, "snapshot": None, "error": line})
            return False
        print_warnings(report)
        self.lines.append(push_line(report))
        self.reports.append(dataclasses.asdict(report))
        return True

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
