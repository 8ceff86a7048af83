"""repo and backup from the command line, with no daemon and repositories in directories."""

import json
import random
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from backends.bandwidth import LimitedObjectStore
from backends.errors import StorageError, UnavailableError
from backends.objects import ObjectStore
from nbdserve.cli import backup_run
from snapshots.repository import PushReport, Repository
from tests.nbdserve.volume_content import read, write

from .conftest import CommandLine

MIB = 1 << 20
PUSH_KEYS = {
    "volume", "snapshot", "push", "already_there", "parent", "read", "changed", "uploaded",
    "segments", "pages", "repaired", "resumed", "seconds", "warnings",
}  # fmt: skip


@pytest.fixture
def url(tmp_path: Path, cli: CommandLine) -> str:
    """A repository that is made already."""
    where = f"file://{tmp_path}/repository"
    cli.done("repo", "init", where)
    return where


def fill(cli: CommandLine, volume: str, seed: int = 1) -> bytes:
    """Make a volume of 8 MiB with some data; return its content."""
    cli.done("volume", "create", volume, "--size", "8M")
    content = random.Random(seed).randbytes(3 * MIB)
    write(cli.data, volume, MIB, content)
    return bytes(MIB) + content + bytes(4 * MIB)


def snapshots_of(cli: CommandLine, volume: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cli.json("snapshot", "list", volume)["snapshots"]
    return found


def test_push_list_restore_delete_verify(cli: CommandLine, url: str) -> None:
    content = fill(cli, "a")
    cli.done("snapshot", "create", "a@one")
    report = cli.json("repo", "push", "a@one", url)
    assert set(report) == PUSH_KEYS
    assert (report["parent"], report["changed"]) == (None, 3 * MIB)
    assert report["uploaded"] > 3 * MIB
    assert cli.json("repo", "push", "a@one", url)["already_there"] is True

    write(cli.data, "a", 2 * MIB, b"x" * 4096)
    cli.done("snapshot", "create", "a@two")
    second = cli.json("repo", "push", "a@two", url)
    assert second["parent"] == "one"
    assert 0 < second["read"] <= 2 * 65536
    listed = cli.json("repo", "list", url)["snapshots"]
    assert [(s["volume"], s["snapshot"], s["size"]) for s in listed] == [
        ("a", "one", 8 * MIB),
        ("a", "two", 8 * MIB),
    ]
    for key in ("created", "pushed"):
        assert listed[0][key].endswith("Z")
        datetime.fromisoformat(listed[0][key])
    assert "a@one" in cli.done("repo", "list", url)

    restored = cli.json("repo", "restore", url, "a@one", "b")
    assert (restored["written"], restored["restored"]["name"]) == (3 * MIB, "b")
    assert read(cli.data, "b") == content
    cli.done("repo", "restore", url, "a@two", "c")
    assert read(cli.data, "c") == read(cli.data, "a@two")

    assert cli.json("repo", "delete", url, "a@one")["deleted"]["snapshot"] == "one"
    assert [s["snapshot"] for s in cli.json("repo", "list", url)["snapshots"]] == ["two"]
    assert cli.json("repo", "verify", url, "--deep")["damaged"] == []
    assert cli.json("repo", "verify", url, "a@two")["snapshots"] == 1


def test_damage_is_reported_and_nothing_half_made(
    cli: CommandLine, url: str, tmp_path: Path
) -> None:
    fill(cli, "a")
    cli.done("snapshot", "create", "a@one")
    cli.done("repo", "push", "a@one", url)
    files = [path for path in (tmp_path / "repository").rglob("*") if path.is_file()]
    segment = max(files, key=lambda path: path.stat().st_size)
    segment.chmod(0o600)
    with segment.open("r+b") as file:
        file.seek(segment.stat().st_size // 2)
        file.write(bytes(64))
    outcome = cli("repo", "verify", url, "--deep")
    assert outcome.status == 1
    assert segment.name in outcome.out
    assert "needed by a@one" in outcome.out
    assert "damaged" in outcome.err
    found = json.loads(cli("repo", "verify", url, "a@one", "--deep", "--json").out)["damaged"]
    assert [set(one) for one in found] == [{"key", "problem", "offsets", "snapshots"}]
    assert (len(found[0]["offsets"]), found[0]["snapshots"]) == (1, ["a@one"])
    assert segment.name in cli("repo", "restore", url, "a@one", "b").line
    assert [v["name"] for v in cli.json("volume", "list")["volumes"]] == ["a"]
    assert len(list((cli.data / "layers").iterdir())) == 2  # the snapshot's and the head


def test_what_is_sound_can_be_salvaged(cli: CommandLine, url: str, tmp_path: Path) -> None:
    content = fill(cli, "a")
    cli.done("snapshot", "create", "a@one")
    cli.done("repo", "push", "a@one", url)
    whole = cli.json("repo", "restore", url, "a@one", "b", "--skip-damaged")
    assert whole["holes"] == []
    segment = next((tmp_path / "repository" / "segments").glob("*/0*"))
    segment.chmod(0o600)
    with segment.open("r+b") as file:
        file.seek(32 + 5 * 65536 + 77)
        file.write(bytes(64))
    zeroed = content[: MIB + 5 * 65536] + bytes(65536) + content[MIB + 6 * 65536 :]
    outcome = cli("repo", "restore", url, "a@one", "c", "--skip-damaged", "--json")
    assert outcome.status == 1
    document = json.loads(outcome.out)
    assert [(h["offset"], h["length"]) for h in document["holes"]] == [(MIB + 5 * 65536, 65536)]
    assert document["restored"]["name"] == "c"
    assert "lacks 64K of a@one in 1 place" in outcome.err
    assert read(cli.data, "c") == zeroed
    outcome = cli("repo", "restore", url, "a@one", "d", "--skip-damaged")
    assert outcome.status == 1
    assert str(MIB + 5 * 65536) in outcome.out
    image = tmp_path / "a.raw"
    outcome = cli("repo", "export", url, "a@one", image, "--skip-damaged")
    assert (outcome.status, str(MIB + 5 * 65536) in outcome.out) == (1, True)
    assert image.read_bytes() == zeroed
    assert cli("repo", "export", url, "a@one", tmp_path / "b.raw").status == 1
    assert not (tmp_path / "b.raw").exists()
    assert cli("repo", "restore", url, "a@one", "e", "--skip-damaged", "--lazy").status == 2


def test_a_backup_heals_what_verify_found(cli: CommandLine, url: str, tmp_path: Path) -> None:
    content = fill(cli, "a")
    cli.done("backup", "a", "--repo", url)
    (segment, *_) = (tmp_path / "repository" / "segments").glob("*/0*")
    segment.unlink()
    assert "noted 1 damaged" in cli("repo", "verify", url).out
    report = cli.json("backup", "a", "--repo", url)["backups"][0]
    assert report["parent"]
    assert report["repaired"] == report["changed"] == 3 * MIB
    cli.done("repo", "restore", url, f"a@{report['snapshot']}", "b")
    assert read(cli.data, "b") == content
    # The older backup stays harmed, and gc says nothing of it.
    found = json.loads(cli("repo", "verify", url, "--json").out)["damaged"]
    assert [one["snapshots"] for one in found] == [[f"a@{report['parent']}"]]
    cli.done("repo", "delete", url, f"a@{report['parent']}")
    cli.done("repo", "gc", url)
    cli.done("repo", "verify", url, "--deep")
    assert not list((tmp_path / "repository").glob("damaged*"))


def test_restore_refuses_before_it_reads(cli: CommandLine, url: str) -> None:
    fill(cli, "a")
    cli.done("snapshot", "create", "a@one")
    cli.done("repo", "push", "a@one", url)
    assert "a exists" in cli("repo", "restore", url, "a@one", "a").line
    assert "a@nothing" in cli("repo", "restore", url, "a@nothing", "b").line
    assert "name" in cli("repo", "restore", url, "a@one", "b/c").line


def test_a_restore_may_make_the_data_directory(cli: CommandLine, url: str, tmp_path: Path) -> None:
    content = fill(cli, "a")
    cli.done("backup", "a", "--repo", url)
    name = cli.json("repo", "list", url)["snapshots"][0]["snapshot"]
    other = tmp_path / "other"
    cli.done("repo", "restore", url, f"a@{name}", "a", "--data", other)
    assert read(other, "a") == content


@pytest.mark.parametrize("chunk_size", ["0", "3K", "8M", "ten"])
def test_chunk_sizes_that_cannot_be(cli: CommandLine, tmp_path: Path, chunk_size: str) -> None:
    outcome = cli("repo", "init", f"file://{tmp_path}/other", "--chunk-size", chunk_size)
    assert outcome.status == 1
    assert "size" in outcome.line
    assert not (tmp_path / "other").exists()


def test_init_says_what_it_made(cli: CommandLine, tmp_path: Path) -> None:
    made = cli.json("repo", "init", f"file://{tmp_path}/other", "--chunk-size", "128K")
    assert made["chunk_size"] == 131072
    assert made["repository"]
    assert cli("repo", "init", f"file://{tmp_path}/other").status == 1


def test_backups_of_a_group(cli: CommandLine, url: str) -> None:
    contents = {name: fill(cli, name, seed) for seed, name in enumerate(("a", "b"))}
    cli.done("snapshot", "create", "a@mine")
    first = cli.json("backup", "a", "b", "a", "--repo", url)["backups"]
    assert [report["volume"] for report in first] == ["a", "b"]
    assert all(set(report) == PUSH_KEYS for report in first)
    name = first[0]["snapshot"]
    datetime.strptime(name, "backup-%Y%m%dT%H%M%SZ")
    assert first[1]["snapshot"] == name
    assert [s["name"] for s in snapshots_of(cli, "a")] == ["mine", name]

    write(cli.data, "a", 0, b"y" * 4096)
    second = cli.json("backup", "a", "b", "--repo", url)["backups"]
    assert [report["parent"] for report in second] == [name, name]
    assert second[0]["uploaded"] < first[0]["uploaded"] / 10
    assert (second[1]["read"], second[1]["changed"]) == (0, 0)
    # The newest stays as the base of the next; what others made is none of backup's business.
    newest = second[0]["snapshot"]
    assert [s["name"] for s in snapshots_of(cli, "a")] == ["mine", newest]
    assert [s["name"] for s in snapshots_of(cli, "b")] == [newest]
    cli.done("repo", "restore", url, f"b@{name}", "c")
    assert read(cli.data, "c") == contents["b"]
    cli.done("repo", "restore", url, f"a@{newest}", "d")
    assert read(cli.data, "d") == b"y" * 4096 + contents["a"][4096:]


def test_backups_to_two_repositories_keep_a_base_for_each(
    cli: CommandLine, url: str, tmp_path: Path
) -> None:
    other = f"file://{tmp_path}/other"
    cli.done("repo", "init", other)
    fill(cli, "a")
    for _ in range(2):
        for where in (url, other):
            cli.done("backup", "a", "--repo", where)
    labels = [tuple(s["labels"].items()) for s in snapshots_of(cli, "a")]
    assert len(labels) == len(set(labels)) == 2
    for where in (url, other):
        assert cli.json("backup", "a", "--repo", where)["backups"][0]["parent"]


def test_a_backup_that_cannot_begin_changes_nothing(
    cli: CommandLine, url: str, tmp_path: Path
) -> None:
    fill(cli, "a")
    for arguments in (
        ["a", "--repo", f"file://{tmp_path}/absent"],
        ["a", "--repo", "nonsense"],
        ["a", "nothing", "--repo", url],
        ["a", "b/c", "--repo", url],
    ):
        assert cli("backup", *arguments).line
        assert snapshots_of(cli, "a") == []
    assert cli.json("repo", "list", url) == {"snapshots": []}


def test_gc(cli: CommandLine, url: str) -> None:
    fill(cli, "a")
    cli.done("snapshot", "create", "a@one")
    cli.done("repo", "push", "a@one", url)
    cli.done("repo", "delete", url, "a@one")
    dry = cli.json("repo", "gc", url, "--dry-run")
    assert dry["dry_run"] is True
    assert "would free 3" in cli.done("repo", "gc", url, "--dry-run")
    report = cli.json("repo", "gc", url, "--give-up-after", "12h")
    assert report["freed"] == dry["freed"] > 3 * MIB
    assert (report["live"], report["under_way"], report["given_up"]) == (0, 0, 0)
    root = Path(url.removeprefix("file://"))
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) < 2000
    assert "freed 0" in cli.done("repo", "gc", url)
    for wrong in ("7", "1y", "-1d", "soon", ""):
        assert cli("repo", "gc", url, "--give-up-after", wrong).status == 2


def test_the_snapshot_of_a_failed_push_is_deleted_again(
    cli: CommandLine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        fill(cli, name)
    before = cli.json("backup", "a", "b", "c", "--repo", url)["backups"][0]["snapshot"]
    push = Repository.push

    def fail_for_b(self: Repository, source: Any, progress: Any, line: str) -> PushReport:
        if source.volume == "b":
            raise UnavailableError("the store went away")
        return push(self, source, progress, line=line)

    monkeypatch.setattr(Repository, "push", fail_for_b)
    outcome = cli("backup", "a", "b", "c", "--repo", url, "--json")
    assert outcome.status == 1
    assert len(outcome.err.splitlines()) == 1
    assert "backup of b failed" in outcome.err
    assert "the store went away" in outcome.err
    reports = json.loads(outcome.out)["backups"]
    assert [report["volume"] for report in reports] == ["a", "b", "c"]
    assert reports[1] == {"volume": "b", "snapshot": None, "error": "the store went away"}
    assert [s["name"] for s in snapshots_of(cli, "b")] == [before]
    for name in ("a", "c"):
        assert [s["name"] for s in snapshots_of(cli, name)] == [reports[0]["snapshot"]]


def test_an_interrupted_backup_leaves_no_snapshot(
    cli: CommandLine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cli, "a")
    fill(cli, "b")

    def interrupt(*arguments: Any, **more: Any) -> PushReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(Repository, "push", interrupt)
    assert cli("backup", "a", "b", "--repo", url).status == 130
    assert cli.json("snapshot", "list") == {"snapshots": []}


def test_an_older_snapshot_that_cannot_be_deleted_is_only_a_warning(
    cli: CommandLine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cli, "a")
    first = cli.json("backup", "a", "--repo", url)["backups"][0]["snapshot"]

    def refuse(client: Any, volume: str, name: str) -> None:
        raise StorageError("somebody reads it")

    monkeypatch.setattr(backup_run, "delete_snapshot", refuse)
    outcome = cli("backup", "a", "--repo", url)
    assert outcome.status == 0
    assert outcome.err == f"nbdserve: warning: a@{first} stays: somebody reads it\n"
    assert len(snapshots_of(cli, "a")) == 2


def test_backups_within_one_second_have_names_of_their_own(
    cli: CommandLine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still until the command waits for it."""
    fill(cli, "a")
    moments = [datetime(2024, 5, 1, 12, 0, second) for second in (0, 0, 0, 1)]
    waits: list[float] = []

    class Clock:
        @staticmethod
        def now(zone: object) -> datetime:
            return moments.pop(0)

    monkeypatch.setattr(backup_run, "datetime", Clock)
    monkeypatch.setattr(time, "sleep", waits.append)
    names = [cli.json("backup", "a", "--repo", url)["backups"][0]["snapshot"] for _ in range(2)]
    assert names == ["backup-20240501T120000Z", "backup-20240501T120001Z"]
    assert len(waits) == 2


def test_limits_reach_the_store_of_every_command_that_moves_data(
    cli: CommandLine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int | None, int | None]] = []
    begin = LimitedObjectStore.__init__

    def noting(
        self: LimitedObjectStore, inner: ObjectStore, upload: int | None, download: int | None
    ) -> None:
        taken.append((upload, download))
        begin(self, inner, upload, download)

    monkeypatch.setattr(LimitedObjectStore, "__init__", noting)
    content = fill(cli, "a")
    cli.done("snapshot", "create", "a@one")
    image = tmp_path / "image"
    commands: list[list[str | Path]] = [
        ["repo", "push", "a@one", url],
        ["repo", "restore", url, "a@one", "b"],
        ["repo", "export", url, "a@one", image],
        ["repo", "import", image, url, "c@one"],
        ["repo", "verify", url, "--deep"],
        ["repo", "gc", url],
        ["backup", "a", "--repo", url],
    ]
    for number, command in enumerate(commands):
        cli.done(*command, "--limit-upload", f"{number + 1}G", "--limit-download", "2T")
        assert taken.pop() == (number + 1 << 30, 2 << 40)
        assert taken == []
    assert read(cli.data, "b") == content
    cli.done("repo", "list", url)
    cli.done("repo", "verify", url)
    assert taken == []
    cli.done("repo", "verify", url, "--limit-download", "2T")
    assert taken == [(None, 2 << 40)]


@pytest.mark.parametrize("rate", ["0", "1000", "fast", "", "-1"])
def test_limits_that_are_none(cli: CommandLine, url: str, rate: str) -> None:
    outcome = cli("repo", "verify", url, "--limit-download", rate)
    assert outcome.status == 2
    assert "--limit-download" in outcome.line


def test_a_lazy_restore_has_a_rate_and_no_limits(cli: CommandLine, url: str) -> None:
    outcome = cli("repo", "restore", url, "a@one", "b", "--lazy", "--limit-download", "1M")
    assert outcome.status == 2
    assert "--limit-download" in outcome.line
    assert "--rate" in outcome.line


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["list", "URL", "--at", "yesterday"], 2, "'yesterday' is no time such as"),
        (["list", "URL", "--at", "2026-11-21T18:30:00Z"], 1, "only s3:// has older versions"),
        (["restore", "URL", "a@one", "b", "--lazy", "--at", "2026-11-21"], 2, "--at"),
        (["import", "/dev/null", "URL", "a@b", "--storage-class", "GLACIER"], 2, "GLACIER_IR"),
        (["gc", "URL", "--storage-class", "STANDARD_IA"], 1, "only s3:// has storage classes"),
        (["init", "URL/new", "--object-lock", "30"], 2, "is no time such as"),
        (["init", "URL/new", "--object-lock", "12h"], 1, "one day to 24000 days"),
        (["init", "URL/new", "--object-lock", "30d"], 1, "only buckets in S3 can have it"),
    ],
)
def test_what_only_a_bucket_can_do(
    cli: CommandLine, url: str, arguments: list[str], status: int, words: str
) -> None:
    outcome = cli("repo", *(argument.replace("URL", url) for argument in arguments))
    assert outcome.status == status
    assert words in outcome.line
