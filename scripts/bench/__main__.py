"""The command line of the benchmark."""

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

from scripts.bench import chart, comparison, report
from scripts.bench.machine import describe_machine
from scripts.bench.probe_crowd import measure_crowd
from scripts.bench.probe_flush import measure_flush
from scripts.bench.probe_gate import measure_gate
from scripts.bench.probe_layers import measure_layers
from scripts.bench.probe_memory import measure_memory
from scripts.bench.probe_open import measure_opening
from scripts.bench.probe_trim import measure_trim
from scripts.bench.process import BenchError, tell
from scripts.bench.results import Results
from scripts.bench.scale import FULL, QUICK, Scale

PROJECT = Path(__file__).resolve().parents[2]
PROGRAMS = ("fio", "nbdkit", "qemu-nbd", "qemu-img", "openssl", "setpriv", "findmnt", "strace")
VERSIONS = {name: (name, "--version") for name in ("fio", "nbdkit", "qemu-nbd")}
QUIET_LOAD = 0.5


def main() -> int:
    """Run the benchmark; the exit status."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _end)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    try:
        return _run(options)
    except (BenchError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


def _end(number: int, frame: FrameType | None) -> None:
    """Leave through every ``finally`` and context manager."""
    print(f"bench: ended by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure nbdserve and peers.")
    parser.add_argument("--rounds", type=_positive, help="of all jobs (default: 3)")
    parser.add_argument("--seconds", type=_positive, help="of each job (default: 3)")
    parser.add_argument("--quick", action="store_true", help="only see that all of it runs")
    parser.add_argument(
        "--directory",
        type=Path,
        default=PROJECT / ".cache/bench",
        help="where volumes and images are, on the file system to measure (default: .cache/bench)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=PROJECT / ".cache/bench",
        help="where results.json, report.md and chart.png go (default: .cache/bench)",
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _run(options: argparse.Namespace) -> int:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise BenchError(
            f"{', '.join(missing)} not found; as root: scripts/install-test-dependencies --bench"
        )
    scale = (QUICK if options.quick else FULL).adjusted(options.rounds, options.seconds)
    for directory in (options.directory, options.results):
        directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.directory).free
    if free < scale.disk_bytes:
        raise BenchError(
            f"{options.directory} has {free >> 30} GiB free, {scale.disk_bytes >> 30} are needed;"
            " name another place with --directory"
        )
    begun = time.time()
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        tell(f"the machine is busy: its load is {load:.2f}; the figures will show it")
    results = Results(
        machine=describe_machine(options.directory, PROJECT, VERSIONS),
        scale=scale,
        begun=begun,
        load=load,
    )
    for _ in measure(scale, options.directory, results):
        # After every part, so that what fails later does not take this with it.
        results.seconds = time.time() - begun
        (options.results / "results.json").write_text(results.to_json())
        (options.results / "report.md").write_text(report.format_report(results) + "\n")
        chart.draw(results, options.results / "chart.png")
    print(report.format_report(results))
    print(f"Written to {options.results}: results.json, report.md, chart.png")
    return 0


def measure(scale: Scale, directory: Path, results: Results) -> Iterator[None]:
    """Run all parts into ``results``, yielding after each.

    Whatever happens, no process and no file is left behind. Files are deleted when all is measured:
    a disk that is told of every freed block (discard) may be busy with that for minutes.
    """
    with ExitStack() as files:
        for name, part in (
            ("comparison", comparison.compare),
            ("gate", measure_gate),
            ("opening", measure_opening),
            ("layers", measure_layers),
            ("memory", measure_memory),
            ("trim", measure_trim),
            ("crowd", measure_crowd),
            ("flush", measure_flush),
        ):
            tell(f"{name}:")
            # Socket paths are short in the one, the file system to measure is under the other.
            with tempfile.TemporaryDirectory(prefix="nbd-") as sockets:
                data = files.enter_context(
                    tempfile.TemporaryDirectory(prefix="data-", dir=directory)
                )
                part(scale, Path(data), Path(sockets), results)
            yield
        tell("deleting what was written")


if __name__ == "__main__":
    sys.exit(main())
