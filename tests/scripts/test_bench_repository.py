"""The benchmark of repositories: what it makes, measures, computes and prints."""

import json
import random
import sys
from pathlib import Path

import lz4.block
import pytest

from scripts.bench.process import BenchError
from scripts.bench.scale import BLOCK, MIB
from scripts.bench_repository import disk, results
from scripts.bench_repository.comparison import comparer
from scripts.bench_repository.measuring import Cost, measure
from scripts.bench_repository.report import format_report
from scripts.bench_repository.results import (
    COLLECT,
    FULL_PUSH,
    NBDSERVE_DIRECTORY,
    NBDSERVE_S3,
    RESTIC_S3,
    Measurement,
    Results,
    Sample,
    with_targets,
)
from scripts.bench_repository.scale import FULL, QUICK
from scripts.bench_repository.stores import Directory

PYTHON = sys.executable


def results_of(*samples: Sample) -> Results:
    return Results({"kernel": "6"}, QUICK, 0.0, 0.1, ["borg"], data=300 * MIB, samples=[*samples])


def sample(name: str, turn: int, seconds: float, cpu: float, step: str = FULL_PUSH) -> Sample:
    return Sample(turn, step, name, seconds, cpu, 100 * MIB, others=0.25, stored=7 * MIB)


def test_mixed_image_is_the_same_each_time_and_has_of_everything() -> None:
    pieces = list(disk.mixed_pieces(16 * MIB + 5 * BLOCK, seed=1))
    assert pieces == list(disk.mixed_pieces(16 * MIB + 5 * BLOCK, seed=1))
    assert pieces != list(disk.mixed_pieces(16 * MIB + 5 * BLOCK, seed=2))
    offsets = [offset for offset, _ in pieces]
    assert offsets == sorted(set(offsets))
    assert 0 < len(pieces) < 65
    contents = [data for _, data in pieces]
    assert any(not any(data) for data in contents)
    assert any(data.isascii() and any(data) for data in contents)
    assert any(not data.isascii() for data in contents)
    whole = [data for data in contents if any(data)]
    assert len(set(whole)) == len(whole)


def test_scattered_pieces_are_within_the_disk_and_apart() -> None:
    pieces = list(disk.scattered_pieces(64 * MIB, 8 * MIB, seed=1))
    assert len(pieces) == 8
    assert len({offset for offset, _ in pieces}) == 8
    assert all(len(data) == MIB and offset + MIB <= 64 * MIB for offset, data in pieces)


def test_changed_blocks_are_different_blocks() -> None:
    changed = list(disk.changed_blocks(MIB, 200, seed=3))
    assert len({offset for offset, _ in changed}) == 200
    assert all(offset % BLOCK == 0 and len(data) == BLOCK for offset, data in changed)


def test_image_has_its_pieces_and_holes(tmp_path: Path) -> None:
    pieces = list(disk.mixed_pieces(8 * MIB, seed=1))
    image = disk.Disk(None, tmp_path / "image", 8 * MIB)  # type: ignore[arg-type]
    image.fill(pieces)
    content = (tmp_path / "image").read_bytes()
    assert len(content) == 8 * MIB
    expected = bytearray(8 * MIB)
    for offset, data in pieces:
        expected[offset : offset + len(data)] = data
    assert content == bytes(expected)
    assert image.allocated() >= sum(len(data) for _, data in pieces)


def test_cost_of_a_command_is_its_own(tmp_path: Path) -> None:
    script = (
        "import sys; data = bytearray(b'x') * (200 << 20); sum(range(3_000_000));"
        "print(sys.stdin.read())"
    )
    given = tmp_path / "given"
    given.write_text("what it was given")
    large, output = measure(PYTHON, "-I", "-c", script, stdin=given)
    assert output == "what it was given\n"
    assert large.peak > 200 * MIB
    assert large.cpu > 0
    held = bytearray(b"x") * (100 * MIB)  # of the process that starts it
    small, _ = measure("true")
    assert small.peak < len(held)
    assert small.cpu < large.cpu


def test_cost_counts_children_that_were_waited_for() -> None:
    work = f"{PYTHON} -I -c 'sum(range(20_000_000))'"
    cost, _ = measure("sh", "-c", f"{work}; true")
    nothing, _ = measure("sh", "-c", "true")
    assert cost.cpu > nothing.cpu


def test_environment_and_output_of_a_measured_command(tmp_path: Path) -> None:
    _, output = measure(
        "sh", "-c", "echo $WORD; pwd", environment={"WORD": "a word"}, directory=tmp_path
    )
    assert output.splitlines() == ["a word", str(tmp_path)]
    _, output = measure("echo", "elsewhere", stdout=tmp_path / "out")
    assert output == ""
    assert (tmp_path / "out").read_text() == "elsewhere\n"


def test_measured_command_that_fails_is_one_line() -> None:
    with pytest.raises(BenchError, match=r"^sh -c .*: it broke$"):
        measure("sh", "-c", "echo first >&2; echo it broke >&2; exit 3")


