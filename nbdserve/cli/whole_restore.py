"""``nbdserve repo restore`` of all data, at once."""

import dataclasses
from pathlib import Path

from nbdserve.cli.output import format_size, print_result
from nbdserve.cli.reports import check_whole, print_holes
from nbdserve.cli.session import Session
from nbdserve.cli.transfer import restore as restore_snapshot
from nbdserve.cli.unlocking import open_repository
from snapshots.names import parse_snapshot_name


def restore_whole(
    data: Path, url: str, snapshot: str, new: str, *, skip_damaged: bool, force: bool, as_json: bool
) -> None:
    """Make the volume ``new`` in ``data`` of a snapshot at ``url``, and say what was done."""
    volume, name = parse_snapshot_name(snapshot)
    repository = open_repository(url)
    with Session(data, create=True) as session:
        report, restored = restore_snapshot(
            session,
            repository,
            url,
            volume,
            name,
            new,
            skip_damaged=skip_damaged,
            force=force,
        )
    line = (
        f"restored {snapshot} as volume {new}: {format_size(report.written)} of data,"
        f" {format_size(report.fetched)} fetched in {report.seconds:.1f} s"
    )
    if report.resumed:
        line += f"; an interrupted restore had brought {format_size(report.resumed)}"
    print_result({**dataclasses.asdict(report), "restored": restored}, as_json, line)
    if not as_json:
        print_holes(report.holes)
    check_whole(report.holes, snapshot, f"volume {new}")
