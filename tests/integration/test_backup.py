"""Backups to a real S3 server and to a directory: what is uploaded, restored, and refused."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .parts import KIB, MIB, Daemon, S3Server, background, find_free_port, require, run

VOLUME_BYTES = 512 * MIB
DATA_BYTES = 256 * MIB
CHANGED_RUNS = 10
COMPARE = ("qemu-img", "compare", "-f", "raw", "-F", "raw")


@dataclass
class Repository:
    """Where a backup goes, and how to look at it without nbdserve."""

    url: str
    env: dict[str, str]
    list_sizes: Callable[[], dict[str, int]]

    def size(self) -> int:
        """Return the bytes that it takes."""
        return sum(self.list_sizes().values())


@contextlib.contextmanager
def s3_repository(server: S3Server) -> Iterator[Repository]:
    """Yield a repository below a prefix of a new bucket."""
    bucket = server.new_bucket()
    yield Repository(f"s3://{bucket}/some/prefix", server.env, lambda: server.list_sizes(bucket))
    assert all(key.startswith("some/prefix/") for key in server.list_sizes(bucket))
    server.empty_bucket(bucket)


@contextlib.contextmanager
def directory_repository(directory: Path) -> Iterator[Repository]:
    """Yield a repository in a directory."""

    def list_sizes() -> dict[str, int]:
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {str(path.relative_to(directory)): path.stat().st_size for path in files}

    yield Repository(f"file://{directory}", {}, list_sizes)


@pytest.fixture(params=["s3", "file"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    """Yield an empty repository, not initialised."""
    if request.param == "s3":
        with s3_repository(request.getfixturevalue("s3_server")) as made:
            yield made
    else:
        with directory_repository(tmp_path / "repository") as made:
            yield made


def make_piece(source: random.Random, length: int) -> bytes:
    """Return data that compresses to about half, no two pieces alike."""
    random_part = source.randbytes(length // 2)
    text_part = b"%032x" % source.getrandbits(128)
    piece = random_part + text_part * (length // 2 // len(text_part) + 1)
    return piece[:length]


def write_source(path: Path) -> None:
    """Write a file half of data: runs of 32 MiB with holes as long between them."""
    source = random.Random(5)
    with path.open("wb") as file:
        file.truncate(VOLUME_BYTES)
        for run_start in range(0, VOLUME_BYTES, 64 * MIB):
            file.seek(run_start)
            for _ in range(32 * MIB // (128 * KIB)):
                file.write(make_piece(source, 128 * KIB))


def change_one_percent(daemon: Daemon, directory: Path) -> None:
    """Overwrite 1 % of the volume's data in runs of 256 KiB at places of 4 KiB granularity."""
    source = random.Random(6)
    commands = []
    for index in range(CHANGED_RUNS):
        piece = directory / f"piece-{index}"
        # Within a run of data, each in a part of its own.
        start = index * 64 * MIB % VOLUME_BYTES + index * 64 * MIB // VOLUME_BYTES * 16 * MIB
        offset = start + source.randrange(15 * MIB // 4096) * 4096
        piece.write_bytes(make_piece(source, 256 * KIB))
        commands += ["-c", f"write -s {piece} {offset} {256 * KIB}"]
    run("qemu-io", "-f", "raw", *commands, daemon.uri("disk"))


def compare(daemon: Daemon, export: str, other: str) -> None:
    """Compare two exports byte by byte."""
    run(*COMPARE, daemon.uri(export), daemon.uri(other))


@pytest.mark.timeout(600)
def test_second_backup_uploads_only_what_changed(
    daemon: Daemon, repository: Repository, tmp_path: Path
) -> None:
    require("qemu-img", "qemu-io", "nbdcopy")
    source = tmp_path / "source"
    write_source(source)
    daemon.command("volume", "create", "disk", "--size", str(VOLUME_BYTES))
    run("nbdcopy", "--connections=4", source, daemon.uri("disk"))
    source.unlink()
    assert daemon.json("volume", "show", "disk")["mapped"] == DATA_BYTES
    daemon.command("repo", "init", repository.url, env=repository.env)

    sizes = [repository.size()]
    reports = []
    for number in range(2):
        report = daemon.json("backup", "disk", "--repo", repository.url, env=repository.env)
        reports.append(report["backups"][0])
        sizes.append(repository.size())
        # Restored now, since the next backup deletes this one's snapshot from the data directory.
        name, restored = f"disk@{reports[-1]['snapshot']}", f"restored-{number}"
        daemon.command("repo", "restore", repository.url, name, restored, env=repository.env)
        compare(daemon, restored, name)
        assert daemon.json("volume", "show", restored)["mapped"] <= DATA_BYTES
        if number == 0:
            change_one_percent(daemon, tmp_path)
            assert (
                run(*COMPARE, daemon.uri(restored), daemon.uri("disk"), check=False).returncode == 1
            )
    first, second = (report["uploaded"] for report in reports)
    # What the command says is what the store holds, but for a pointer of a few hundred bytes.
    assert 0 <= sizes[1] - sizes[0] - first < KIB
    assert 0 <= sizes[2] - sizes[1] - second < KIB
    assert DATA_BYTES * 0.4 < first < DATA_BYTES * 0.7
    assert CHANGED_RUNS * 256 * KIB * 0.4 < second <= 0.03 * first

    listing = daemon.json("repo", "list", repository.url, env=repository.env)["snapshots"]
    assert [entry["snapshot"] for entry in listing] == [report["snapshot"] for report in reports]
    # The second backup took nothing from the first.
    name = f"disk@{reports[0]['snapshot']}"
    daemon.command("repo", "restore", repository.url, name, "again", env=repository.env)
    compare(daemon, "again", "restored-0")
    for volume in ("restored-0", "restored-1", "again"):
        daemon.command("volume", "delete", volume)

    third = daemon.json("backup", "disk", "--repo", repository.url, env=repository.env)
    assert third["backups"][0]["uploaded"] < MIB
    # Deleting the one in the middle harms neither the older nor the newer one.
    middle, last = reports[1]["snapshot"], third["backups"][0]["snapshot"]
    daemon.command("repo", "delete", repository.url, f"disk@{middle}", env=repository.env)
    for snapshot in (reports[0]["snapshot"], last):
        daemon.command("repo", "verify", repository.url, f"disk@{snapshot}", "--deep",
                       env=repository.env)  # fmt: skip


def test_backup_while_the_guest_writes(
    daemon: Daemon, repository: Repository, tmp_path: Path
) -> None:
    """Each backup holds one instant of its volumes, and no error reaches the writer."""
    require("fio", "qemu-img")
    for name in ("disk", "other"):
        daemon.command("volume", "create", name, "--size", "64M")
    daemon.command("repo", "init", repository.url, env=repository.env)
    load = ["fio", "--name=load", "--ioengine=nbd", f"--uri={daemon.uri('disk')}", "--size=64M",
            "--rw=randrw", "--bsrange=512-256k", "--bs_unaligned=1", "--verify=crc32c",
            "--verify_fatal=1", "--verify_state_save=0", "--iodepth=32", "--rate=4m"]  # fmt: skip
    with background(*load) as writer:
        for number in range(4):
            report = daemon.json(
                "backup", "disk", "other", "--repo", repository.url, env=repository.env
            )
            # The next backup deletes this one's snapshot; a clone keeps what it held.
            backup = report["backups"][0]["snapshot"]
            daemon.command("volume", "create", f"copy-{number}", "--from", f"disk@{backup}")
        writer()
    listing = daemon.json("repo", "list", repository.url, env=repository.env)["snapshots"]
    backups = [entry["snapshot"] for entry in listing if entry["volume"] == "disk"]
    assert len(backups) == 4
    assert len([entry for entry in listing if entry["volume"] == "other"]) == 4
    for number, backup in enumerate(backups):
        daemon.command("repo", "restore", repository.url, f"disk@{backup}", f"restored-{number}",
                       env=repository.env)  # fmt: skip
        compare(daemon, f"restored-{number}", f"copy-{number}")


def expect_line(daemon: Daemon, *arguments: str, env: dict[str, str], mentions: str) -> None:
    """Run a command that must fail with status 1 and one line that mentions a word."""
    result = daemon.command(*arguments, check=False, env=env, timeout=120)
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    last = result.stderr.strip().splitlines()
    assert len(last) == 1, result.stderr
    assert mentions.lower() in last[0].lower(), last[0]


def expect_nothing_changed(daemon: Daemon, snapshots: int) -> None:
    """Check that there is one volume, with this many snapshots."""
    assert [volume["name"] for volume in daemon.json("volume", "list")["volumes"]] == ["disk"]
    assert len(daemon.json("snapshot", "list")["snapshots"]) == snapshots


def test_s3_that_cannot_be_used(daemon: Daemon, s3_server: S3Server) -> None:
    daemon.command("volume", "create", "disk", "--size", "4M")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", daemon.uri("disk"))
    bucket = s3_server.new_bucket()
    url = f"s3://{bucket}/backups"
    wrong_key = {**s3_server.env, "AWS_ACCESS_KEY_ID": "nobody"}
    wrong_secret = {**s3_server.env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    no_key = {
        name: value
        for name, value in s3_server.env.items()
        if name not in {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    }
    down = {**s3_server.env, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{find_free_port()}"}
    absent = f"s3://{bucket}-absent/backups"

    # Before the repository exists, and then with it: neither makes anything.
    for step in range(2):
        for arguments in (
            ["repo", "init"],
            ["repo", "list"],
            ["repo", "restore", "disk@first", "restored"],
            ["backup", "disk"],
        ):
            if step == 1 and arguments == ["repo", "init"]:
                continue

            def place(where: str, words: list[str] = arguments) -> list[str]:
                if words[0] == "backup":
                    return [*words, "--repo", where]
                return [*words[:2], where, *words[2:]]

            held = s3_server.list_sizes(bucket)
            expect_line(daemon, *place(url), env=wrong_key, mentions="credentials")
            expect_line(daemon, *place(url), env=wrong_secret, mentions="credentials")
            expect_line(daemon, *place(url), env=no_key, mentions="credentials")
            if arguments[0] == "backup":  # connecting is tried again for a few seconds each time
                expect_line(daemon, *place(url), env=down, mentions=down["AWS_ENDPOINT_URL"])
            expect_line(daemon, *place(absent), env=s3_server.env, mentions="bucket")
            assert s3_server.list_sizes(bucket) == held
            expect_nothing_changed(daemon, snapshots=0)
        if step == 0:
            expect_line(daemon, "backup", "disk", "--repo", url, env=s3_server.env, mentions="init")
            expect_nothing_changed(daemon, snapshots=0)
            daemon.command("repo", "init", url, env=s3_server.env)
    daemon.command("backup", "disk", "--repo", url, env=s3_server.env)
    expect_nothing_changed(daemon, snapshots=1)
    s3_server.empty_bucket(bucket)


def test_directory_that_cannot_be_used(daemon: Daemon, tmp_path: Path) -> None:
    daemon.command("volume", "create", "disk", "--size", "4M")
    absent = tmp_path / "absent"
    (tmp_path / "file").write_text("not a directory")
    expect_line(daemon, "backup", "disk", "--repo", f"file://{absent}", env={}, mentions="absent")
    expect_line(daemon, "repo", "list", f"file://{absent}", env={}, mentions=str(absent))
    expect_line(daemon, "repo", "init", f"file://{tmp_path}/file/deeper", env={}, mentions="file")
    assert not absent.exists()
    for url in ("ftp://host/place", "nonsense", "file:relative", "s3://", "/a/path"):
        refused = daemon.command("repo", "init", url, check=False)
        assert refused.returncode in (1, 2)
        assert "Traceback" not in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    expect_nothing_changed(daemon, snapshots=0)


def test_what_a_repository_does_not_hold(daemon: Daemon, repository: Repository) -> None:
    env = repository.env
    daemon.command("volume", "create", "disk", "--size", "4M")
    daemon.command("repo", "init", repository.url, env=env)
    expect_line(daemon, "repo", "init", repository.url, env=env, mentions="holds a repository")
    for arguments in (
        ["backup", "nothing", "--repo", repository.url],
        ["repo", "push", "disk@nothing", repository.url],
        ["repo", "restore", repository.url, "disk@nothing", "restored"],
        ["repo", "delete", repository.url, "disk@nothing"],
        ["repo", "verify", repository.url, "disk@nothing"],
    ):
        expect_line(daemon, *arguments, env=env, mentions="nothing")
    assert daemon.json("repo", "list", repository.url, env=env)["snapshots"] == []
    daemon.command("snapshot", "create", "disk@first")
    daemon.command("repo", "push", "disk@first", repository.url, env=env)
    expect_line(
        daemon, "repo", "restore", repository.url, "disk@first", "disk", env=env, mentions="disk"
    )
    expect_nothing_changed(daemon, snapshots=1)


def test_a_damaged_repository_is_found_and_never_restored(daemon: Daemon, tmp_path: Path) -> None:
    daemon.command("volume", "create", "disk", "--size", "4M")
    pattern = tmp_path / "pattern"
    pattern.write_bytes(random.Random(9).randbytes(2 * MIB))
    run("qemu-io", "-f", "raw", "-c", f"write -s {pattern} 0 2M", daemon.uri("disk"))
    with directory_repository(tmp_path / "repository") as repository:
        daemon.command("repo", "init", repository.url)
        daemon.command("snapshot", "create", "disk@first")
        daemon.command("repo", "push", "disk@first", repository.url)
        daemon.command("repo", "verify", repository.url, "--deep")
        sizes = repository.list_sizes()
        segment = tmp_path / "repository" / max(sizes, key=lambda key: sizes[key])
        content = bytearray(segment.read_bytes())
        content[len(content) // 2] ^= 1
        segment.chmod(0o600)
        segment.write_bytes(content)
        for arguments in (
            ["repo", "verify", repository.url, "--deep"],
            ["repo", "restore", repository.url, "disk@first", "restored"],
        ):
            refused = daemon.command(*arguments, check=False)
            assert refused.returncode == 1
            assert segment.name in refused.stderr + refused.stdout
            assert "Traceback" not in refused.stderr
    expect_nothing_changed(daemon, snapshots=1)
