"""The command line of the benchmark of repositories."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from backends.errors import InvalidError, StorageError
from scripts.bench.machine import describe_machine
from scripts.bench.process import BenchError, tell
from scripts.bench.scale import GIB, MIB
from scripts.bench.servers import Nbdserve
from scripts.bench_repository.comparison import compare
from scripts.bench_repository.probe_guest import measure_guest
from scripts.bench_repository.probe_lazy import measure_lazy
from scripts.bench_repository.probe_scattered import measure_scattered
from scripts.bench_repository.probe_sparse import measure_sparse
from scripts.bench_repository.report import format_report
from scripts.bench_repository.results import Results
from scripts.bench_repository.scale import FULL, QUICK, Scale
from scripts.bench_repository.stores import s3_server
from snapshots.names import parse_size

PROJECT = Path(__file__).resolve().parents[2]
PROGRAMS = ("fio", "setpriv", "findmnt")
PEERS = ("restic", "borg")
VERSIONS = {
    "radosgw": ("radosgw", "--version"),
    "fio": ("fio", "--version"),
    "restic": ("restic", "version"),
    "borg": ("borg", "--version"),
}
QUIET_LOAD = 0.5
_SMALLEST = 32 * MIB


def main() -> int:
    """Run the benchmark; the exit status."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _end)
    try:
        return _run(options)
    except (BenchError, StorageError, OSError) as error:
        print(f"bench-repo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench-repo: interrupted", file=sys.stderr)
        return 130


def _end(number: int, frame: FrameType | None) -> None:
    """Leave through every ``finally`` and context manager."""
    print(f"bench-repo: ended by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-repo", description="Measure nbdserve's repositories, restic and borg."
    )
    parser.add_argument("--rounds", type=_positive, help="of all steps (default: 3)")
    parser.add_argument(
        "--seconds", type=_positive, help="of each measurement of the guest's latency (default: 10)"
    )
    parser.add_argument("--size", type=_size, help="of the disk that is compared (default: 1G)")
    parser.add_argument(
        "--data", type=_size, help="in the disk of 10 GiB that is changed all over (default: 1G)"
    )
    parser.add_argument("--quick", action="store_true", help="only see that all of it runs")
    parser.add_argument(
        "--directory",
        type=Path,
        default=PROJECT / ".cache/bench-repo",
        help="where volumes, images and repositories are, on the file system to measure"
        " (default: .cache/bench-repo)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=PROJECT / ".cache/bench-repo",
        help="where results.json and report.md go (default: .cache/bench-repo)",
    )
    options = parser.parse_args()
    scale: Scale = QUICK if options.quick else FULL
    if options.data is not None and options.data > scale.scattered:
        parser.error(f"--data: the disk that holds it has {scale.scattered >> 20} MiB")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except InvalidError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < _SMALLEST or size % MIB:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of MiB, 32 or more")
    return size


def _run(options: argparse.Namespace) -> int:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    absent = [program for program in PEERS if shutil.which(program) is None]
    if missing or (absent and not options.quick):
        raise BenchError(
            f"{', '.join(missing + absent)} not found; as root:"
            " scripts/install-test-dependencies --bench"
        )
    for program in absent:
        tell(f"{program} is not there, and left out")
    scale = (QUICK if options.quick else FULL).adjusted(
        options.rounds, options.seconds, options.size, options.data
    )
    for directory in (options.directory, options.results):
        directory.mkdir(parents=True, exist_ok=True)
    where = options.directory.resolve()
    free = shutil.disk_usage(where).free
    if free < scale.disk_bytes:
        raise BenchError(
            f"{where} has {free // GIB} GiB free, {scale.disk_bytes // GIB + 1} are needed;"
            " name another place with --directory"
        )
    begun = time.time()
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        tell(f"the machine is busy: its load is {load:.2f}; the figures will show it")
    versions = {name: words for name, words in VERSIONS.items() if shutil.which(words[0])}
    machine = describe_machine(where, PROJECT, versions)
    results = Results(machine=machine, scale=scale, begun=begun, load=load, absent=absent)
    for _ in measure(scale, where, results):
        # After every part, so that what fails later does not take this with it.
        results.seconds = time.time() - begun
        (options.results / "results.json").write_text(results.to_json())
        (options.results / "report.md").write_text(format_report(results) + "\n")
    print(format_report(results))
    print(f"Written to {options.results}: results.json, report.md")
    return 0


def measure(scale: Scale, directory: Path, results: Results) -> Iterator[None]:
    """Run all parts into ``results``, yielding after each.

    Whatever happens, no process and no file is left behind, and nothing in an S3 server. Volumes
    that were backed up are deleted in the end, lest merges and discards disturb what follows.
    """
    with ExitStack() as stack:
        # Socket paths are short in the one, the file system to measure is under the other.
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbd-")))
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="data-", dir=directory)))
        bucket = stack.enter_context(s3_server(sockets / "s3", scale.memory_gib))
        ours = Nbdserve(data / "nbdserve", sockets)
        stack.enter_context(ours.serving())
        for name, part in (
            ("comparison", compare),
            ("scattered changes", measure_scattered),
            ("unchanged 16 TiB", measure_sparse),
            ("lazy restore", measure_lazy),
            ("guest", measure_guest),
        ):
            tell(f"{name}:")
            part(scale, data, ours, bucket, results)
            yield


if __name__ == "__main__":
    sys.exit(main())
