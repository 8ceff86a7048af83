"""What a killed process noted: written, read back, in order, of this run of the machine alone."""

import asyncio
import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.local_layers import LocalLayerStore
from snapshots.owner_map import DATA, ZERO
from snapshots.recent import FILES, NOTHING, open_recent, read_recent

LAYER = "00000000000000aa"
BELOW = "00000000000000bb"
BLOCKS = 64

run = st.builds(
    lambda first, length, kind: (first, min(first + length, BLOCKS), kind),
    st.integers(0, BLOCKS - 1),
    st.integers(1, 8),
    st.sampled_from((DATA, ZERO)),
)


@pytest.fixture
def store(tmp_path):
    made = LocalLayerStore(tmp_path / "data")
    made.machine_run = b"this run"
    asyncio.run(made.lock())
    asyncio.run(made.create_layer(LAYER))
    return made


def opened(store):
    found = asyncio.run(read_recent(store, LAYER))
    return asyncio.run(open_recent(store, LAYER, found))


def read(store):
    return asyncio.run(read_recent(store, LAYER))


def apply(runs, blocks):
    for first, last, kind in runs:
        blocks[first:last] = [kind] * (last - first)
    return blocks


def test_what_was_noted_is_read_in_order(store):
    recent = opened(store)
    recent.note([(0, 4, DATA), (2, 3, ZERO)])
    recent.note([(4, 5, DATA)])
    recent.turn()
    recent.note([(1, 2, ZERO)])
    assert read(store).runs == [(0, 4, DATA), (2, 3, ZERO), (4, 5, DATA), (1, 2, ZERO)]
    recent.turn()
    assert len(read(store).runs) == 4, "it is there until the next generation needs the file"
    recent.note([(9, 10, DATA)])
    assert read(store).runs == [(1, 2, ZERO), (9, 10, DATA)]
    recent.close()


def test_another_run_of_the_machine_says_nothing(store):
    recent = opened(store)
    recent.note([(0, 4, DATA)])
    store.machine_run = b"the next run"
    assert read(store).runs == []
    store.machine_run = b""
    assert read(store) is NOTHING
    recent.close()


def test_the_head_below_is_told_in_every_generation_until_the_commit(store):
    recent = opened(store)
    recent.follow(BELOW)
    for number in range(3):
        recent.note([(number, number + 1, DATA)])
        assert read(store).follows == BELOW
        recent.turn()
    recent.follow(None)
    for number in range(3):
        recent.note([(number, number + 1, DATA)])
        recent.turn()
    assert read(store).follows is None
    recent.close()


def test_a_gate_does_not_fail_because_nothing_can_be_noted(store):
    recent = opened(store)
    for file in recent._files:
        file.write = fail
    recent.follow(BELOW)
    recent.note([(0, 1, DATA)])
    recent.turn()
    assert (read(store).runs, read(store).follows) == ([], None)
    for file in recent._files:
        del file.write
    recent.turn()
    recent.note([(1, 2, DATA)])
    assert (read(store).runs, read(store).follows) == ([(1, 2, DATA)], BELOW)
    recent.close()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("offset", [0, 5, 30, 47])
def test_a_damaged_record_ends_its_file(store, file, offset):
    recent = opened(store)
    recent.note([(0, 1, DATA), (1, 2, DATA)])
    recent.turn()
    recent.note([(2, 3, DATA), (3, 4, DATA)])
    recent.close()
    path = store.path / "layers" / LAYER / file
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    whole = [(2, 3, DATA), (3, 4, DATA)] if file == "recent-1" else [(0, 1, DATA), (1, 2, DATA)]
    damaged = [(0, 1, DATA)] if file == "recent-1" else [(2, 3, DATA)]
    kept = damaged if offset >= 24 else []
    assert sorted(read(store).runs) == sorted(whole + kept)


@given(
    steps=st.lists(
        st.one_of(run, st.sampled_from(("turn", "fail", "reopen", "remove"))), max_size=40
    )
)
@settings(max_examples=200, deadline=None)
def test_whenever_the_process_is_killed_nothing_is_lost_or_undone(tmp_path_factory, steps):
    """A journal that has what was captured, and then what was noted: that is what was done.

    Also when the process is killed between any two changes of the files.
    """
    store = LocalLayerStore(tmp_path_factory.mktemp("store") / "data")
    store.machine_run = b"this run"
    asyncio.run(store.lock())
    asyncio.run(store.create_layer(LAYER))
    history = [[0] * BLOCKS]  # what was done, moment by moment
    captured = journal = 0
    broken = False

    def killed():
        found = apply(read(store).runs, list(history[journal]))
        assert found in history[journal:] if broken else found == history[-1]

    class Watched:
        """A scratch file that looks before each change what a kill would leave."""

        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            killed()
            return getattr(self._file, name)

    recent = opened(store)
    for step in steps:
        recent._files = tuple(
            file if isinstance(file, Watched) else Watched(file) for file in recent._files
        )
        if step == "turn":
            # Before it captures again, a head waits until its journal has the last capture.
            journal = captured
            killed()
            captured = len(history) - 1
            recent.turn()
            if broken:
                journal = captured
            broken = False
        elif step == "fail":
            if not broken:
                broken = True
                full = recent._files[recent._generation & 1]
                full.write = fail
                with pytest.raises(OSError, match="full"):
                    recent.note([(0, 1, DATA)])
                del full.write
            history.append(apply([(0, 1, DATA)], list(history[-1])))
        elif step in {"reopen", "remove"}:
            journal = captured = len(history) - 1
            broken = False
            if step == "remove":
                recent.remove()
            else:
                recent.close()
            recent = opened(store)
        else:
            recent.note([step])
            history.append(apply([step], list(history[-1])))
        killed()
    recent.close()


def fail(position, data):
    raise OSError(errno.ENOSPC, "full")
