"""``nbdserve volume map``: the picture, and its numbers."""

import random
from pathlib import Path

import pytest

from nbdserve.cli.volume_map import print_map

from .conftest import CommandLine

MIB = 1 << 20


def test_an_empty_volume(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1G")
    picture = cli.done("volume", "map", "a", "--cells", "100")
    assert picture.splitlines()[:2] == [
        "a: 0 of 1G hold data; 16M a letter, 1G a line",
        "0  " + "." * 64,
    ]
    assert "No snapshot here is a backup's" in picture
    document = cli.json("volume", "map", "a", "--cells", "100")
    assert (document["volume"], document["cells"], document["since"]) == ("a", [], None)


def test_what_a_volume_holds_is_drawn(cli: CommandLine, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(256 * MIB)
        file.write(random.Random(1).randbytes(3 * MIB))
        file.seek(128 * MIB)
        file.write(random.Random(2).randbytes(MIB))
    url = f"file://{tmp_path}/repository"
    cli.done("repo", "init", url)
    cli.done("repo", "import", image, url, "a@s")
    cli.done("repo", "restore", url, "a@s", "a")
    cli.done("snapshot", "create", "a@one")
    picture = cli.done("volume", "map", "a", "--cells", "128").splitlines()
    assert picture[0] == "a: 4M of 256M hold data; 2M a letter, 128M a line"
    assert picture[1] == "   0  AA" + "." * 62
    assert picture[2] == "128M  A" + "." * 63
    oldest, head = (line.split() for line in picture[5:7])
    assert (oldest[0], oldest[2], oldest[4]) == ("a", "4M", "one")
    assert (head[0], head[2], head[4:]) == ("b", "0", ["-", "head"])
    document = cli.json("volume", "map", "a", "--cells", "128")
    assert [cell["offset"] // MIB for cell in document["cells"]] == [0, 2, 128]
    assert [cell["mapped"] // MIB for cell in document["cells"]] == [2, 1, 1]


def layers(count: int) -> list[dict[str, object]]:
    return [
        {"layer": f"{n:016x}", "snapshots": [], "mapped": 4096, "disk": 8192, "changed": n > 1}
        for n in range(count)
    ]


def test_a_part_that_is_less_than_half_full_has_a_small_letter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = {
        "volume": "a",
        "size": 3 * MIB + 4096,
        "mapped": 5 * 4096,
        "changed": 4096,
        "since": {"snapshot": "s", "created": "2024-05-01T12:00:00.123Z", "repository_id": "r"},
        "layers": layers(3),
        "cell_size": MIB,
        "cells": [
            {"offset": 0, "mapped": MIB // 2, "layer": 0, "most": 4096, "changed": 0},
            {"offset": MIB, "mapped": MIB // 2 - 4096, "layer": 1, "most": 4096, "changed": 0},
            # The last one is shorter.
            {"offset": 3 * MIB, "mapped": 4096, "layer": 2, "most": 4096, "changed": 4096},
        ],
    }
    print_map(document, False)
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["0", "Ab.C"]
    assert out[-2:] == [
        "",
        "4K were written since the last backup, a@s (2024-05-01T12:00:00Z).",
    ]
    assert [line.split()[0] for line in out[4:7]] == ["a", "b", "c"]
    assert out[6].endswith("head, since the last backup")


def test_the_oldest_of_many_layers_share_a_letter(capsys: pytest.CaptureFixture[str]) -> None:
    document = {
        "volume": "a", "size": 250 * 4096, "mapped": 250 * 4096, "changed": None, "since": None,
        "layers": layers(250), "cell_size": 4096,
        "cells": [
            {"offset": n * 4096, "mapped": 4096, "layer": n, "most": 4096, "changed": 0}
            for n in range(250)
        ],
    }  # fmt: skip
    print_map(document, False)
    out = capsys.readouterr().out.splitlines()
    drawn = "".join(line.split()[1] for line in out[1:5])
    assert drawn == "A" * 225 + "BCDEFGHIJKLMNOPQRSTUVWXYZ"


def test_wrong_usage_is_named(cli: CommandLine) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    outcome = cli("volume", "map", "a", "--cells", "0")
    assert (outcome.status, "0 is not in the range 1<=x<=4096" in outcome.line) == (2, True)
    outcome = cli("volume", "map", "b")
    assert (outcome.status, outcome.line) == (1, "volume b does not exist")
