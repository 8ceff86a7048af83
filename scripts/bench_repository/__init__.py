"""Measure pushes to a repository beside restic and borg: ``make bench-repo``; docs/performance.md.

    python -m scripts.bench_repository [--rounds N] [--seconds N] [--size SIZE] [--data SIZE]
                                       [--quick] [--directory DIR] [--results DIR]

Two parts, as in ``scripts.bench``, whose clients, servers and tables are used. The **comparison**
backs the same disk up with every program, one right after the other within each step, for several
rounds (comparison.py). The **probes** look at what repositories are for: few changes in a large
disk, a huge empty one, one that is restored lazily, and the guest meanwhile (probe_*.py). Results
go to results.json and report.md.
"""
