"""Checking: whatever becomes of a metadata file is found, and never served as data.

The directory under test has what a directory can have: sealed layers with indexes, heads with
journals, a clone, a merge that was interrupted, a transaction and a deletion that were left over.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from backends.errors import CorruptError, NotFoundError, StorageError
from backends.local_layers import LocalLayerStore
from snapshots import merge as merge_module
from snapshots.catalogue import Catalogue
from snapshots.checking import CheckReport, Finding, check_store
from snapshots.extent_log import SECTOR, encode_extents
from snapshots.manifest import pack_deletion, pack_transaction, salvage_name, unpack_manifest
from snapshots.merging import Merging

BLOCK = 4096
BLOCKS = 300
SIZE = BLOCKS * BLOCK

Contents = dict[str, str]
"""SHA-256 of what each volume and snapshot holds."""


async def read_all(catalogue: Catalogue) -> dict[str, str | None]:
    """What every volume and snapshot reads as; None for what is refused."""
    found: dict[str, str | None] = {}
    exports = [(name, None) for name in catalogue.volume_names()]
    exports += [(info.volume, info.name) for info in catalogue.list_snapshots()]
    for volume, snapshot in exports:
        name = volume if snapshot is None else f"{volume}@{snapshot}"
        try:
            if snapshot is None:
                handle = await catalogue.open_volume(volume, lambda: None)
            else:
                handle = await catalogue.open_snapshot(volume, snapshot, lambda: None)
        except (StorageError, OSError):
            found[name] = None
            continue
        buffer = bytearray(handle.size)
        try:
            await handle.read(0, memoryview(buffer))
            found[name] = hashlib.sha256(buffer).hexdigest()
        except OSError:
            found[name] = None
        await catalogue.close_export(handle)
    return found


async def build(data: Path) -> Contents:
    """Make the directory; what its volumes and snapshots hold."""
    choice = random.Random(5)
    catalogue = await Catalogue.open(LocalLayerStore(data))
    for name in ("web", "mail"):
        await catalogue.create_volume(name, SIZE)
        for snapshot in ("a", "b", "c", "d"):
            handle = await catalogue.open_volume(name, lambda: None)
            for _ in range(40):
                first = choice.randrange(BLOCKS - 4)
                if choice.random() < 0.2:
                    await handle.trim(first * BLOCK, 3 * BLOCK)
                else:
                    await handle.write(first * BLOCK, choice.randbytes(choice.randrange(1, 9000)))
                if choice.random() < 0.2:
                    await handle.flush()
            await handle.flush()
            await catalogue.close_export(handle)
            if snapshot != "d":
                await catalogue.create_snapshots([(name, snapshot)])
    await catalogue.clone_volume("copy", "web", "b")
    handle = await catalogue.open_volume("copy", lambda: None)
    await handle.write(0, b"copy" * BLOCK)
    await handle.flush()
    await catalogue.close_export(handle)
    # A merge is interrupted behind its first chunk, after the source's blocks have gone.
    stopped = merge_module._punch
    with pytest.MonkeyPatch.context() as patch:

        def punches_and_fails(*arguments: object) -> None:
            stopped(*arguments)  # type: ignore[arg-type]
            raise OSError(5, "stopped here")

        patch.setattr(merge_module, "_punch", punches_and_fails)
        patch.setattr(merge_module, "_CHUNK_RUNS", 8)
        with pytest.raises(OSError):
            await catalogue.delete_snapshot("mail", "b")
        contents = await read_all(catalogue)
        manifests = dict(catalogue._manifests.volumes)
        await catalogue.close()
    left = [manifest.changed(size=manifest.size) for manifest in manifests.values()]
    (data / "transactions" / "0123456789abcdef").write_bytes(pack_transaction(left))
    (data / "deletions" / "0123456789abcdef").write_bytes(pack_deletion(["fedcba9876543210"]))
    return {name: content for name, content in contents.items() if content is not None}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory where syncing costs nothing: nothing of this is about power cuts."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def original(scratch: Path) -> tuple[Path, Contents]:
    data = scratch / "original"
    contents = asyncio.run(build(data))
    assert len(contents) == 3 + 3 + 2
    return data, contents


@pytest.fixture
def data(original: tuple[Path, Contents], scratch: Path) -> Iterator[Path]:
    """A copy of the directory."""
    copy = scratch / "copy"
    copy_of(original[0], copy)
    yield copy
    shutil.rmtree(copy)


def metadata(data: Path) -> list[Path]:
    """Every file that says something: records and logs."""
    records = [path for kind in RECORDS for path in (data / kind).iterdir()]
    logs = [path for log in ("journal", "index", "merge") for path in data.glob(f"layers/*/{log}")]
    return [*sorted(records), *sorted(logs), *sorted(data.glob("lock")), *data.glob("reserve")]


RECORDS = ("volumes", "transactions", "merges", "deletions")


def copy_of(original: Path, data: Path) -> None:
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(original, data)


def check(data: Path, volume: str | None = None, repair: bool = False) -> CheckReport:
    return asyncio.run(check_store(LocalLayerStore(data), volume, repair))


def serve(data: Path) -> dict[str, str | None]:
    """What the directory serves now; nothing when it is refused as a whole."""

    async def scenario() -> dict[str, str | None]:
        try:
            catalogue = await Catalogue.open(LocalLayerStore(data))
        except CorruptError:
            return {}
        try:
            return await read_all(catalogue)
        finally:
            await catalogue.close()

    return asyncio.run(scenario())


def flip(content: bytes, choice: random.Random) -> bytes:
    damaged = bytearray(content)
    # Where something is said as often as in the zeroes behind it.
    said = len(content.rstrip(b"\0")) or len(content)
    at = choice.randrange(said if choice.random() < 0.7 else len(content))
    damaged[at] ^= choice.randrange(1, 256)
    return bytes(damaged)


def truncate(content: bytes, choice: random.Random) -> bytes:
    said = len(content.rstrip(b"\0")) or len(content)
    length = choice.randrange(said if choice.random() < 0.7 else len(content))
    return content[: length // SECTOR * SECTOR if choice.random() < 0.5 else length]


def zero(content: bytes, choice: random.Random) -> bytes:
    sectors = range(0, len(content.rstrip(b"\0")) or len(content), SECTOR)
    at = choice.choice(sectors)
    return content[:at] + bytes(min(SECTOR, len(content) - at)) + content[at + SECTOR :]


def says_nothing(path: Path, whole: bytes, damaged: bytes) -> bool:
    """Whether nothing is lost with what was damaged.

    Of a log, only reserved zeroes are gone from the end, or the mark in front of them. The lock's
    word only spares the next start the caches, and what is in the reserve nobody reads.
    """
    if path.name in ("lock", "reserve"):
        return True
    if path.parent.parent.name != "layers" or path.name == "index":
        return False
    said = -(-len(whole.rstrip(b"\0")) // SECTOR) * SECTOR
    mark = said - SECTOR
    if whole.startswith(damaged):
        return len(damaged) >= said + SECTOR and len(damaged) % SECTOR == 0
    return damaged == whole[:mark] + bytes(SECTOR) + whole[said:]


def judge(data: Path, contents: Contents, whole: bool, what: str) -> None:
    found = check(data).findings
    assert (found == []) == whole, (what, found)
    for finding in found:
        assert Path(finding.file).is_relative_to(data), finding
        assert finding.problem, finding
        assert finding.advice, finding
        assert "\n" not in finding.problem + finding.advice
    harmed = {name for finding in found for name in finding.harms}
    served = serve(data)
    for name, content in served.items():
        assert content is None or content == contents[name], f"{what}: {name} is served wrong"
        if content is None:
            assert name in harmed, (what, name, harmed)
    if whole:
        assert served == contents, what


def damage_one(
    files: list[Path], damage: Callable[[bytes, random.Random], bytes], which: int, seed: int
) -> tuple[Path, bytes, bytes]:
    """Damage one of the files in place, each kind as often as another; what it was and is."""
    kinds = sorted({kind_of(path) for path in files})
    kind = kinds[which % len(kinds)]
    found = [path for path in files if kind_of(path) == kind]
    path = found[which // len(kinds) % len(found)]
    content = path.read_bytes()
    damaged = damage(content, random.Random(seed))
    with path.open("r+b") as file:
        file.write(damaged)
        file.truncate()
    return path, content, damaged


def kind_of(path: Path) -> str:
    return path.parent.name if path.parent.name in RECORDS else path.name


KINDS = {*("volumes", "transactions", "deletions", "merges"), *("index", "journal", "merge")}


def test_the_directory_has_metadata_of_every_kind(data: Path) -> None:
    names = {path.name for path in data.rglob("*") if path.is_file()}
    known = {path.name for path in metadata(data)}
    assert {name for name in names - known if not name.startswith("data-")} == {"claim"}
    assert all(path.stat().st_size == 0 for path in data.rglob("claim"))
    assert {kind_of(path) for path in metadata(data)} == KINDS | {"lock", "reserve"}


@settings(max_examples=40, deadline=None)
@given(
    damage=st.sampled_from([flip, flip, truncate, zero]),
    which=st.integers(0, 1 << 16),
    seed=st.integers(0, 1 << 30),
)
def test_damage_to_any_metadata_file_is_found_and_never_served(
    original: tuple[Path, Contents],
    scratch: Path,
    damage: Callable[[bytes, random.Random], bytes],
    which: int,
    seed: int,
) -> None:
    source, contents = original
    data = scratch / "damaged"
    copy_of(source, data)
    path, content, damaged = damage_one(metadata(data), damage, which, seed)
    if damaged == content:
        return
    whole = says_nothing(path, content, damaged)
    judge(data, contents, whole, f"{damage.__name__} of {path}")


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 1 << 16), second=st.integers(0, 1 << 16))
def test_two_files_swapped_are_found_and_never_served(
    original: tuple[Path, Contents], scratch: Path, first: int, second: int
) -> None:
    source, contents = original
    data = scratch / "damaged"
    copy_of(source, data)
    files = metadata(data)
    one, other = files[first % len(files)], files[second % len(files)]
    if one == other:
        return
    between = data / "between"
    one.rename(between)
    other.rename(one)
    between.rename(other)
    # These two say nothing (see says_nothing), whichever is which.
    whole = {one.name, other.name} == {"lock", "reserve"}
    judge(data, contents, whole, f"{one} and {other} swapped")


def test_a_whole_directory_has_no_findings_and_is_left_alone(
    original: tuple[Path, Contents], data: Path
) -> None:
    before = {path: path.read_bytes() for path in metadata(data)}
    for repair in (False, True):
        report = check(data, repair=repair)
        assert report == CheckReport(3, 5, len(list((data / "layers").iterdir())), [])
        assert {path: path.read_bytes() for path in metadata(data)} == before
    assert serve(data) == original[1]
    assert check(data).findings == []


def test_no_sector_of_a_merge_log_is_lost_unseen(
    original: tuple[Path, Contents], data: Path
) -> None:
    """What it says was moved is nowhere else any more."""
    (log,) = data.glob("layers/*/merge")
    whole = log.read_bytes()
    said = -(-len(whole.rstrip(b"\0")) // SECTOR) * SECTOR
    assert said >= 3 * SECTOR
    for offset in range(0, said, SECTOR):
        kept = sorted((data / "merges").iterdir())
        log.write_bytes(whole[:offset] + bytes(SECTOR) + whole[offset + SECTOR :])
        found = check(data).findings
        if offset == said - SECTOR:
            assert found == [], "the mark"
        else:
            assert [(each.file, each.offset) for each in found] == [(str(log), offset)]
            assert serve(data)["mail@c"] is None
            assert sorted((data / "merges").iterdir()) == kept
    assert serve(data) == original[1]


def heads(data: Path) -> dict[str, Path]:
    """The directory of each volume's head."""

    async def scenario() -> dict[str, Path]:
        catalogue = await Catalogue.open(LocalLayerStore(data))
        manifests = list(catalogue._manifests.volumes.values())
        await catalogue.close()
        return {manifest.name: data / "layers" / manifest.head for manifest in manifests}

    return asyncio.run(scenario())


