"""EIO and ENOSPC at every call of ``nbdserve check --repair``, with a daemon and without one.

The directory has all that is repaired: a torn end of a journal, layers of nobody with and without
data, a damaged deletion. Whatever fails, the check ends with a report or with one line; what it
says is repaired is, nothing else has changed, and the next one repairs the rest.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.errors import StorageError
from backends.local_layers import LocalLayerStore
from snapshots.catalogue import Catalogue
from snapshots.checking import CheckReport, check_store
from snapshots.extent_log import SECTOR, encode_extents
from tests.durability.faults import Fault, Seam
from tests.durability.faults_model import BLOCK
from tests.durability.faults_script import environment, run
from tests.durability.test_faults import ALL, READS, new_directory

ORPHANS = ("00000000000000aa", "00000000000000bb")
DELETION = "0123456789abcdef"


async def read(catalogue: Catalogue) -> list[bytes]:
    """What the volume and its snapshot hold."""
    found = []
    for handle in (
        await catalogue.open_volume("a", lambda: None),
        await catalogue.open_snapshot("a", "one", lambda: None),
    ):
        buffer = bytearray(16 * BLOCK)
        await handle.read(0, memoryview(buffer))
        await catalogue.close_export(handle)
        found.append(bytes(buffer))
    return found


async def build(data: Path) -> list[bytes]:
    """Make a directory with one volume, whose journal has a torn end; what it holds."""
    catalogue = await Catalogue.open(LocalLayerStore(data))
    await catalogue.create_volume("a", 16 * BLOCK)
    handle = await catalogue.open_volume("a", lambda: None)
    await handle.write(0, b"a" * 3 * BLOCK)
    await catalogue.create_snapshots([("a", "one")])
    await handle.write(BLOCK, b"b" * 3 * BLOCK)
    await catalogue.close_export(handle)
    holds = await read(catalogue)
    head = catalogue._manifests.get("a").head
    await catalogue.close()
    journal = data / "layers" / head / "journal"
    content = journal.read_bytes()
    end = -(-len(content.rstrip(b"\0")) // SECTOR) * SECTOR
    # The second sector of a sync whose first one was lost.
    (sector,) = encode_extents(head, [(8, 9, 1)], end // SECTOR, end // SECTOR - 1)
    torn = content[:end] + bytes(SECTOR) + sector
    journal.write_bytes(torn.ljust(len(content), b"\0"))
    return holds


def litter(data: Path) -> None:
    """What a catalogue deals with at its start, made behind it."""
    for name in ORPHANS:
        (data / "layers" / name).mkdir()
    (data / "layers" / ORPHANS[1] / "data-00000").write_bytes(b"x" * BLOCK)
    (data / "deletions" / DELETION).write_bytes(b"damaged")


@pytest.fixture(scope="module")
def original() -> Iterator[tuple[Path, list[bytes]]]:
    with new_directory() as directory, environment(0, []):
        data = Path(directory) / "original"
        yield data, run(build(data))


async def check(data: Path, seam: Seam, online: bool) -> CheckReport | None:
    """Repair, and let the seam's fault strike only there; None: it ended with one line."""
    catalogue = None
    if online:
        fault, seam.fault = seam.fault, None
        catalogue = await Catalogue.open(LocalLayerStore(data))
        litter(data)
        seam.begin_again()
        seam.fault = fault
    try:
        if catalogue is not None:
            return await catalogue.check_directory(None, repair=True)
        return await check_store(LocalLayerStore(data), None, repair=True)
    except (OSError, StorageError) as error:
        assert "\n" not in str(error)
        assert not isinstance(error, OSError) or error.errno in (errno.EIO, errno.ENOSPC)
        return None
    finally:
        seam.clear()
        if catalogue is not None:
            await catalogue.close()


def play(
    original: tuple[Path, list[bytes]], online: bool, fault: Fault | None
) -> tuple[list[str], bool]:
    """The calls of a check with a fault, and whether it struck; AssertionError."""
    source, holds = original
    data = source.parent / "data"
    log: list[str] = []
    shutil.copytree(source, data)
    try:
        if not online:
            litter(data)
        with environment(1, log), Seam(data, fault) as seam:
            report = run(check(data, seam, online))
            assert not seam.close_all()
            calls = seam.names[: seam.counted]
            for found in [] if report is None else report.findings:
                if found.repaired:
                    stays = "journal" in found.file
                    assert Path(found.file).exists() == stays, f"not repaired: {found}"
            seam.lose()
            left = run(check_store(LocalLayerStore(data), None, repair=True)).findings
            assert all(found.repaired or "/lost/" in found.file for found in left), left
            (finding,) = run(check_store(LocalLayerStore(data), None, True)).findings
            assert finding.file == str(data / "lost" / ORPHANS[1])

            async def serve() -> None:
                catalogue = await Catalogue.open(LocalLayerStore(data))
                assert await read(catalogue) == holds
                assert len(await catalogue._store.list_layers()) == 2
                await catalogue.close()

            run(serve())
        assert (data / "lost" / ORPHANS[1] / "data-00000").read_bytes() == b"x" * BLOCK
        assert not any("\n" in line for line in log), log
        return calls, seam.fired
    finally:
        shutil.rmtree(data)


@pytest.mark.parametrize("online", [False, True])
def test_every_call_of_a_repair_fails(original: tuple[Path, list[bytes]], online: bool) -> None:
    calls, _ = play(original, online, None)
    assert {call.split()[0] for call in calls} >= {"open", "read", "rename", "fsync", "unlink"}
    faults = [Fault(call, errno.EIO) for call in calls]
    faults += [Fault(call, errno.ENOSPC) for call in calls if ALL or call.split()[0] not in READS]
    print(f"{len(faults)} faults at {len(calls)} calls")
    for fault in faults:
        try:
            assert play(original, online, fault)[1], "it never came to this"
        except AssertionError as error:
            error.add_note(f"{fault}, {'online' if online else 'offline'}")
            raise
