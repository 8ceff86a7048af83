"""Measure nbdserve beside nbdkit and qemu-nbd: ``make bench``, explained in docs/performance.md.

    python -m scripts.bench [--rounds N] [--seconds N] [--quick] [--directory DIR] [--results DIR]

Two parts. The **comparison** runs the same fio jobs against every server, one server right after
the other within each job, for several rounds, so that whatever disturbs the machine disturbs all
of them (comparison.py). The **probes** time what only nbdserve has: snapshots under load, opening
large volumes, many layers, memory, whole-device TRIM, a crowd of clients (probe_*.py). Results go
to results.json, report.md, chart.png.
"""
