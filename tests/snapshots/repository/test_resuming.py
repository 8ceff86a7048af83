"""A push that was killed goes on where it was."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from backends.errors import CorruptError, InUseError, UnavailableError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store, packing
from snapshots.repository.records import Outcome
from snapshots.repository.segments import (
    INDEX_FOOTER_SIZE,
    PackedChunk,
    decode_index,
    index_entry,
    index_length,
    segment_header,
    segment_index,
)
from tests.snapshots.repository.model import FaultyStore, ModelSource, ModelVolume
from tests.snapshots.repository.test_collecting import keys
from tests.snapshots.repository.test_repository import CHUNK, PAGE, restored, stored_bytes

CHUNKS = 60
AHEAD = 40_000 * (packing.IN_FLIGHT + 1)  # bytes of segments under way, and the one being filled


@pytest.fixture
def source() -> ModelSource:
    """60 chunks, some of them in a second page: about 12 segments."""
    volume = ModelVolume("disk", PAGE + 20 * CHUNK)
    volume.data[: 40 * CHUNK] = random.Random(1).randbytes(40 * CHUNK)
    volume.data[PAGE:] = random.Random(2).randbytes(20 * CHUNK)
    return volume.snapshot("one")


def kill(repository: Repository, source: ModelSource, put: int) -> bool:
    """Push; the store goes away for good at a PUT, as for one that is killed."""
    store = repository.store
    assert isinstance(store, FaultyStore)
    store.puts, store.fail_at = 0, put
    try:
        repository.push(source)
    except UnavailableError:
        return True
    else:
        return False
    finally:
        store.fail_at = None


def test_killed_at_any_put(source: ModelSource) -> None:
    whole = init_in_store(MemoryObjectStore(), CHUNK).push(source)
    for put in range(1, whole.segments + whole.pages + 3):
        repository = init_in_store(FaultyStore(), CHUNK)
        assert kill(repository, source, put)
        before = sum(size for _, size in repository.store.list("segments/"))
        there = len(keys(repository, "segments/"))
        report = repository.push(source)
        # Indexes aside, all that was there is used; what was under way may be there, too.
        assert report.resumed + there * 2000 >= before
        assert report.resumed <= before
        assert report.uploaded <= whole.uploaded - before + AHEAD
        stored = sum(size for _, size in repository.store.list("segments/"))
        assert stored <= CHUNKS * (CHUNK + 60) + 30 * 300 + AHEAD
        assert restored(repository, source) == source.content
        assert repository.verify(deep=True).damaged == []
        repository.collect()
        assert restored(repository, source) == source.content
        assert repository.push(source).already_there


def test_killed_again_and_again(source: ModelSource) -> None:
    repository = init_in_store(FaultyStore(), CHUNK)
    kills = 0
    while kill(repository, source, 7):
        kills += 1
        repository.collect()
        assert repository.list() == []
        assert kills < 20
    assert kills >= 2
    assert restored(repository, source) == source.content
    stored = sum(size for _, size in repository.store.list("segments/"))
    assert stored <= CHUNKS * (CHUNK + 60) + 30 * 300 + kills * 40_000
    # All of it goes when the snapshot does: also what the killed pushes had stored.
    repository.delete("disk", "one")
    repository.collect()
    assert not keys(repository, "segments/") | keys(repository, "pages/")


def test_interrupted_and_gone_on_with(source: ModelSource) -> None:
    repository = init_in_store(FaultyStore(), CHUNK)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repository.push(source, interrupt)
    assert repository.push(source).resumed > 10 * CHUNK
    assert restored(repository, source) == source.content


def test_what_was_given_up_is_not_gone_on_with(source: ModelSource) -> None:
    repository = init_in_store(FaultyStore(), CHUNK)
    assert kill(repository, source, 9)
    assert repository.collect(give_up_after=0).given_up == 1
    assert repository.push(source).resumed == 0
    assert restored(repository, source) == source.content


def test_one_that_a_collector_ends_at_the_same_time(source: ModelSource) -> None:
    """Its segments may be gone any moment: nothing may refer to them."""
    store = FaultyStore()
    repository = init_in_store(store, CHUNK)
    assert kill(repository, source, 9)
    killed = next(iter(keys(repository, "intents/"))).rpartition("/")[2]

    def end(key: str) -> None:
        if key == f"outcomes/{killed}":
            store.inner.put_if_absent(key, Outcome(killed, None, "late").encode())

    store.before_put = end
    assert repository.push(source).resumed == 0
    repository.collect()
    assert not keys(repository, f"segments/{killed}/")
    assert restored(repository, source) == source.content


def test_another_snapshot_takes_nothing(source: ModelSource) -> None:
    repository = init_in_store(FaultyStore(), CHUNK)
    assert kill(repository, source, 9)
    other = ModelVolume("disk", source.size)
    other.data[:] = source.content
    report = repository.push(other.snapshot("other"))
    assert report.resumed == 0
    assert repository.push(source).resumed > 0


def test_the_next_of_its_line_goes_on(source: ModelSource) -> None:
    """As backups do: each is another snapshot, with some chunks written since."""
    repository = init_in_store(FaultyStore(), CHUNK)
    volume = ModelVolume("disk", source.size)
    volume.data[:] = source.content
    rng = random.Random(4)
    before = 0
    for number in range(3):
        taken = volume.snapshot(f"backup-{number}")
        store = repository.store
        assert isinstance(store, FaultyStore)
        store.puts, store.fail_at = 0, 6 if number < 2 else None
        if number == 2:
            stored = sum(size for _, size in store.list("segments/"))
            report = repository.push(taken, line="the volume")
            assert report.uploaded <= CHUNKS * (CHUNK + 60) - report.resumed + 9000
            # All but what was overwritten, and the ends of segments.
            assert report.resumed >= stored - 6 * CHUNK - 15 * 1000
        else:
            with pytest.raises(UnavailableError):
                repository.push(taken, line="the volume")
        there = sum(size for _, size in store.list("segments/"))
        assert there > before
        before = there
        for chunk in rng.sample(range(20), 3):
            volume.data[chunk * CHUNK] ^= 1
    assert restored(repository, taken) == taken.content
    repository.collect(give_up_after=0)
    assert restored(repository, taken) == taken.content
    assert [summary.snapshot for summary in repository.list()] == ["backup-2"]
    assert repository.verify(deep=True).damaged == []


def test_the_last_of_its_line_was_not_dead(source: ModelSource) -> None:
    store = FaultyStore()
    repository = init_in_store(store, CHUNK)
    volume = ModelVolume("disk", source.size)
    volume.data[:] = source.content
    volume.data[0] ^= 1
    two = volume.snapshot("two")

    def overtake(key: str) -> None:
        if key.startswith("segments/") and key.endswith("9"):
            store.before_put = None
            repository.push(two, line="the volume")

    store.before_put = overtake
    with pytest.raises(InUseError, match="gone on with"):
        repository.push(source, line="the volume")
    repository.collect()
    assert restored(repository, two) == two.content
    # One of the same volume that is of no line, or of another, is left alone.
    assert [summary.snapshot for summary in repository.list()] == ["two"]


def test_the_last_of_its_line_was_committed_after_all(source: ModelSource) -> None:
    """Its commit comes between our look at what is unfinished and our end of it."""
    store = FaultyStore()
    repository = init_in_store(store, CHUNK)
    volume = ModelVolume("disk", source.size)
    volume.data[:] = source.content
    one = volume.snapshot("one")
    volume.data[0] ^= 1
    two = volume.snapshot("two")
    late: dict[str, bytes] = {}
    put_if_absent = store.put_if_absent

    def lose(key: str, data: bytes | bytearray) -> bool:
        if key.startswith("outcomes/") and not late:
            late[key] = bytes(data)
            raise UnavailableError("forced: the reply is lost, and the request late")
        if key.startswith("intents/") and late:
            for lost, record in late.items():
                store.inner.put_if_absent(lost, record)
        return put_if_absent(key, data)

    store.put_if_absent = lose  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        repository.push(one, line="the volume")
    assert repository.push(two, line="the volume").resumed == 0
    for taken in (one, two):
        assert restored(repository, taken) == taken.content


def test_damaged_segments_are_done_without(source: ModelSource) -> None:
    rng = random.Random(3)
    for number in range(12):
        repository = init_in_store(FaultyStore(), CHUNK)
        assert kill(repository, source, 11)
        for key in sorted(keys(repository, "segments/")):
            data = bytearray(repository.store.get(key, 1 << 20))
            how = rng.randrange(5)
            if how == 0:
                repository.store.delete(key)
            elif how == 1:
                repository.store.put(key, data[: rng.randrange(len(data))])
            elif how == 2:  # in its index
                data[-rng.randrange(1, 200)] ^= 1 << rng.randrange(8)
                repository.store.put(key, data)
            elif how == 3:
                repository.store.put(key, data + bytes(number))
        repository.push(source)
        assert restored(repository, source) == source.content
        assert repository.verify(deep=True).damaged == []


def test_the_volume_was_changed_where_it_must_not_be(source: ModelSource) -> None:
    """Nothing is taken unseen: each chunk is read again, and compared by its digest."""
    repository = init_in_store(FaultyStore(), CHUNK)
    assert kill(repository, source, 11)
    content = bytearray(source.content)
    content[5 * CHUNK] ^= 1
    source.content = bytes(content)
    assert repository.push(source).resumed > 0
    assert restored(repository, source) == source.content


def test_two_go_on_at_the_same_time(source: ModelSource) -> None:
    repository = init_in_store(FaultyStore(), CHUNK)
    assert kill(repository, source, 9)

    def push(_: int) -> bool:
        try:
            repository.push(source)
        except InUseError:
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        assert any(pool.map(push, range(3)))
    assert restored(repository, source) == source.content
    repository.collect()
    assert restored(repository, source) == source.content
    repository.delete("disk", "one")
    repository.collect(give_up_after=0)
    assert stored_bytes(repository) < 5000


def test_the_index_of_a_segment() -> None:
    chunks = [PackedChunk(1, bytes([number]) * (number + 1), bytes(32)) for number in range(5)]
    body = segment_header("ab" * 16, 7) + b"".join(chunk.data for chunk in chunks)
    index = segment_index(b"".join(index_entry(10 + n, chunk) for n, chunk in enumerate(chunks)))
    segment = body + index
    assert index_length(segment[-100:], len(segment), "it") == len(index) - INDEX_FOOTER_SIZE
    for n, found in enumerate(decode_index(index[:-INDEX_FOOTER_SIZE], "it")):
        assert found.number == 10 + n
        assert segment[found.offset : found.offset + found.length] == chunks[n].data
    for tail in (b"", b"x" * 5, segment[-30:-1], b"\xff" * 4 + b"NBDINDEX", bytes(4) + b"NBDINDEX"):
        with pytest.raises(CorruptError, match="it:"):
            index_length(tail, 200, "it")