def test_bytes_of_a_repository_in_a_directory(tmp_path: Path) -> None:
    place = Directory(tmp_path).place("one")
    assert place.url == f"file://{tmp_path}/one"
    (tmp_path / "one/deep").mkdir(parents=True)
    (tmp_path / "one/deep/file").write_bytes(bytes(10))
    (tmp_path / "one/file").write_bytes(bytes(5))
    assert place.sizes() == {"deep/file": 10, "file": 5}
    assert place.stored() == 15
    place.remove()
    assert not (tmp_path / "one").exists()


def test_targets_are_bounds_on_the_right_side() -> None:
    found = results_of(
        sample(NBDSERVE_S3, 0, 5, 3),
        sample(RESTIC_S3, 0, 10, 10),
        sample(NBDSERVE_S3, 1, 1, 4),
        sample(RESTIC_S3, 1, 3, 10),
        sample(NBDSERVE_DIRECTORY, 0, 2, 1),
    )
    found.measurements += [
        Measurement("scattered", "bytes", [17.5, 16.0], "", 17),
        Measurement("scattered", "no target", [1.0], "s"),
    ]
    targets = {one.what: one for one in with_targets(found)}
    rate = targets["full push to S3, rate ÷ restic's"]
    assert (rate.values, rate.met) == ([2.0, 3.0], True)
    cpu = targets["full push to S3, CPU time ÷ restic's"]
    assert (cpu.values, cpu.met) == ([0.3, 0.4], True)
    directory = targets["full push to a directory"]
    assert (directory.values, directory.unit, directory.met) == ([150.0], "MiB/s", False)
    assert targets[f"memory of a full push, {NBDSERVE_S3}"].met
    assert targets["bytes"].met
    assert "no target" not in targets


def test_targets_without_the_peer() -> None:
    found = results_of(sample(NBDSERVE_S3, 0, 5, 3))
    assert [one.what for one in with_targets(found)] == [f"memory of a full push, {NBDSERVE_S3}"]


def test_ratios_pair_what_was_in_the_same_round() -> None:
    found = results_of(
        *(sample(NBDSERVE_S3, turn, seconds, 1) for turn, seconds in enumerate((1, 10))),
        *(sample(RESTIC_S3, turn, seconds, 1) for turn, seconds in enumerate((4, 20))),
        sample(RESTIC_S3, 2, 1, 1),
    )
    assert found.ratios(FULL_PUSH, NBDSERVE_S3, RESTIC_S3, results.SECONDS) == [0.25, 0.5]
    assert found.median(COLLECT, NBDSERVE_S3, results.SECONDS) is None


def test_report_and_json_say_what_was_missed_and_what_was_absent() -> None:
    found = results_of(sample(NBDSERVE_S3, 0, 5, 3), sample(RESTIC_S3, 0, 6, 10))
    found.measurements.append(Measurement("lazy", "first byte", [1.5, 0.5, 2.5], "s", 1))
    text = format_report(found)
    assert "borg: absent" in text
    assert "quick: the figures mean nothing" in text
    (row,) = [line for line in text.splitlines() if "first byte" in line and "≤ 1 s" in line]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["first byte", "1.5 s", "0.5 to 2.5", "≤ 1 s", "**no**"]
    (row,) = [line for line in text.splitlines() if "rate ÷" in line]
    assert row.split("|")[2].strip() == "1.2"
    document = json.loads(found.to_json())
    assert {one["what"]: one["met"] for one in document["targets"]}["first byte"] is False
    assert document["samples"][0]["contestant"] == NBDSERVE_S3


def test_sizes_and_rounds_can_be_asked_for() -> None:
    scale = FULL.adjusted(5, None, 2 << 30, None)
    assert (scale.rounds, scale.seconds, scale.image) == (5, FULL.seconds, 2 << 30)
    assert scale.disk_bytes > FULL.disk_bytes
    assert scale.memory_gib > FULL.memory_gib


def test_restored_disk_is_compared_with_the_image(tmp_path: Path) -> None:
    image = disk.Disk(None, tmp_path / "image", 2 * MIB)  # type: ignore[arg-type]
    image.fill(iter([(MIB, b"data")]))
    check = comparer(image)
    check(MIB, b"data\0")
    for offset, data in ((MIB, b"date"), (0, b"x"), (MIB, b"")):
        with pytest.raises(BenchError, match="differs"):
            check(offset, data)


def test_sample_of_a_cost() -> None:
    made = Sample.of(1, FULL_PUSH, NBDSERVE_S3, Cost(1.0, 2.0, 3, 4.0), stored=5)
    assert (made.seconds, made.cpu, made.peak, made.others, made.stored) == (1.0, 2.0, 3, 4.0, 5)


def test_text_compresses_to_about_half() -> None:
    text = disk.Text(random.Random(1))
    one, other = text.make(64 << 10), text.make(64 << 10)
    assert len(one) == 64 << 10
    assert one != other
    assert 0.4 < len(lz4.block.compress(one, store_size=False)) / len(one) < 0.7
