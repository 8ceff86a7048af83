"""Push, list, restore, delete: what comes back is what went in, and little is uploaded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.errors import ExistsError, InvalidError, NotFoundError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store, init_repository, open_repository
from snapshots.repository.layout import PAGE_ENTRIES
from tests.snapshots.repository.model import BLOCK, ModelSink, ModelSource, ModelVolume

CHUNK = 8192
PAGE = CHUNK * PAGE_ENTRIES


def restored(repository: Repository, source: ModelSource) -> bytes:
    sink = ModelSink(source.size)
    report = repository.restore(source.volume, source.snapshot, sink)
    assert report.size == source.size
    assert report.written == sink.written.count(1)
    return bytes(sink.data)


def stored_bytes(repository: Repository) -> int:
    return sum(size for _, size in repository.store.list(""))


change = st.tuples(
    st.sampled_from(["random", "pattern", "zero"]),
    st.integers(0, 1000),  # where, in thousandths of the volume
    st.integers(1, 6 * BLOCK),
    st.integers(0, 2**32),
)
step = st.one_of(
    st.tuples(st.just("push"), st.lists(change, max_size=5)),
    st.tuples(st.just("snapshot only"), st.lists(change, max_size=5)),
    st.tuples(st.just("delete"), st.integers(0, 100)),
    st.tuples(st.just("resize"), st.integers(1, 5000)),
    st.tuples(st.just("rollback"), st.integers(0, 100)),
)


def apply(data: bytearray, how: str, where: int, length: int, seed: int) -> None:
    start = len(data) * where // 1000
    length = min(length, len(data) - start)
    if how == "random":
        piece = random.Random(seed).randbytes(length)
    else:
        piece = bytes([seed % 256 if how == "pattern" else 0]) * length
    data[start : start + length] = piece


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 5000), st.lists(step, min_size=2, max_size=12))
def test_every_live_snapshot_restores_whatever_happened(blocks: int, steps: list[tuple]) -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    volume = ModelVolume("disk", blocks * BLOCK)
    live: dict[str, ModelSource] = {}
    for number, (what, argument) in enumerate(steps):
        if what in ("push", "snapshot only"):
            for one in argument:
                apply(volume.data, *one)
            source = volume.snapshot(f"s{number}")
            if what == "push":
                before = stored_bytes(repository)
                report = repository.push(source)
                live[source.snapshot] = source
                parents = [s.snapshot for s in source.older if live.get(s.snapshot) is s]
                assert report.parent == (parents[0] if parents else None)
                pointer = 1000
                assert 0 <= stored_bytes(repository) - before - report.uploaded < pointer
                assert report.read == source.bytes_read
                if parents:
                    base = live[parents[0]].content
                    changed = sum(
                        source.content[at : at + CHUNK] != base[at : at + CHUNK]
                        for at in range(0, max(source.size, len(base)), CHUNK)
                    )
                    pages = -(-source.size // PAGE)
                    # Each changed chunk, the pages, and the small records; never the whole.
                    most = changed * (CHUNK + 48) + min(pages, changed + 1) * 56_000 + 2000
                    assert report.uploaded <= most
        elif what == "delete" and live:
            name = sorted(live)[argument % len(live)]
            repository.delete("disk", name)
            del live[name]
        elif what == "resize":
            size = argument * BLOCK
            del volume.data[size:]
            volume.data.extend(bytes(size - len(volume.data)))
        elif what == "rollback" and volume.taken:
            volume.data[:] = volume.taken[argument % len(volume.taken)].content
    assert [item.snapshot for item in repository.list()] == sorted(
        live, key=lambda name: live[name].created
    )
    for source in live.values():
        assert restored(repository, source) == source.content
        summary = repository.find("disk", source.snapshot)
        chunks = {extent[0] // CHUNK for extent in source.extents()}
        assert summary.data >= len(chunks) * CHUNK or not chunks
    report = repository.verify(deep=True)
    assert report.damaged == []
    assert report.snapshots == len(live)


def test_an_unchanged_snapshot_costs_next_to_nothing() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    volume = ModelVolume("disk", 4 * PAGE)
    volume.data[:PAGE] = random.Random(1).randbytes(PAGE)
    first = repository.push(volume.snapshot("one"))
    assert first.read == PAGE
    assert first.changed == PAGE
    second = repository.push(volume.snapshot("two"))
    assert (second.read, second.changed, second.segments, second.pages) == (0, 0, 0, 0)
    assert second.uploaded < 1500
    volume.data[5] ^= 1
    third = repository.push(volume.snapshot("three"))
    assert (third.read, third.changed, third.segments, third.pages) == (CHUNK, BLOCK, 1, 1)
    assert third.parent == "two"


def test_written_with_the_same_content_is_not_changed() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    volume = ModelVolume("disk", 20 * CHUNK)
    volume.data[: 5 * CHUNK] = random.Random(1).randbytes(5 * CHUNK)
    repository.push(volume.snapshot("one"))
    source = volume.snapshot("two")
    source.changed_extents = lambda since: [(0, 20 * CHUNK)]  # type: ignore[method-assign]
    report = repository.push(source)
    assert (report.changed, report.segments, report.pages) == (0, 0, 0)
    assert report.read == 6 * CHUNK or report.read == 5 * CHUNK
    assert restored(repository, source) == source.content


def test_a_huge_thin_volume_is_quick_and_small() -> None:
    repository = init_in_store(MemoryObjectStore())
    source = ThinSource(16 << 40, {0: b"a" * BLOCK, (16 << 40) - BLOCK: b"z" * BLOCK})
    report = repository.push(source)
    assert report.read == 2 * (64 << 10)
    assert report.uploaded < 5000
    written: dict[int, bytes] = {}

    class Sink:
        def write(self, offset: int, data: bytes) -> None:
            written[offset] = data

        def holds(self, offset: int, length: int) -> bool:
            return False

        def complete(self, offset: int, length: int) -> None:
            pass

    repository.restore("disk", "one", Sink())
    assert written == source.blocks


class ThinSource(ModelSource):
    def __init__(self, size: int, blocks: dict[int, bytes]) -> None:
        super().__init__("disk", "one", "id", 1.0, b"")
        self.blocks = blocks
        self.thin_size = size

    @property
    def size(self) -> int:
        return self.thin_size

    def extents(self) -> list[tuple[int, int]]:
        return [(offset, BLOCK) for offset in sorted(self.blocks)]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))
        for start, block in self.blocks.items():
            if offset <= start < offset + len(buffer):
                buffer[start - offset : start - offset + BLOCK] = block


def test_pushing_again_is_done_and_another_of_that_name_is_refused() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    volume = ModelVolume("disk", 10 * CHUNK)
    volume.data[0] = 1
    source = volume.snapshot("daily")
    first = repository.push(source)
    before = dict(repository.store.list(""))
    again = repository.push(source)
    assert again.already_there and not first.already_there
    assert again.push == first.push
    assert again.uploaded == 0
    assert dict(repository.store.list("")) == before
    volume.data[0] = 2
    other = volume.snapshot("daily")
    with pytest.raises(ExistsError, match=r"disk@daily.*another"):
        repository.push(other)
    assert dict(repository.store.list("")) == before
    repository.delete("disk", "daily")
    assert repository.push(other).parent is None
    assert restored(repository, other) == other.content
    # Deleted, and pushed once more: a new push of the same snapshot.
    repository.delete("disk", "daily")
    assert not repository.push(source).already_there
    assert restored(repository, source) == source.content


def test_volumes_do_not_mix() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    sources = []
    for name in ("a", "a.b", "b"):
        volume = ModelVolume(name, 3 * CHUNK)
        volume.data[0] = ord(name[-1])
        sources.append(volume.snapshot("same"))
        repository.push(sources[-1])
    assert [item.label for item in repository.list()] == ["a@same", "a.b@same", "b@same"]
    assert [item.label for item in repository.list("a")] == ["a@same"]
    for source in sources:
        assert restored(repository, source) == source.content


def test_the_list_tells_what_there_is() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    volume = ModelVolume("disk", PAGE)
    volume.data[:CHUNK] = random.Random(2).randbytes(CHUNK)
    repository.push(volume.snapshot("one"))
    volume.data[CHUNK : 2 * CHUNK] = random.Random(3).randbytes(CHUNK)
    report = repository.push(volume.snapshot("two"))
    one, two = repository.list()
    assert (one.volume, one.snapshot, one.created, one.size) == ("disk", "one", 1000.0, PAGE)
    assert (one.parent, two.parent) == (None, "one")
    assert (one.data, two.data) == (CHUNK, 2 * CHUNK)
    assert (one.stored, two.stored) == (CHUNK, 2 * CHUNK)
    assert CHUNK < two.uploaded <= report.uploaded
    # The outcome says the same when the pointer is gone.
    pointers = [key for key, _ in repository.store.list("snapshots/")]
    for key in pointers:
        repository.store.delete(key)
    assert repository.list() == [one, two]
    assert repository.verify().damaged == []


def test_names_that_do_not_exist() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    volume = ModelVolume("disk", CHUNK)
    repository.push(volume.snapshot("one"))
    for name in (("disk", "two"), ("other", "one")):
        with pytest.raises(NotFoundError, match="@".join(name)):
            repository.restore(*name, ModelSink(CHUNK))
        with pytest.raises(NotFoundError, match="@".join(name)):
            repository.delete(*name)
        with pytest.raises(NotFoundError, match="@".join(name)):
            repository.verify(*name)
    with pytest.raises(InvalidError):
        repository.delete("../disk", "one")


@pytest.mark.parametrize("size", [0, -1, 4095, 2048, 12288, 8 << 20, 1 << 40])
def test_chunk_sizes_that_are_refused(size: int) -> None:
    store = MemoryObjectStore()
    with pytest.raises(InvalidError, match=str(size)):
        init_in_store(store, size)
    assert list(store.list("")) == []


@pytest.mark.parametrize("size", [4 << 10, 4 << 20])
def test_smallest_and_largest_chunk(size: int) -> None:
    repository = init_in_store(MemoryObjectStore(), size)
    volume = ModelVolume("disk", (9 << 20) + BLOCK)
    volume.data[-2 * BLOCK :] = random.Random(4).randbytes(2 * BLOCK)
    volume.data[: 5 << 20] = b"compressible" * ((5 << 20) // 12) + b"12345678"
    source = volume.snapshot("one")
    repository.push(source)
    assert restored(repository, source) == source.content


def test_progress_ends_at_the_total() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    volume = ModelVolume("disk", PAGE + 3 * CHUNK)
    volume.data[: 200 * CHUNK] = random.Random(5).randbytes(200 * CHUNK)
    source = volume.snapshot("one")
    for run in (
        lambda seen: repository.push(source, lambda *pair: seen.append(pair)),
        lambda seen: repository.restore(
            "disk", "one", ModelSink(source.size), lambda *pair: seen.append(pair)
        ),
        lambda seen: repository.verify(deep=True, progress=lambda *pair: seen.append(pair)),
    ):
        seen: list[tuple[int, int]] = []
        run(seen)
        assert seen == sorted(seen)
        assert {total for _, total in seen} == {200 * CHUNK}
        assert seen[-1][0] == 200 * CHUNK


def test_in_a_directory(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/repository"
    with pytest.raises(NotFoundError):
        open_repository(url)
    made = init_repository(url, CHUNK)
    assert made.notice is None
    with pytest.raises(ExistsError, match="repository"):
        init_repository(url, CHUNK)
    assert open_repository(url).config == made.config
    with pytest.raises(NotFoundError, match="repo init"):
        open_repository(f"file://{tmp_path}")
    volume = ModelVolume("disk", PAGE)
    volume.data[10:20] = b"0123456789"
    source = volume.snapshot("one")
    open_repository(url).push(source)
    assert restored(open_repository(url), source) == source.content
