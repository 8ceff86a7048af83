"""Raw and qcow2 images: what is written is read back, and what is hostile is refused."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.errors import (
    CorruptError,
    ExistsError,
    InUseError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    StorageError,
)
from backends.memory_objects import MemoryObjectStore
from snapshots.images.export import export_to_file, export_to_stream
from snapshots.images.formats import Format
from snapshots.images.new_file import NewFile
from snapshots.images.qcow2_reader import Qcow2Image
from snapshots.images.qcow2_writer import CLUSTER, Qcow2Writer, _count_refcounts
from snapshots.images.raw import RawFileWriter, RawImage, RawStreamWriter
from snapshots.images.source import ImageSource, looks_like_qcow2
from snapshots.images.spool import spool
from snapshots.repository import Repository, init_in_store
from tests.snapshots.repository.model import FaultyStore, ModelVolume

BLOCK = 4096
CHUNK = 8192
MIB = 1 << 20
L2_SPAN = CLUSTER * CLUSTER // 8


@pytest.fixture
def repository() -> Repository:
    return init_in_store(MemoryObjectStore(), CHUNK)


def open_new(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)


def import_image(
    repository: Repository, path: Path, name: str, image_format: Format = Format.RAW
) -> ImageSource:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        source = ImageSource(repository, "web", name, descriptor, str(path), image_format)
        repository.push(source)
        return source
    finally:
        os.close(descriptor)


places = st.dictionaries(
    # Around the borders of clusters and of L2 tables.
    st.one_of(
        st.integers(0, 40),
        st.integers(0, 40).map(lambda number: L2_SPAN // BLOCK - 20 + number),
        st.integers(0, 100_000),
    ),
    st.binary(min_size=1, max_size=BLOCK),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(places, st.integers(1, 300_000), st.integers(1, 64))
def test_a_qcow2_image_reads_as_it_was_written(
    tmp_path: Path, written: dict[int, bytes], blocks: int, chunk: int
) -> None:
    size = blocks * BLOCK
    content = {
        number: piece.ljust(BLOCK, b"\0") for number, piece in written.items() if number < blocks
    }
    descriptor = open_new(tmp_path / "image")
    try:
        writer = Qcow2Writer(descriptor, size)
        chunks: dict[int, bytearray] = {}
        for number, piece in content.items():
            first = number // chunk * chunk
            length = min(chunk, blocks - first) * BLOCK
            data = chunks.setdefault(first * BLOCK, bytearray(length))
            start = (number - first) * BLOCK
            data[start : start + BLOCK] = piece
        for offset in sorted(chunks):
            writer.write(offset, bytes(chunks[offset]))
        writer.finish()
        image = Qcow2Image(descriptor, "image")
        assert image.size == size
        clusters = {number * BLOCK // CLUSTER for number, piece in content.items() if any(piece)}
        assert [offset // CLUSTER for offset, _ in image.extents()] == sorted(clusters)
        for number in {*content, 0, blocks - 1, blocks // 2}:
            start = max(0, number - 1) * BLOCK
            buffer = bytearray(min(3 * BLOCK, size - start))
            image.read_into(start, memoryview(buffer))
            for index in range(len(buffer) // BLOCK):
                expected = content.get(start // BLOCK + index, bytes(BLOCK))
                assert buffer[index * BLOCK : (index + 1) * BLOCK] == expected
    finally:
        os.close(descriptor)


@given(st.integers(1, 2**40))
def test_the_refcounts_count_themselves_too(used: int) -> None:
    blocks, table = _count_refcounts(used)
    total = used + blocks + table
    assert (blocks - 1) * CLUSTER // 2 < total <= blocks * CLUSTER // 2
    assert (table - 1) * CLUSTER < blocks * 8 <= table * CLUSTER


def test_every_format_comes_back(repository: Repository, tmp_path: Path) -> None:
    volume = ModelVolume("web", 300 * CHUNK - BLOCK)
    volume.data[: 20 * CHUNK] = random.Random(1).randbytes(20 * CHUNK)
    volume.data[100 * CHUNK : 101 * CHUNK] = bytes(BLOCK) + b"x" * BLOCK
    volume.data[-BLOCK:] = b"end." * (BLOCK // 4)
    repository.push(volume.snapshot("one"))
    files = {}
    seen: list[tuple[int, int]] = []
    for image_format in Format:
        path = files[image_format] = tmp_path / image_format
        seen.clear()
        report = export_to_file(
            repository, "web", "one", path, image_format, progress=lambda *at: seen.append(at)
        )
        assert (report.size, report.format) == (len(volume.data), image_format.value)
        assert seen[-1] == (report.data, report.data)
        import_image(repository, path, f"again-{image_format}", image_format)
        again = tmp_path / f"again-{image_format}"
        export_to_file(repository, "web", f"again-{image_format}", again)
        assert again.read_bytes() == volume.data
    assert files[Format.RAW].read_bytes() == volume.data
    assert files[Format.RAW].stat().st_blocks * 512 < 25 * CHUNK
    assert looks_like_qcow2(os.open(files[Format.QCOW2], os.O_RDONLY))
    # The same content again is not stored again.
    uploads = [summary.uploaded for summary in repository.list("web")]
    assert uploads[1] < 2000
    assert uploads[2] < 2000


def pipe_export(repository: Repository) -> bytes:
    read_end, write_end = os.pipe()
    parts: list[bytes] = []

    def drain() -> None:
        while part := os.read(read_end, 1 << 16):
            parts.append(part)

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        export_to_stream(repository, "web", "one", write_end)
    finally:
        os.close(write_end)
        reader.join()
        os.close(read_end)
    return b"".join(parts)


@pytest.fixture
def pushed(repository: Repository) -> ModelVolume:
    volume = ModelVolume("web", 700 * CHUNK)
    volume.data[10 * CHUNK : 12 * CHUNK] = random.Random(2).randbytes(2 * CHUNK)
    volume.data[500 * CHUNK : 501 * CHUNK] = b"y" * CHUNK
    repository.push(volume.snapshot("one"))
    return volume


def test_a_pipe_gets_every_byte(repository: Repository, pushed: ModelVolume) -> None:
    assert pipe_export(repository) == pushed.data


def test_a_file_behind_standard_output_is_sparse(
    repository: Repository, pushed: ModelVolume, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    descriptor = open_new(path)
    os.write(descriptor, b"before")
    export_to_stream(repository, "web", "one", descriptor)
    assert path.read_bytes() == b"before" + pushed.data
    assert path.stat().st_blocks * 512 < 10 * CHUNK
    # In the middle of a file holes would leave what was there; appending cannot make any.
    path.write_bytes(b"z" * (len(pushed.data) + 10))
    middle = os.open(path, os.O_RDWR)
    export_to_stream(repository, "web", "one", middle)
    assert path.read_bytes() == pushed.data + b"z" * 10
    path.write_bytes(b"log\n")
    appended = os.open(path, os.O_WRONLY | os.O_APPEND)
    export_to_stream(repository, "web", "one", appended)
    assert path.read_bytes() == b"log\n" + pushed.data
    for opened in (descriptor, middle, appended):
        os.close(opened)


def test_whoever_reads_goes_away(repository: Repository, pushed: ModelVolume) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with pytest.raises(StorageError, match="went away"):
        export_to_stream(repository, "web", "one", write_end)
    os.close(write_end)


def damage(repository: Repository) -> str:
    """Flip a byte of the first chunk in the last segment; return the segment's key."""
    key, size = list(repository.store.list("segments/"))[-1]
    content = bytearray(repository.store.get(key, size))
    content[32] ^= 1  # behind the header
    repository.store.put(key, content)
    return key


