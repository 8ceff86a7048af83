"""Push and restore, done by the command's own process.

The process that serves the data directory only pins the snapshot, or lends a layer to fill; the
reading, compressing and uploading happen here, so no guest waits for them, and with the
environment of whoever runs the command, so the daemon needs no credentials.
"""

import asyncio
from typing import Any

from backends.local_layers import LocalLayerStore
from backends.ownership import give_to_owner
from nbdserve.cli.job_report import JobReport
from nbdserve.cli.progress import Progress
from nbdserve.cli.session import Session
from nbdserve.control.client import Document, path
from snapshots.repository import PushReport, Repository, RestoreReport
from snapshots.sink import open_sink
from snapshots.source import open_source
from snapshots.transfer import SinkDescription, SnapshotRef, SourceDescription


def push(
    session: Session,
    repository: Repository,
    url: str,
    volume: str,
    snapshot: str,
    line: str = "",
) -> PushReport:
    """Push a snapshot of the data directory, and show the progress; see ``Repository.push``.

    Whoever serves the directory is told of it, and how it ended.
    """
    where = path("volumes", volume, "snapshots", snapshot, "pin")
    with session.client.stream("POST", where) as pin:
        description = _source_description(pin.first()["source"])
        source = asyncio.run(open_source(LocalLayerStore(session.data), description))
        try:
            with (
                JobReport(session, "push", volume, snapshot, url) as job,
                Progress(f"pushing {volume}@{snapshot}") as progress,
            ):

                def update(done: int, total: int) -> None:
                    job.update(done, total)
                    progress.update(done, total)

                report = repository.push(source, update, line=line)
                job.succeeded(repository.config.repository_id, description.created, report)
            return report
        finally:
            source.close()


def restore(
    session: Session,
    repository: Repository,
    url: str,
    volume: str,
    snapshot: str,
    new: str,
    *,
    skip_damaged: bool = False,
    force: bool = False,
) -> tuple[RestoreReport, Document]:
    """Make the volume ``new`` from a snapshot in the repository, and show the progress.

    Returns the report and the new volume's document. The volume appears when it is whole; what an
    earlier restore of the same was given up at is gone on with.
    """
    found = repository.find(volume, snapshot)
    origin = {
        "repository": repository.config.repository_id,
        "push": found.push,
        "source": f"{volume}@{snapshot} in {repository.store.name}",
    }
    body = {"volume": new, "size": found.size, "origin": origin, "force": force}
    with session.client.stream("POST", path("imports"), body) as claim:
        begun = claim.first()
        description = SinkDescription(**begun["sink"])
        sink = asyncio.run(open_sink(LocalLayerStore(session.data), description))
        try:
            with (
                JobReport(session, "restore", new, f"{volume}@{snapshot}", url) as job,
                Progress(f"restoring {volume}@{snapshot}") as progress,
            ):

                def update(done: int, total: int) -> None:
                    claim.check_held()
                    job.update(done, total)
                    progress.update(done, total)

                report = repository.restore(
                    volume, snapshot, sink, update, skip_damaged=skip_damaged
                )
            asyncio.run(sink.finish())
        finally:
            sink.close()
            give_to_owner(session.data)
        return report, session.client.post(path("imports", begun["import"], "commit"), {})


def _source_description(document: dict[str, Any]) -> SourceDescription:
    others = tuple(SnapshotRef(**other) for other in document["others"])
    merges = tuple(document["merges"])
    return SourceDescription(**{**document, "others": others, "merges": merges})
