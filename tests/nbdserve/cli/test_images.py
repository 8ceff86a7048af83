"""repo export and repo import from the command line; no data directory is needed."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.nbdserve.volume_content import read

from .conftest import CommandLine

MIB = 1 << 20
NBDSERVE = Path(sys.executable).parent / "nbdserve"


@pytest.fixture
def url(tmp_path: Path, cli: CommandLine) -> str:
    where = f"file://{tmp_path}/repository"
    cli.done("repo", "init", where)
    return where


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(MIB)
        file.write(random.Random(1).randbytes(2 * MIB))
    return path


def test_round_trips(cli: CommandLine, url: str, image: Path, tmp_path: Path) -> None:
    first = cli.json("repo", "import", image, url, "a@one")
    assert (first["size"], first["parent"], first["read"]) == (8 * MIB, None, 2 * MIB)
    assert "pushed a@two since one" in cli.done("repo", "import", image, url, "a@two")
    raw, qcow2 = tmp_path / "out", tmp_path / "out.qcow2"
    report = cli.json("repo", "export", url, "a@one", raw)
    assert {key: report[key] for key in ("volume", "snapshot", "format", "size", "data", "file")} \
        == {"volume": "a", "snapshot": "one", "format": "raw", "size": 8 * MIB, "data": 2 * MIB,
            "file": str(raw)}  # fmt: skip
    assert raw.read_bytes() == image.read_bytes()
    assert "as qcow2" in cli.done("repo", "export", url, "a@two", qcow2)
    cli.done("repo", "import", qcow2, url, "a@three")
    again = tmp_path / "again.img"
    cli.done("repo", "export", url, "a@three", again, "--format", "raw")
    assert again.read_bytes() == image.read_bytes()
    assert not cli.data.exists()
    cli.done("repo", "restore", url, "a@three", "b")
    assert read(cli.data, "b") == image.read_bytes()


def test_formats_are_never_guessed(cli: CommandLine, url: str, image: Path, tmp_path: Path) -> None:
    cli.done("repo", "import", image, url, "a@one")
    disguised = tmp_path / "image"
    cli.done("repo", "export", url, "a@one", disguised, "--format", "qcow2")
    assert "looks like qcow2" in cli("repo", "import", disguised, url, "a@two").line
    cli.done("repo", "import", disguised, url, "a@two", "--format", "qcow2")
    assert cli.json("repo", "list", url, "a")["snapshots"][1]["size"] == 8 * MIB
    cli.done("repo", "import", disguised, url, "b@raw", "--format", "raw")
    assert cli.json("repo", "list", url, "b")["snapshots"][0]["size"] < 4 * MIB
    assert "no qcow2" in cli("repo", "import", image, url, "a@x", "--format", "qcow2").line
    assert cli("repo", "import", image, url, "a@x", "--format", "vmdk").status == 2


def test_files_that_exist_or_do_not(
    cli: CommandLine, url: str, image: Path, tmp_path: Path
) -> None:
    cli.done("repo", "import", image, url, "a@one")
    out = tmp_path / "out"
    out.write_text("old")
    assert "--force" in cli("repo", "export", url, "a@one", out).line
    assert out.read_text() == "old"
    cli.done("repo", "export", url, "a@one", out, "--force")
    assert out.read_bytes() == image.read_bytes()
    assert "absent" in cli("repo", "export", url, "a@one", tmp_path / "absent" / "x").line
    assert "absent" in cli("repo", "import", tmp_path / "absent", url, "a@two").line
    assert "directory" in cli("repo", "import", tmp_path, url, "a@two").line
    assert "a@none" in cli("repo", "export", url, "a@none", tmp_path / "x").line
    assert "VOLUME@SNAPSHOT" in cli("repo", "export", url, "a", tmp_path / "x").line
    assert "VOLUME@SNAPSHOT" in cli("repo", "import", image, url, "a").line
    assert "is another snapshot" in cli("repo", "import", image, url, "a@one").line
    assert not (tmp_path / "x").exists()


def test_standard_output_takes_raw_and_nothing_else(cli: CommandLine, url: str) -> None:
    for options in (["--json"], ["--format", "qcow2"]):
        assert cli("repo", "export", url, "a@one", "-", *options).status == 2


def nbdserve(
    *arguments: str | Path, stdin: bytes | int = b"", stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    given = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    return subprocess.run(
        [NBDSERVE, *arguments], stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False,
        **given,  # type: ignore[call-overload]
    )  # fmt: skip


def test_pipes(cli: CommandLine, url: str, image: Path, tmp_path: Path) -> None:
    content = image.read_bytes()
    imported = nbdserve("repo", "import", "-", url, "a@pipe", stdin=content)
    assert imported.returncode == 0, imported
    with image.open("rb") as file:
        file.seek(4096)
        assert nbdserve("repo", "import", "-", url, "a@rest", stdin=file.fileno()).returncode == 0
    rest = tmp_path / "rest"
    cli.done("repo", "export", url, "a@rest", rest)
    assert rest.read_bytes() == content[4096:]
    exported = nbdserve("repo", "export", url, "a@pipe", "-")
    assert exported.returncode == 0, exported
    assert exported.stdout == content
    assert exported.stderr.startswith(b"exported a@pipe"), "the report is not in the image"
    out = tmp_path / "out"
    with out.open("wb") as file:
        assert nbdserve("repo", "export", url, "a@pipe", "-", stdout=file.fileno()).returncode == 0
    assert out.read_bytes() == content
    assert out.stat().st_blocks * 512 < 3 * MIB
    read_end, write_end = os.pipe()
    os.close(read_end)
    gone = nbdserve("repo", "export", url, "a@pipe", "-", stdout=write_end)
    os.close(write_end)
    assert gone.returncode == 1
    assert len(gone.stderr.splitlines()) == 1
    assert b"went away" in gone.stderr


def test_an_odd_size_is_told(cli: CommandLine, url: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 5000)
    outcome = cli("repo", "import", path, url, "a@odd")
    assert outcome.status == 0
    assert "5000 bytes; zeros were added up to 8192" in outcome.err


def test_the_time_of_a_snapshot_is_that_of_its_file(
    cli: CommandLine, url: str, image: Path
) -> None:
    """So that retention counts old images as old ones; never as of the future."""
    for name, when in (("old", 1_000_000_000), ("future", time.time() + 1e6)):
        os.utime(image, (when, when))
        cli.done("repo", "import", image, url, f"a@{name}")
    listed = cli.json("repo", "list", url)["snapshots"]
    assert (listed[0]["snapshot"], listed[0]["created"][:4]) == ("old", "2001")
    assert cli.json("repo", "prune", url, "a", "--keep-last", "2", "--dry-run")["left"] == 0
