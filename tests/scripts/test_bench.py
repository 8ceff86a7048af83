"""The benchmark itself: what it reads, computes and prints, and that it leaves nothing running."""

import json
import os
import threading
from pathlib import Path

import pytest

from scripts.bench import process, report
from scripts.bench.jobs import JOBS, Job, parse_fio
from scripts.bench.layering import assign, make_content, pieces_of
from scripts.bench.machine import parse_model
from scripts.bench.probe_flush import parse_trace
from scripts.bench.probe_gate import longest_between
from scripts.bench.process import BenchError
from scripts.bench.results import (
    CPU,
    IOPS,
    NBDKIT,
    NBDSERVE,
    P99,
    QEMU_QCOW2,
    TARGETS,
    Measurement,
    Results,
    Sample,
    compare_with_targets,
)
from scripts.bench.scale import QUICK


def fio_side(iops: float, p99: int, count: int) -> dict[str, object]:
    return {
        "iops": iops,
        "total_ios": count,
        "clat_ns": {"percentile": {"50.000000": 1, "99.000000": p99}},
    }


IDLE_SIDE = {"iops": 0, "total_ios": 0, "clat_ns": {"min": 0}}


def sample(job: str, server: str, turn: int, iops: float, p99: float, cpu: float) -> Sample:
    return Sample(turn, job, server, iops, p99, cpu, others=0.25)


def results_of(*samples: Sample) -> Results:
    return Results({"kernel": "6"}, QUICK, 0.0, 0.1, samples=list(samples))


def test_jobs_have_the_names_that_targets_use() -> None:
    assert Job("randread", 4096, 32).name == "randread 4k qd32"
    assert Job("write", 1 << 20, 4).name == "write 1M qd4"
    names = [job.name for job in JOBS]
    assert len(set(names)) == len(names)
    assert {target.job for target in TARGETS} <= set(names)


def test_jobs_that_write_are_known() -> None:
    assert {job.pattern for job in JOBS if job.writes} == {"randwrite", "randrw", "write"}


def test_fio_figures_of_a_reading_job() -> None:
    output = {"jobs": [{"error": 0, "read": fio_side(1000.5, 250_000, 3000), "write": IDLE_SIDE}]}
    load = parse_fio("fio: a warning\n" + json.dumps(output))
    assert (load.iops, load.p99_microseconds, load.operations) == (1000.5, 250.0, 3000)


def test_fio_figures_of_a_mixed_job_are_the_sum_and_the_worse_latency() -> None:
    sides = {"read": fio_side(100, 2_000_000, 300), "write": fio_side(50, 9_000_000, 150)}
    load = parse_fio(json.dumps({"jobs": [{"error": 0, **sides}]}))
    assert (load.iops, load.p99_microseconds, load.operations) == (150, 9000.0, 450)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("nothing", "not the JSON"),
        ("{", "not the JSON"),
        ('{"jobs": []}', "not the JSON"),
        (json.dumps({"jobs": [{"error": 5, "read": IDLE_SIDE, "write": IDLE_SIDE}]}), "error 5"),
        (json.dumps({"jobs": [{"error": 0, "read": IDLE_SIDE, "write": IDLE_SIDE}]}), "answered"),
    ],
)
def test_fio_that_measured_nothing_is_an_error(output: str, why: str) -> None:
    with pytest.raises(BenchError, match=why):
        parse_fio(output)


def test_stat_of_a_process_whose_name_looks_like_fields() -> None:
    text = "42 (a) b (1 2) S 7 42 42 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 3 0 5 6 7\n"
    assert process.parse_stat(text) == (7, 11 + 22 + 33 + 44)


def test_stat_of_this_process_can_be_read() -> None:
    parent, _ = process.parse_stat(Path("/proc/self/stat").read_text())
    assert parent == os.getppid()


def test_resident_memory() -> None:
    assert process.parse_resident("VmPeak:\t  99 kB\nVmRSS:\t     12 kB\n") == 12 << 10
    assert process.parse_resident("Name:\tzombie\n") == 0
    assert process.read_resident_bytes(os.getpid()) > 1 << 20


def test_busy_time_leaves_out_idle_and_waiting_and_counts_guests_once() -> None:
    assert process.parse_busy("cpu  1 2 4 1000 2000 8 16 32 64 128\ncpu0 9 9 9 9\n") == 63
    assert process.read_busy_seconds() > 0


def test_tree_has_all_descendants_and_nobody_else() -> None:
    parents = {1: 0, 2: 1, 3: 2, 4: 2, 5: 4, 6: 1, 7: 6}
    assert sorted(process.find_tree(2, parents)) == [2, 3, 4, 5]


def test_server_is_ended_when_the_block_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        process.server("sleep", "600", log=tmp_path / "log", is_ready=lambda: True) as child,
    ):
        assert child.poll() is None
        raise KeyboardInterrupt
    assert child.poll() is not None


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match="sh does not start: no such luck"),
        process.server(
            "sh", "-c", "echo no such luck; exit 3", log=tmp_path / "log", is_ready=lambda: False
        ),
    ):
        pytest.fail("it cannot have started")


def test_failed_command_is_one_line_with_its_complaint() -> None:
    with pytest.raises(BenchError, match=r"^sh -c .*: it broke$"):
        process.run("sh", "-c", "echo first >&2; echo it broke >&2; exit 1")


def test_command_that_takes_too_long_is_ended() -> None:
    before = threading.active_count()
    with pytest.raises(BenchError, match="not done after"):
        process.run("sleep", "600", timeout=0.1)
    assert threading.active_count() == before


