"""What a newer nbdserve has written is refused by this one, in a line that says so, and left alone.

So one can go back to an older version: it serves what it understands and harms nothing.
"""

import hashlib
import struct
import zlib
from pathlib import Path

import msgpack

from snapshots.extent_log import FORMAT, JOURNAL
from snapshots.records import pack_record
from snapshots.repository import envelope

from .conftest import CommandLine


def content_of(directory: Path) -> dict[Path, bytes]:
    """What is in a directory, but for who has it open."""
    return {
        file.relative_to(directory): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and file.name not in ("lock", "reserve")
    }


def make_newer(manifest: Path) -> None:
    """The same manifest, of the next version."""
    payload = msgpack.unpackb(manifest.read_bytes()[18:])
    manifest.write_bytes(pack_record(2, payload))


def test_a_volume_of_a_newer_version_is_not_served_and_not_harmed(cli: CommandLine) -> None:
    cli.done("volume", "create", "old", "--size", "1M")
    (old,) = (cli.data / "volumes").iterdir()
    cli.done("volume", "create", "new", "--size", "1M")
    cli.done("snapshot", "create", "new@kept")
    (new,) = set((cli.data / "volumes").iterdir()) - {old}
    make_newer(new)
    before = content_of(cli.data)

    listed = cli("volume", "list")
    assert listed.status == 0
    assert "old" in listed.out
    assert "new" in listed.err
    assert "version 2 is newer than this nbdserve" in listed.err
    for command in (
        ["volume", "show", "new"],
        ["volume", "delete", "new", "--with-snapshots"],
        ["snapshot", "create", "new@more"],
        ["snapshot", "delete", "new@kept"],
    ):
        assert "version 2 is newer than this nbdserve" in cli(*command).line
    assert content_of(cli.data) == before


def test_check_repairs_nothing_of_a_newer_version(cli: CommandLine) -> None:
    cli.done("volume", "create", "new", "--size", "1M")
    (manifest,) = (cli.data / "volumes").iterdir()
    make_newer(manifest)
    before = content_of(cli.data)
    outcome = cli("check", "--repair")
    assert outcome.status == 1
    assert "version 2 is newer than this nbdserve" in outcome.out
    assert content_of(cli.data) == before


def test_a_journal_of_a_newer_format_is_refused_and_stays(cli: CommandLine) -> None:
    cli.done("volume", "create", "new", "--size", "1M")
    (journal,) = cli.data.glob("layers/*/journal")
    layer = journal.parent.name
    payload = msgpack.packb([FORMAT + 1, layer, JOURNAL])
    rest = (struct.pack("<H", len(payload)) + payload).ljust(508, b"\0")
    header = struct.pack("<I", zlib.crc32(rest, zlib.crc32(layer.encode()))) + rest
    journal.write_bytes(header + journal.read_bytes()[len(header) :])
    before = content_of(cli.data)
    for command in (["snapshot", "create", "new@x"], ["check", "--repair"]):
        outcome = cli(*command)
        assert outcome.status == 1
        assert f"format {FORMAT + 1} is newer than this nbdserve" in outcome.out + outcome.err
    assert content_of(cli.data) == before


def test_a_transaction_of_a_newer_version_stops_the_directory(cli: CommandLine) -> None:
    cli.done("volume", "create", "new", "--size", "1M")
    (cli.data / "transactions" / "1").write_bytes(pack_record(2, {"manifests": []}))
    before = content_of(cli.data)
    assert "version 2 is newer than this nbdserve" in cli("volume", "list").line
    assert content_of(cli.data) == before


def test_a_repository_of_a_newer_version_is_refused(cli: CommandLine, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    url = f"file://{repository}"
    cli.done("repo", "init", url)
    (config,) = (file for file in repository.rglob("config*") if file.is_file())
    record = bytearray(config.read_bytes())
    assert record[5] == envelope.VERSION
    record[5] += 1
    fixed = envelope.ENVELOPE_SIZE - hashlib.sha256().digest_size
    body = bytes(record[envelope.ENVELOPE_SIZE :])
    record[fixed : envelope.ENVELOPE_SIZE] = hashlib.sha256(record[:fixed] + body).digest()
    config.chmod(0o600)
    config.write_bytes(record)
    before = content_of(repository)
    cli.done("volume", "create", "web", "--size", "1M")
    for command in (
        ["repo", "list", url],
        ["repo", "gc", url],
        ["repo", "verify", url],
        ["backup", "web", "--repo", url],
    ):
        assert "version 2 needs a newer nbdserve" in cli(*command).line
    assert content_of(repository) == before
