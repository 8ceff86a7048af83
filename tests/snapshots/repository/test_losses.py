"""Restores and exports that leave out what is damaged: the sound part exactly, the rest listed."""

from __future__ import annotations

import os
import random
from contextlib import closing
from itertools import pairwise

import pytest

from backends.errors import CorruptError, UnavailableError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import init_in_store
from snapshots.repository.layout import PAGE_ENTRIES, pages_key, segment_key
from snapshots.repository.losses import Losses
from snapshots.repository.reading import read_page
from snapshots.repository.roots import find_root
from snapshots.repository.stream import read_in_order, read_root
from tests.snapshots.repository.encrypted import SECRET
from tests.snapshots.repository.model import ModelSink
from tests.snapshots.repository.test_repository import CHUNK
from tests.snapshots.repository.test_verify import damage, fill, needs_of

ROUNDS = int(os.environ.get("NBDSERVE_VERIFY_ROUNDS", "5"))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_what_is_sound_is_restored_and_the_rest_listed(seed: int) -> None:
    rng = random.Random(seed)
    repository = init_in_store(MemoryObjectStore(), CHUNK, SECRET if seed % 4 == 3 else None)
    disk = fill(repository, rng, rng.randrange(1, 7))
    places = needs_of(repository)
    roots = {
        source.snapshot: find_root(repository.store, repository.config, found.push)
        for source, found in zip(disk.taken, repository.list("disk"), strict=True)
    }
    pages = {
        name: [(ref, read_page(repository.store, CHUNK, ref)) for ref in root.table]
        for name, root in roots.items()
    }
    bad, _ = damage(repository, rng, places)
    if seed % 2:  # a page, too
        key, offset = rng.choice([p for p in places["disk@s0"] if "pages" in p[0]] or [("", 0)])
        if key:
            data = repository.store.get(key, 1 << 20)
            repository.store.put(key, data[: offset + 50] + b"!!!!!!!!" + data[offset + 58 :])
            bad.add((key, offset))
    for source in disk.taken:
        lost: set[int] = set()
        for ref, page in pages[source.snapshot]:
            first = ref.page * PAGE_ENTRIES
            if (pages_key(ref.push, ref.number), ref.offset) in bad:
                lost |= set(range(first, first + PAGE_ENTRIES))
            for chunk, entry in enumerate(page, first):
                if entry and (segment_key(entry.push, entry.segment), entry.offset) in bad:
                    lost.add(chunk)
        lost = {chunk for chunk in lost if chunk * CHUNK < source.size}
        content = bytearray(source.content)
        for chunk in lost:
            length = len(content[chunk * CHUNK : (chunk + 1) * CHUNK])
            content[chunk * CHUNK : chunk * CHUNK + length] = bytes(length)
        sink = ModelSink(source.size)
        report = repository.restore("disk", source.snapshot, sink, skip_damaged=True)
        assert sink.data == content
        spans = [(hole.offset, hole.length) for hole in report.holes]
        listed = {
            at // CHUNK for start, length in spans for at in range(start, start + length, CHUNK)
        }
        assert listed == lost
        assert all(a + length < b for (a, length), (b, _) in pairwise(spans))
        assert all("object " in hole.problem for hole in report.holes)

        losses = Losses()
        image = bytearray(source.size)
        root = read_root(repository, "disk", source.snapshot)
        with closing(read_in_order(repository, root, losses)) as chunks:
            for offset, plain in chunks:
                image[offset : offset + len(plain)] = plain
        assert image == content
        found = losses.holes(CHUNK, source.size)
        assert [(hole.offset, hole.length) for hole in found] == spans
        if lost:
            with pytest.raises(CorruptError):
                repository.restore("disk", source.snapshot, ModelSink(source.size))


def test_a_store_that_does_not_answer_is_no_damage() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    source = fill(repository, random.Random(5), 2).taken[0]

    def refuse(key: str, offset: int, length: int) -> bytes:
        raise UnavailableError("forced: the endpoint broke")

    repository.store.get_range = refuse  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        repository.restore("disk", "s0", ModelSink(source.size), skip_damaged=True)
