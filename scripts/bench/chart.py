"""The bar chart: every server relative to nbdkit, for each job and figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # a file, no display
from matplotlib import pyplot as plt

from scripts.bench.report import METRICS
from scripts.bench.results import CPU, IOPS, NBDKIT, P99, SERVERS, Results

_COLOURS = ("#8c8c8c", "#c9c9c9", "#e0a458", "#1f6fb4", "#123f66", "#8fc1e9")
_BETTER = {IOPS: "longer is better", CPU: "shorter is better", P99: "shorter is better"}


def draw(results: Results, path: Path) -> None:
    """Write a PNG of three panels: rate, CPU time per request, 99th percentile of latency."""
    jobs = results.jobs()
    figure, axes = plt.subplots(1, len(METRICS), figsize=(16, 0.75 * len(jobs) + 2), sharey=True)
    height = 0.8 / len(SERVERS)
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for place, (server, colour) in enumerate(zip(SERVERS, _COLOURS, strict=True)):
            bars = []
            for row, job in enumerate(jobs):
                value = results.median(job, server, metric)
                base = results.median(job, NBDKIT, metric)
                if value is not None and base:
                    bars.append((row + (place - len(SERVERS) / 2 + 0.5) * height, value / base))
            axis.barh(
                [position for position, _ in bars],
                [length for _, length in bars],
                height,
                color=colour,
                label=server,
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{title} ({_BETTER[metric]})", fontsize=10)
        axis.set_xlabel(f"relative to {NBDKIT}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(jobs)), jobs)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(SERVERS), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)
    plt.close(figure)