@pytest.mark.parametrize("layers", [1, 9, 250])
def test_every_layer_owns_some_blocks(layers: int) -> None:
    assignment = assign(100_000, layers, seed=1)
    assert len(assignment) == 100_000
    assert set(assignment) == set(range(layers))
    assert assignment == assign(100_000, layers, seed=1)
    if layers > 1:
        assert assignment != assign(100_000, layers, seed=2)


def test_neighbours_stay_together() -> None:
    assignment = assign(1600, 9, seed=1, together=16)
    assert len(assignment) == 1600
    assert all(len(set(assignment[at : at + 16])) == 1 for at in range(0, 1600, 16))


def test_pieces_of_all_layers_are_the_whole_content() -> None:
    content = make_content(1 << 20, seed=1)
    assignment = assign(256, 5, seed=1)
    found = [
        piece for layer in range(5) for piece in pieces_of(layer, assignment, memoryview(content))
    ]
    assert len(found) == 256
    assert b"".join(bytes(data) for _, data in sorted(found, key=lambda piece: piece[0])) == content


def test_longest_stall_counts_requests_that_overlap_the_window() -> None:
    requests = [(0.0, 5.0), (5.0, 5.1), (5.2, 6.2), (6.2, 6.3), (9.0, 19.0)]
    assert longest_between(requests, 5.0, 7.0) == pytest.approx(1.0)
    assert longest_between(requests, 4.9, 7.0) == pytest.approx(5.0)
    assert longest_between(requests, 7.0, 8.0) == 0


def test_processor_model() -> None:
    assert parse_model("processor\t: 0\nmodel name\t: Some CPU @ 2: fast\n") == "Some CPU @ 2: fast"
    assert parse_model("Features\t: fp\n") == os.uname().machine


def test_ratios_pair_the_servers_of_a_round() -> None:
    job = "randread 4k qd32"
    results = results_of(
        *(sample(job, NBDKIT, turn, iops, 1, 1) for turn, iops in enumerate((10, 100, 1000))),
        *(sample(job, NBDSERVE, turn, iops, 1, 1) for turn, iops in enumerate((20, 150, 1600))),
    )
    assert results.ratios(job, NBDSERVE, NBDKIT, IOPS) == [1.5, 1.6, 2.0]
    assert results.median(job, NBDSERVE, IOPS) == 150
    assert results.median(job, QEMU_QCOW2, IOPS) is None


def test_targets_are_bounds_on_the_right_side() -> None:
    job = "randread 4k qd32"
    results = results_of(
        sample(job, NBDKIT, 0, 100, 100, 10),
        sample(job, QEMU_QCOW2, 0, 40, 200, 40),
        sample(job, NBDSERVE, 0, 130, 71, 8),
        sample("randread 16k qd32", NBDKIT, 0, 1, 1, 1),
        sample("randread 16k qd32", NBDSERVE, 0, 1, 1, 1),
    )
    met = {
        (found.metric, found.peer): found.met
        for found in compare_with_targets(results)
        if found.job == job
    }
    assert met == {
        (IOPS, NBDKIT): True,
        (IOPS, QEMU_QCOW2): False,
        (CPU, NBDKIT): True,
        (CPU, QEMU_QCOW2): True,
        (P99, NBDKIT): False,
        (P99, QEMU_QCOW2): True,
    }
    without = [found for found in compare_with_targets(results) if found.target is None]
    assert {(found.job, found.metric) for found in without} == {
        ("randread 16k qd32", IOPS),
        ("randread 16k qd32", CPU),
    }
    assert all(found.met is None for found in without)


def test_report_and_json_have_what_was_missed() -> None:
    job = "read 1M qd4"
    results = results_of(
        sample(job, NBDKIT, 0, 100, 100, 10),
        sample(job, QEMU_QCOW2, 0, 10, 100, 10),
        sample(job, NBDSERVE, 0, 100, 100, 10),
    )
    results.measurements.append(Measurement("gate", "a stall", 12.5, "ms", 10.0))
    text = report.format_report(results)
    assert "something else meanwhile: 0.25 (most: 0.25)" in text
    row = next(line for line in text.splitlines() if "÷" not in line and job in line)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "requests a second", job,
        "1.00 (1.00 to 1.00)", "≥ 1.7", "**no**",
        "10.00 (10.00 to 10.00)", "≥ 2", "yes",
    ]  # fmt: skip
    stall = next(line for line in text.splitlines() if "a stall" in line)
    assert "12.5 ms" in stall
    assert "**no**" in stall
    document = json.loads(results.to_json())
    assert [found["met"] for found in document["comparisons"]][:2] == [False, True]
    assert document["samples"][0]["server"] == NBDKIT


def test_table_columns_line_up() -> None:
    lines = report.format_table(("a", "long head"), [("long cell", "b"), ("", "µ")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"|", "-"}


def test_syncs_and_bytes_are_counted_by_kind_of_file() -> None:
    traced = parse_trace(
        [
            '7 pwrite64(9</d/layers/a/data-00000>, "\\0"..., 4096, 8192) = 4096',
            "7 fdatasync(9</d/layers/a/data-00000>)  = 0",
            "8 fdatasync(10</d/layers/a/journal>)  = 0",
            '8 pwritev2(9</d/layers/a/data-00000>, [{iov_base="x"}], 1, 0, 0) = 512',
            "8 fsync(4</elsewhere/file>) = 0",
            "8 fdatasync(10</d/layers/a/journal> <unfinished ...>",
            "7 fdatasync(9</d/layers/a/data-00000> <unfinished ...>",
            "8 <... fdatasync resumed>)              = 0",
            "8 fdatasync(10</d/layers/a/journal>) = -1 EIO (Input/output error)",
        ],
        Path("/d"),
    )
    assert traced.syncs == {"data": 1, "journal": 2}
    assert traced.written == {"data": 4608}
