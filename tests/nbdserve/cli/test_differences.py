"""Changed-block lists, of a data directory and of a repository, as a backup program uses them."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.nbdserve.volume_content import read, write

from .conftest import CommandLine

MIB = 1 << 20
BLOCK = 4096
STATE = {"snapshot", "id", "created", "size"}


@pytest.fixture
def url(tmp_path: Path, cli: CommandLine) -> str:
    """A repository with small chunks."""
    where = f"file://{tmp_path}/repository"
    cli.done("repo", "init", where, "--chunk-size", "8K")
    return where


def applied(before: bytes, after: bytes, found: dict[str, Any]) -> bytes:
    """What a backup program makes of an old copy, a list and the new content."""
    copy = bytearray(before[: found["to"]["size"]].ljust(found["to"]["size"], b"\0"))
    end = 0
    for extent in found["extents"]:
        assert set(extent) == {"offset", "length", "zero"}
        start, length = extent["offset"], extent["length"]
        assert start >= end
        assert length > 0
        end = start + length
        assert end <= len(copy)
        copy[start:end] = bytes(length) if extent["zero"] else after[start:end]
    return bytes(copy)


def test_a_list_turns_one_state_into_the_other(cli: CommandLine, url: str) -> None:
    source = random.Random(1)
    cli.done("volume", "create", "a", "--size", "2M")
    contents = {}
    for name in ("one", "two", "three"):
        for _ in range(6):
            where = source.randrange(500) * BLOCK
            piece = source.choice([source.randbytes(BLOCK), bytes(2 * BLOCK), b"x" * 3 * BLOCK])
            write(cli.data, "a", where, piece)
        cli.done("snapshot", "create", f"a@{name}")
        cli.done("repo", "push", f"a@{name}", url)
        contents[name] = read(cli.data, f"a@{name}")
        if name == "two":
            cli.done("volume", "resize", "a", "--size", "3M")
    write(cli.data, "a", MIB, b"now")
    contents["now"] = read(cli.data, "a")
    ids = {s["name"]: s["id"] for s in cli.json("snapshot", "list", "a")["snapshots"]}
    for old, new in [("one", "two"), ("two", "three"), ("one", "three"), ("three", "one"),
                     ("three", "two"), ("one", "one")]:  # fmt: skip
        local = cli.json("snapshot", "diff", f"a@{old}", f"a@{new}")
        far = cli.json("repo", "diff", url, f"a@{old}", f"a@{new}")
        assert (local["block_size"], far["block_size"]) == (BLOCK, 8192)
        for found in (local, far):
            assert found["volume"] == "a"
            assert set(found["from"]) == set(found["to"]) == STATE
            assert (found["from"]["id"], found["to"]["id"]) == (ids[old], ids[new])
            assert found["from"]["size"] == len(contents[old])
            assert applied(contents[old], contents[new], found) == contents[new], (old, new)
        assert (local["from"], local["to"]) == (far["from"], far["to"])
    assert cli.json("repo", "diff", url, "a@one", "a@one")["extents"] == []
    for old in ("one", "three"):
        found = cli.json("snapshot", "diff", f"a@{old}")
        assert found["to"] == {"snapshot": None, "id": None, "created": None, "size": 3 * MIB}
        assert applied(contents[old], contents["now"], found) == contents["now"]


def test_text_is_a_table(cli: CommandLine, url: str) -> None:
    cli.done("volume", "create", "a", "--size", "1M")
    cli.done("snapshot", "create", "a@one")
    write(cli.data, "a", 16384, b"x" * 8192)
    cli.done("snapshot", "create", "a@two")
    for name in ("one", "two"):
        cli.done("repo", "push", f"a@{name}", url)
    for arguments in (
        ("snapshot", "diff", "a@one", "a@two"),
        ("repo", "diff", url, "a@one", "a@two"),
    ):
        assert [line.split() for line in cli.done(*arguments).splitlines()] == [
            ["OFFSET", "LENGTH", "CONTENT"], ["16384", "8192", "data"],
        ]  # fmt: skip
    assert cli.done("repo", "diff", url, "a@two", "a@one").split()[-1] == "zero"
    assert "one volume" in cli("repo", "diff", url, "a@one", "b@two").line
    assert "a@three" in cli("repo", "diff", url, "a@one", "a@three").line


def test_a_page_that_is_damaged_is_no_empty_list(
    cli: CommandLine, url: str, tmp_path: Path
) -> None:
    test_text_is_a_table(cli, url)
    for pages in (tmp_path / "repository" / "pages").rglob("*"):
        if pages.is_file():
            pages.chmod(0o600)
            pages.write_bytes(b"")
    assert "pages/" in cli("repo", "diff", url, "a@one", "a@two").line