def only(report: CheckReport) -> Finding:
    (finding,) = report.findings
    return finding


def test_a_torn_tail_is_found_and_cut_off(original: tuple[Path, Contents], data: Path) -> None:
    journal = heads(data)["web"] / "journal"
    layer = journal.parent.name
    content = journal.read_bytes()
    end = -(-len(content.rstrip(b"\0")) // SECTOR) * SECTOR
    sequence = end // SECTOR - 1
    batch = list(encode_extents(layer, [(i, i + 1, i % 2 + 1) for i in range(BLOCKS)], sequence))
    assert len(batch) >= 2
    torn = content[:end] + bytes(SECTOR) + b"".join(batch[1:])
    journal.write_bytes(torn.ljust(len(content), b"\0"))
    found = only(check(data))
    assert (found.file, found.offset, found.repaired) == (str(journal), end, False)
    assert found.harms == ()
    assert only(check(data, repair=True)).repaired
    assert journal.read_bytes() == content[:end] + bytes(len(journal.read_bytes()) - end)
    assert check(data).findings == []
    assert serve(data) == original[1]


def test_orphans_are_removed_or_set_aside_but_not_while_anything_is_unreadable(data: Path) -> None:
    empty, full = data / "layers" / "00000000000000aa", data / "layers" / "00000000000000bb"
    for path in (empty, full):
        path.mkdir()
    (full / "data-00000").write_bytes(b"x" * BLOCK)
    assert [found.file for found in check(data).findings] == [str(empty), str(full)]
    record = next((data / "volumes").iterdir())
    whole = record.read_bytes()
    record.write_bytes(whole[:-1])
    found = only(check(data, repair=True))
    assert (found.file, found.repaired) == (str(record), False)
    assert empty.exists()
    assert full.exists()
    record.write_bytes(whole)
    report = check(data, repair=True)
    assert [found.repaired for found in report.findings] == [True, True, False]
    assert report.findings[-1].file == str(data / "lost" / full.name)
    assert not empty.exists()
    assert only(check(data)).file == str(data / "lost" / full.name)
    assert check(data, "web").findings == []


def test_data_that_is_shorter_than_its_log_says(
    original: tuple[Path, Contents], data: Path
) -> None:
    path = heads(data)["web"] / "data-00000"
    path.write_bytes(path.read_bytes()[: 2 * BLOCK])
    found = only(check(data))
    assert (found.file, found.offset, found.harms) == (str(path), 2 * BLOCK, ("web",))
    path.unlink()
    found = only(check(data, "web"))
    assert "missing" in found.problem
    assert check(data, "mail").findings == []
    served = serve(data)
    assert served == {**original[1], "web": None}


def test_what_is_missing_or_strange_in_a_layer(data: Path) -> None:
    web = heads(data)["web"]
    copy = heads(data)["copy"]
    (copy / "notes.txt").write_text("mine")
    (web / "journal").unlink()
    shutil.rmtree(heads(data)["mail"])
    report = check(data)
    assert {(Path(found.file).name, found.harms) for found in report.findings} == {
        ("notes.txt", ()),
        ("journal", ("web",)),
        ("journal", ("mail",)),
    }
    (web / "index").write_bytes(b"")
    assert any("layer that is written" in found.problem for found in check(data).findings)


def test_a_volume_by_name(data: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing"):
        check(data, "nothing")
    records = {salvage_name(path.read_bytes()): path for path in (data / "volumes").iterdir()}
    web = records["web"]
    web.write_bytes(web.read_bytes()[:-1])
    assert only(check(data, "web")).harms == ("web",)
    web.write_bytes(b"")
    with pytest.raises(NotFoundError, match=str(web)):
        check(data, "web")
    assert only(check(data)).harms == (web.name,)


def test_manifests_that_nobody_could_have_written(data: Path) -> None:
    records = {salvage_name(path.read_bytes()): path for path in (data / "volumes").iterdir()}
    web = records["web"]
    (data / "transactions" / "0123456789abcdef").unlink()
    manifest = unpack_manifest(web.read_bytes(), "web", web.name)
    mail = unpack_manifest(records["mail"].read_bytes(), "mail", records["mail"].name)
    first, second = manifest.snapshots[:2]
    for changes, says in (
        ({"size": 4097}, "4 KiB"),
        ({"name": "a b"}, "not allowed"),
        ({"name": "mail"}, "is named mail"),
        ({"snapshots": (first, replace(second, name=first.name))}, "same name"),
        ({"snapshots": (first, replace(second, id=first.id))}, "same id"),
        ({"head": first.layer}, "part of a snapshot"),
        ({"parents": {**manifest.parents, mail.head: ""}}, "says something else"),
    ):
        web.write_bytes(replace(manifest, **changes).pack())  # type: ignore[arg-type]
        assert any(says in found.problem for found in check(data).findings), says


def test_a_process_that_serves_finds_what_befalls_it_meanwhile(data: Path) -> None:
    """Clients have volumes open; what is on disk changes under them."""

    async def scenario() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(data))
        handle = await catalogue.open_volume("web", lambda: None)
        await handle.write(0, b"x" * BLOCK)
        assert (await catalogue.check_directory(None)).findings == []
        await handle.flush()
        head = catalogue._manifests.get("web").head
        journal = data / "layers" / head / "journal"
        whole = journal.read_bytes()
        said = len(whole.rstrip(b"\0")) // SECTOR * SECTOR
        # The last sector: no later one says that it was there, but whoever wrote it knows.
        for damaged in (whole[:said], bytes(0), bytes(SECTOR) + whole[SECTOR:]):
            with journal.open("r+b") as file:
                file.write(damaged.ljust(len(whole), b"\0"))
            found = only(await catalogue.check_directory("web"))
            assert (found.file, found.harms) == (str(journal), ("web",))
        with journal.open("r+b") as file:
            file.write(whole)
        record = data / "volumes" / catalogue._manifests.get("mail").id
        record.write_bytes(record.read_bytes()[:-1])
        found = only(await catalogue.check_directory(None))
        assert found.file == str(record)
        assert found.harms == ("mail", "mail@a", "mail@c")
        await catalogue.rename_volume("mail", "post")
        assert (await catalogue.check_directory(None)).findings == []
        await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())


