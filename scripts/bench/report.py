"""The tables, in Markdown: for a terminal and for docs/performance.md alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence

from scripts.bench.results import (
    CPU,
    FINE,
    HEAD_ONLY,
    IOPS,
    NBDKIT,
    NBDSERVE,
    P99,
    QEMU_QCOW2,
    SERVERS,
    Comparison,
    Measurement,
    Results,
    compare_with_targets,
)

METRICS = {
    IOPS: "requests a second",
    CPU: "server CPU per request",
    P99: "99th percentile of latency",
}
_UNITS = {
    IOPS: "Requests a second",
    CPU: "Server CPU time per request, µs",
    P99: "99th percentile of latency, µs",
}
_PROBES = {
    "gate": "A snapshot under load",
    "opening": "Opening a volume",
    "layers": "Reading across many layers",
    "memory": "Resident memory of the daemon",
    "trim": "Whole-device TRIM",
    "crowd": "A crowd of idle and stuck clients",
    "flush": "What a FLUSH costs the disk",
}


def format_report(results: Results) -> str:
    """All tables of a run."""
    return "\n\n".join(
        [
            _format_run(results),
            "### Targets",
            _format_targets(results, NBDSERVE),
            f"### The same for “{FINE}”",
            _format_targets(results, FINE),
            f"### The same for “{HEAD_ONLY}”",
            _format_targets(results, HEAD_ONLY),
            *(part for metric in METRICS for part in _format_metric(results, metric)),
            *_format_probes(results.measurements),
        ]
    )


def _format_run(results: Results) -> str:
    scale = results.scale
    lines = [f"- {name}: {value}" for name, value in results.machine.items()]
    day = time.strftime("%Y-%m-%d", time.gmtime(results.begun))
    return "\n".join(
        [
            *lines,
            f"- run: {day}, {results.seconds / 60:.0f} minutes, load {results.load:.2f} before it",
            f"- {scale.rounds} round(s), {scale.job_milliseconds / 1000:g} s a job,"
            f" volumes of {scale.volume >> 20} MiB"
            + (", quick: the figures mean nothing" if scale.quick else ""),
            *_format_others(results),
        ]
    )


def _format_others(results: Results) -> list[str]:
    """How much else went on while the jobs ran."""
    if not results.samples:
        return []
    others = sorted(sample.others for sample in results.samples)
    middle, most = statistics.median(others), others[-1]
    return [f"- processors busy with something else meanwhile: {middle:.2f} (most: {most:.2f})"]


def _format_targets(results: Results, server: str) -> str:
    """One row for each job and figure; all that have no target at the end."""
    pairs: dict[tuple[str, str], dict[str, Comparison]] = {}
    for found in compare_with_targets(results, server):
        pairs.setdefault((found.metric, found.job), {})[found.peer] = found
    rows = [
        (METRICS[metric], job, *_format_side(sides[NBDKIT]), *_format_side(sides[QEMU_QCOW2]))
        for (metric, job), sides in pairs.items()
    ]
    head = ("figure", "job", "÷ nbdkit", "target", "met", "÷ qcow2", "target", "met")
    return format_table(head, rows)


def _format_side(found: Comparison) -> tuple[str, str, str]:
    ratio = f"{found.ratio:.2f} ({found.least:.2f} to {found.greatest:.2f})"
    if found.target is None:
        return ratio, "", ""
    sign = "≥" if found.at_least else "≤"
    return ratio, f"{sign} {found.target:g}", "yes" if found.met else "**no**"


def _format_metric(results: Results, metric: str) -> list[str]:
    rows = []
    for job in results.jobs():
        values = [results.median(job, server, metric) for server in SERVERS]
        rows.append((job, *("" if value is None else _format_number(value) for value in values)))
    return [f"### {_UNITS[metric]}", format_table(("job", *SERVERS), rows)]


def _format_probes(measurements: Sequence[Measurement]) -> list[str]:
    parts = []
    for probe, title in _PROBES.items():
        rows = [
            (
                found.what,
                f"{_format_number(found.value)} {found.unit}",
                "" if found.target is None else f"≤ {found.target:g} {found.unit}",
                "" if found.target is None else "yes" if found.value <= found.target else "**no**",
            )
            for found in measurements
            if found.probe == probe
        ]
        if rows:
            parts += [f"### {title}", format_table(("what", "figure", "target", "met"), rows)]
    return parts


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns padded, so that it is readable as text too."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