def test_damage_is_never_exported(
    repository: Repository, pushed: ModelVolume, tmp_path: Path
) -> None:
    key = damage(repository)
    (tmp_path / "old").write_text("keep me")
    for image_format in Format:
        for name, replace in (("new", False), ("old", True)):
            with pytest.raises(CorruptError, match=key):
                export_to_file(
                    repository, "web", "one", tmp_path / name, image_format, replace=replace
                )
    with pytest.raises(CorruptError, match=key):
        pipe_export(repository)
    repository.store.delete(key)
    with pytest.raises(CorruptError, match="missing"):
        export_to_file(repository, "web", "one", tmp_path / "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "keep me")]


def test_files_are_only_replaced_when_that_is_asked_for(
    repository: Repository, pushed: ModelVolume, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    export_to_file(repository, "web", "one", path)
    with pytest.raises(ExistsError, match="--force"):
        export_to_file(repository, "web", "one", path)
    path.write_text("old")
    path.chmod(0o640)
    export_to_file(repository, "web", "one", path, replace=True)
    assert path.read_bytes() == pushed.data
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(InvalidError, match="regular"):
        export_to_file(repository, "web", "one", tmp_path, replace=True)
    with pytest.raises(InvalidError, match="regular"):
        export_to_file(repository, "web", "one", Path("/dev/null"), replace=True)
    with pytest.raises(NotFoundError, match="directory"):
        export_to_file(repository, "web", "one", tmp_path / "absent" / "image")
    with pytest.raises(StorageError, match="image/below"):
        export_to_file(repository, "web", "one", path / "below")
    with pytest.raises(NotFoundError, match="web@two"):
        export_to_file(repository, "web", "two", tmp_path / "two")
    assert [found.name for found in tmp_path.iterdir()] == ["image"]


def test_a_name_that_is_taken_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(self: Path, target: Path) -> None:
        raise PermissionError(1, "no links here")

    for links in (True, False):
        if not links:
            monkeypatch.setattr(Path, "hardlink_to", no_links)
        path = tmp_path / f"image-{links}"
        with NewFile(path) as new:
            os.write(new.open(), b"new")
            path.write_text("theirs")
            with pytest.raises(ExistsError):
                new.commit()
        assert path.read_text() == "theirs"
        with NewFile(tmp_path / f"free-{links}") as new:
            os.write(new.open(), b"new")
            new.commit()
        assert (tmp_path / f"free-{links}").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_says_so_and_leaves_nothing(
    repository: Repository, pushed: ModelVolume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for image_format in Format:
        with pytest.raises(NoSpaceError, match="image"):
            export_to_file(repository, "web", "one", tmp_path / "image", image_format)
    monkeypatch.undo()
    device = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(StorageError, match="standard output: No space"):
        export_to_stream(repository, "web", "one", device)
    os.close(device)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_are_no_whole_blocks_get_zeros(repository: Repository, tmp_path: Path) -> None:
    path = tmp_path / "image"
    content = random.Random(3).randbytes(3 * CHUNK + 512)
    path.write_bytes(content)
    source = import_image(repository, path, "one")
    assert (source.image_size, source.size) == (len(content), 3 * CHUNK + BLOCK)
    export_to_file(repository, "web", "one", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content.ljust(3 * CHUNK + BLOCK, b"\0")


def test_an_image_that_grew_or_shrank_since_the_last_import(
    repository: Repository, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    rng = random.Random(4)
    for number, length in enumerate((3, 9, 2, 2)):
        path.write_bytes(rng.randbytes(length * CHUNK))
        import_image(repository, path, f"s{number}")
        export_to_file(repository, "web", f"s{number}", tmp_path / f"out-{number}")
        assert (tmp_path / f"out-{number}").read_bytes() == path.read_bytes()
    assert repository.find("web", "s3").parent == "s2"
    assert repository.verify(deep=True).damaged == []


def test_a_file_that_is_written_to_meanwhile_is_not_stored(tmp_path: Path) -> None:
    store = FaultyStore()
    repository = init_in_store(store, CHUNK)
    path = tmp_path / "image"
    for change in ("overwrite", "append", "cut"):
        path.write_bytes(random.Random(5).randbytes(6 * MIB))

        def meddle(key: str, change: str = change) -> None:
            if key.startswith("intents/"):
                with path.open("r+b") as file:
                    if change == "cut":
                        file.truncate(MIB)
                    else:
                        file.seek(0, os.SEEK_END if change == "append" else os.SEEK_SET)
                        file.write(b"changed")

        store.before_put = meddle
        with pytest.raises((InUseError, StorageError), match=r"changed|too early"):
            import_image(repository, path, "one")
        store.before_put = None
        assert repository.list() == []
    import_image(repository, path, "one")
    export_to_file(repository, "web", "one", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()


def test_the_same_name_is_not_taken_twice(repository: Repository, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * CHUNK)
    import_image(repository, path, "one")
    with pytest.raises(ExistsError, match="web@one"):
        import_image(repository, path, "one")


def test_a_damaged_parent_is_done_without(repository: Repository, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(random.Random(6).randbytes(4 * CHUNK))
    import_image(repository, path, "one")
    for key, size in list(repository.store.list("pages/")):
        repository.store.put(key, bytes(size))
    import_image(repository, path, "two")
    # Of a damaged page all is read again.
    assert repository.find("web", "two").uploaded > 4 * CHUNK
    export_to_file(repository, "web", "two", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()


def test_a_huge_sparse_file_costs_nothing(repository: Repository, tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(64 << 30)
        for place in (5 << 30, (5 << 30) + 200 * CHUNK, 60 << 30):
            file.seek(place)
            file.write(b"here")
    descriptor = os.open(path, os.O_RDONLY)
    extents = list(RawImage(descriptor).extents())
    os.close(descriptor)
    assert [offset for offset, _ in extents] == [5 << 30, (5 << 30) + 200 * CHUNK, 60 << 30]
    import_image(repository, path, "one")
    summary = repository.find("web", "one")
    assert summary.data == 3 * CHUNK
    export_to_file(repository, "web", "one", tmp_path / "out")
    assert (tmp_path / "out").stat().st_blocks * 512 < MIB
    export_to_file(repository, "web", "one", tmp_path / "out.qcow2", Format.QCOW2)
    assert (tmp_path / "out.qcow2").stat().st_size < 20 * CLUSTER


def test_what_comes_out_of_a_pipe_is_kept_sparse(tmp_path: Path) -> None:
    content = bytes(3 * MIB) + b"x" * 5000 + bytes(2 * MIB + 100)
    read_end, write_end = os.pipe()

    def write() -> None:
        with os.fdopen(write_end, "wb") as file:
            file.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    path = tmp_path / "copy"
    copy = open_new(path)
    assert spool(read_end, copy) == len(content)
    writer.join()
    os.close(read_end)
    os.close(copy)
    assert path.read_bytes() == content
    assert path.stat().st_blocks * 512 <= 3 * BLOCK


def test_images_without_content_or_of_impossible_sizes(
    repository: Repository, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.touch()
    with pytest.raises(InvalidError, match="empty"):
        import_image(repository, path, "one")
    with pytest.raises(CorruptError, match="no qcow2 image"):
        import_image(repository, path, "one", Format.QCOW2)
    path.write_bytes(b"x" * 4096)
    with pytest.raises(InvalidError, match="no qcow2 image"):
        import_image(repository, path, "one", Format.QCOW2)
    assert repository.list() == []


# A small qcow2 image: header, L1 (cluster 1), data (2, 3), L2 (4), refcounts (5, 6).


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "small.qcow2"
    descriptor = open_new(path)
    writer = Qcow2Writer(descriptor, 10 * CLUSTER + 512)
    writer.write(0, b"a" * CLUSTER)
    writer.write(10 * CLUSTER, b"b" * 512)
    writer.finish()
    os.close(descriptor)
    return path


def read_all(path: Path) -> bytes:
    """Everything, as an import reads it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        image = Qcow2Image(descriptor, path.name)
        content = bytearray(image.size)
        for offset, length in image.extents():
            image.read_into(offset, memoryview(content)[offset : offset + length])
        whole = bytearray(image.size)
        image.read_into(0, memoryview(whole))
        assert whole == content
        return bytes(content)
    finally:
        os.close(descriptor)


def patched(image: Path, offset: int, layout: str, value: int) -> Path:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(layout, value))
    return image


def test_the_small_image_is_sound(image: Path) -> None:
    assert read_all(image) == b"a" * CLUSTER + bytes(9 * CLUSTER) + b"b" * 512
    assert read_all(patched(image, 4 * CLUSTER, ">Q", 1))[:CLUSTER] == bytes(CLUSTER)
    # What does not matter to a reader: out-of-date refcounts, internal snapshots, later features.
    for offset, layout, value in ((72, ">Q", 1), (60, ">I", 3), (80, ">Q", 7), (88, ">Q", 7)):
        read_all(patched(image, offset, layout, value))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "line"),
    [
        (0, ">I", 0, "no qcow2"),
        (4, ">I", 4, "version 4"),
        (4, ">I", 1, "version 1"),
        (8, ">Q", 104, "backing"),
        (20, ">I", 8, "clusters of"),
        (20, ">I", 22, "clusters of"),
        (20, ">I", 2**32 - 1, "clusters of"),
        (24, ">Q", 0, "size of 0"),
        (24, ">Q", 2**63, "size of"),
        (24, ">Q", 16 << 40, "L1 table"),
        (32, ">I", 2, "encrypted"),
        (36, ">I", 0, "L1 table"),
        (40, ">Q", 512, "L1 table"),
        (40, ">Q", 2**63, "cut short"),
        (72, ">Q", 2, "corrupt"),
        (72, ">Q", 4, "another file"),
        (72, ">Q", 8, "zlib"),
        (72, ">Q", 16, "subclusters"),
        (72, ">Q", 32, "not known"),
        (100, ">I", 8, "header of"),
        (CLUSTER, ">Q", 2**55, "cut short"),
        (CLUSTER, ">Q", 512, "L2 table"),
        (4 * CLUSTER, ">Q", 2**55, "not in the file"),
        (4 * CLUSTER, ">Q", 2 * CLUSTER + 512, "not in the file"),
        (4 * CLUSTER, ">Q", 1 << 62 | 2**50, "not in the file"),
        (4 * CLUSTER, ">Q", 1 << 62, "not in the file"),
        (4 * CLUSTER, ">Q", 1 << 62 | 2 * CLUSTER, "decompress"),
    ],
)
def test_what_cannot_be_read_is_refused(
    image: Path, offset: int, layout: str, value: int, line: str
) -> None:
    with pytest.raises((InvalidError, CorruptError), match=line) as refused:
        read_all(patched(image, offset, layout, value))
    assert image.name in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("length", [0, 3, 71, 100, CLUSTER + 7, 3 * CLUSTER, 5 * CLUSTER - 1])
def test_an_image_that_is_cut_short_is_refused(image: Path, length: int) -> None:
    os.truncate(image, length)
    with pytest.raises(CorruptError):
        read_all(image)


def test_data_that_is_cut_off_is_never_read_as_zeros(tmp_path: Path) -> None:
    """Tables in front, data at the end, as qemu has them: the last cluster is missing a byte."""
    path = tmp_path / "image"
    descriptor = open_new(path)
    writer = Qcow2Writer(descriptor, 2 * CLUSTER)
    writer.write(0, b"a" * CLUSTER)
    writer.finish()
    end = os.lseek(descriptor, 0, os.SEEK_END)
    os.pwrite(descriptor, b"z" * CLUSTER, end)
    os.pwrite(descriptor, struct.pack(">Q", end), 3 * CLUSTER)
    assert read_all(path)[:CLUSTER] == b"z" * CLUSTER
    os.truncate(path, end + CLUSTER - 1)
    with pytest.raises(CorruptError, match="offset 0 is not in the file"):
        read_all(path)
    os.close(descriptor)


def test_a_table_that_is_used_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    descriptor = open_new(path)
    writer = Qcow2Writer(descriptor, 3 * L2_SPAN)
    writer.write(0, b"a" * CLUSTER)
    writer.finish()
    entry = os.pread(descriptor, 8, CLUSTER)
    os.pwrite(descriptor, entry, CLUSTER + 16)
    os.close(descriptor)
    with pytest.raises(CorruptError, match="twice"):
        read_all(path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 111),
                st.integers(CLUSTER, CLUSTER + 15),
                st.integers(4 * CLUSTER, 4 * CLUSTER + 90),
            ),
            st.binary(min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_a_stranger_writes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, patches: list[tuple[int, bytes]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.qcow2"
    if not path.exists():
        descriptor = open_new(path)
        writer = Qcow2Writer(descriptor, 10 * CLUSTER + 512)
        writer.write(0, b"a" * CLUSTER)
        writer.finish()
        os.close(descriptor)
    original = path.read_bytes()
    try:
        with path.open("r+b") as file:
            for offset, piece in patches:
                file.seek(offset)
                file.write(piece)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            image = Qcow2Image(descriptor, "hostile")
            for number, (offset, length) in enumerate(image.extents()):
                assert length > 0
                assert offset + length <= image.size
                if number < 4:
                    image.read_into(offset, memoryview(bytearray(min(length, CLUSTER))))
        except (InvalidError, CorruptError) as error:
            assert "hostile" in str(error)
        finally:
            os.close(descriptor)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("writer", [RawFileWriter, RawStreamWriter, Qcow2Writer])
def test_nothing_but_zeros(writer: Callable[[int, int], Qcow2Writer], tmp_path: Path) -> None:
    path = tmp_path / "image"
    descriptor = open_new(path)
    made = writer(descriptor, MIB)
    made.write(CLUSTER, bytes(CLUSTER))
    made.finish()
    image = Qcow2Image(descriptor, "x") if writer is Qcow2Writer else RawImage(descriptor)
    assert image.size == MIB
    assert list(image.extents()) == []
    os.close(descriptor)