def test_while_everything_changes_nothing_is_found(data: Path) -> None:
    async def scenario() -> None:
        catalogue = await Catalogue.open(LocalLayerStore(data))
        done = False

        async def change() -> None:
            for turn in range(12):
                handle = await catalogue.open_volume("web", lambda: None)
                for block in range(turn, BLOCKS - 2, 7):
                    await handle.write(block * BLOCK, b"y" * 5000)
                await handle.flush()
                await catalogue.create_snapshots([("web", f"t{turn}"), ("mail", f"t{turn}")])
                if turn > 2:
                    await catalogue.delete_snapshot("web", f"t{turn - 2}")
                await catalogue.close_export(handle)
                await catalogue.clone_volume(f"c{turn}", "mail", f"t{turn}")
                await catalogue.delete_volume(f"c{turn}")

        changing = asyncio.create_task(change())
        checks = 0
        while not done:
            done = changing.done()
            assert (await catalogue.check_directory(None, repair=True)).findings == []
            checks += 1
        await changing
        assert checks > 3
        await catalogue.close()

    asyncio.run(scenario())


@settings(max_examples=25, deadline=None)
@given(
    damage=st.sampled_from([flip, flip, truncate, zero]),
    which=st.integers(0, 1 << 16),
    seed=st.integers(0, 1 << 30),
    client=st.booleans(),
)
def test_damage_under_a_process_that_serves_is_found_and_never_served(
    original: tuple[Path, Contents],
    scratch: Path,
    damage: Callable[[bytes, random.Random], bytes],
    which: int,
    seed: int,
    client: bool,
) -> None:
    """With a client that has a volume open, or without; merges and indexes stand still."""
    source, contents = original
    data = scratch / "damaged"
    copy_of(source, data)

    async def scenario() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Merging, "resume", lambda self: None)
            catalogue = await Catalogue.open(LocalLayerStore(data))
        if client:
            handle = await catalogue.open_volume("web", lambda: None)
        files = [path for path in metadata(data) if path.name not in ("lock", "reserve")]
        path, content, damaged = damage_one(files, damage, which, seed)
        if damaged != content:
            found = (await catalogue.check_directory(None)).findings
            # Whoever writes a journal knows where it ends.
            known = client and path.parent.name == catalogue._manifests.get("web").head
            whole = says_nothing(path, content, damaged) and not known
            assert (found == []) == whole, (path, found)
            harmed = {name for finding in found for name in finding.harms}
            for name, read in (await read_all(catalogue)).items():
                assert read == contents[name] or (read is None and name in harmed), (path, name)
        if client:
            await catalogue.close_export(handle)
        await catalogue.close()

    asyncio.run(scenario())
    # Whatever was cached or is written at the end, no later process serves what is damaged.
    for name, read in serve(data).items():
        assert read in (None, contents[name]), name
