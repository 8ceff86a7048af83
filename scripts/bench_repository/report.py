"""The tables, in Markdown: for a terminal and for docs/performance.md alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from scripts.bench.report import format_table
from scripts.bench.scale import MIB
from scripts.bench_repository.results import (
    BORG_DIRECTORY,
    CONTESTANTS,
    CPU,
    ENCRYPTED_S3,
    NBDSERVE_DIRECTORY,
    NBDSERVE_S3,
    PEAK,
    RESTIC_DIRECTORY,
    RESTIC_S3,
    SECONDS,
    STEPS,
    STORED,
    Measurement,
    Results,
    with_targets,
)

_METRICS = {
    SECONDS: ("Seconds", 1.0),
    CPU: ("CPU time of the program, s", 1.0),
    PEAK: ("Peak of resident memory, MiB", 1.0 / MIB),
    STORED: ("What the repository takes after the step, MiB", 1.0 / MIB),
}
_PAIRS = (
    (NBDSERVE_S3, RESTIC_S3),
    (ENCRYPTED_S3, RESTIC_S3),
    (NBDSERVE_DIRECTORY, RESTIC_DIRECTORY),
    (NBDSERVE_DIRECTORY, BORG_DIRECTORY),
)
_PROBES = {
    "scattered": "Few changes all over a large disk",
    "sparse": "An unchanged 16 TiB",
    "lazy": "A lazy restore",
    "guest": "The guest during a push",
}


def format_report(results: Results) -> str:
    """All tables of a run."""
    parts = [_format_run(results), "### Targets", _format_targets(with_targets(results))]
    for metric, title in ((SECONDS, "Seconds"), (CPU, "CPU time")):
        rows = _ratio_rows(results, metric)
        if rows:
            head = ("step", *(f"{ours} ÷ {theirs}" for ours, theirs in _PAIRS))
            parts += [f"### {title} ÷ a peer's", format_table(head, rows)]
    for metric, (title, unit) in _METRICS.items():
        names = [name for name in CONTESTANTS if any(s.contestant == name for s in results.samples)]
        rows = [
            (step, *(_cell(results.median(step, name, metric), unit) for name in names))
            for step in STEPS
        ]
        if names:
            parts += [f"### {title}", format_table(("step", *names), rows)]
    for probe, title in _PROBES.items():
        found = [measured for measured in results.measurements if measured.probe == probe]
        if found:
            rows = [(measured.what, *_format_spread(measured)) for measured in found]
            parts += [f"### {title}", format_table(("what", "median", "least to greatest"), rows)]
    return "\n\n".join(parts)


def _format_run(results: Results) -> str:
    scale = results.scale
    lines = [f"- {name}: {value}" for name, value in results.machine.items()]
    lines += [f"- {program}: absent, and left out" for program in results.absent]
    day = time.strftime("%Y-%m-%d", time.gmtime(results.begun))
    lines.append(
        f"- run: {day}, {results.seconds / 60:.0f} minutes, load {results.load:.2f} before it"
    )
    lines.append(
        f"- {scale.rounds} round(s), a disk of {scale.image >> 20:,} MiB, of which"
        f" {results.data >> 20:,} are no holes"
        + (", quick: the figures mean nothing" if scale.quick else "")
    )
    here = [s.others for s in results.samples if s.contestant.endswith("directory")]
    if here:
        lines.append(
            "- processors busy with something else during the steps on a directory:"
            f" {statistics.median(here):.2f} (most: {max(here):.2f})"
        )
    return "\n".join(lines)


def _format_targets(found: Sequence[Measurement]) -> str:
    rows = []
    for measured in found:
        sign = "≥" if measured.at_least else "≤"
        target = f"{sign} {measured.target:g} {measured.unit}".rstrip()
        rows.append(
            (measured.what, *_format_spread(measured), target, "yes" if measured.met else "**no**")
        )
    return format_table(("figure", "median", "least to greatest", "target", "met"), rows)


def _format_spread(measured: Measurement) -> tuple[str, str]:
    least, greatest = min(measured.values), max(measured.values)
    spread = f"{_number(least)} to {_number(greatest)}" if len(measured.values) > 1 else ""
    return f"{_number(measured.value)} {measured.unit}".rstrip(), spread


def _ratio_rows(results: Results, metric: str) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for step in STEPS:
        cells = []
        for ours, theirs in _PAIRS:
            ratios = results.ratios(step, ours, theirs, metric)
            cells.append(
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                if ratios
                else ""
            )
        if any(cells):
            rows.append((step, *cells))
    return rows


def _cell(value: float | None, unit: float) -> str:
    return "" if value is None else _number(value * unit)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
