"""Prune and protection: nothing goes that is not understood, protected, or needed by a rule."""

from __future__ import annotations

import hashlib
import random
import struct
import time
from collections.abc import Callable

import msgpack
import pytest

from backends.errors import InUseError, InvalidError, NotFoundError, UnavailableError
from backends.memory_objects import MemoryObjectStore
from snapshots.repository import Repository, init_in_store
from snapshots.repository.envelope import Kind, seal
from snapshots.repository.layout import outcome_key, pointer_key, tombstone_key
from snapshots.repository.prune import carry_out, plan_prune
from snapshots.repository.records import Outcome, Pointer
from snapshots.repository.retention import Action, Rules
from tests.snapshots.repository.model import FaultyStore, ModelSource, ModelVolume
from tests.snapshots.repository.test_repository import CHUNK, restored

DAY = 24 * 3600


def fill(
    repository: Repository, names: list[str], volume: str = "web"
) -> dict[str, tuple[str, ModelSource]]:
    """Push a snapshot a day, the last of them yesterday; return push and source by name."""
    model = ModelVolume(volume, 40 * CHUNK)
    pushed = {}
    for number, name in enumerate(names):
        model.data[number * CHUNK : (number + 2) * CHUNK] = random.Random(number).randbytes(
            2 * CHUNK
        )
        source = model.snapshot(name)
        source.created = time.time() - (len(names) - number) * DAY
        pushed[name] = (repository.push(source).push, source)
    return pushed


def names_of(repository: Repository, volume: str = "web") -> list[str]:
    return [summary.snapshot for summary in repository.list(volume)]


def prune(repository: Repository, rules: Rules) -> dict[str, tuple[Action, str]]:
    decisions = carry_out(repository, plan_prune(repository, "web", rules))
    return {one.summary.snapshot: (one.action, "; ".join(one.reasons)) for one in decisions}


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


@pytest.fixture
def repository(store: FaultyStore) -> Repository:
    return init_in_store(store, CHUNK)


def test_what_is_kept_restores_and_others_are_not_touched(repository: Repository) -> None:
    pushed = fill(repository, [f"s{number}" for number in range(8)])
    other = fill(repository, ["s0", "s1"], volume="other")
    planned = plan_prune(repository, "web", Rules(last=2, monthly=1))
    assert len(names_of(repository)) == 8, "a plan changes nothing"
    progress: list[tuple[int, int]] = []
    decisions = carry_out(repository, planned, lambda done, total: progress.append((done, total)))
    assert decisions == planned
    assert progress == [(number, 6) for number in range(1, 7)]
    assert names_of(repository) == ["s6", "s7"]
    for name in ("s6", "s7"):
        assert restored(repository, pushed[name][1]) == pushed[name][1].content
    assert names_of(repository, "other") == ["s0", "s1"]
    assert restored(repository, other["s0"][1]) == other["s0"][1].content
    assert repository.verify(deep=True).damaged == []
    # Again: there is nothing left to do.
    assert {action for action, _ in prune(repository, Rules(last=2)).values()} == {Action.KEEP}


def test_no_rule_deletes_nothing(repository: Repository) -> None:
    fill(repository, ["one", "two"])
    with pytest.raises(InvalidError, match="no rule"):
        plan_prune(repository, "web", Rules())
    assert plan_prune(repository, "nothing", Rules(last=1)) == []


def remove(store: FaultyStore, push: str) -> None:
    store.delete(outcome_key(push))


def empty(store: FaultyStore, push: str) -> None:
    store.put(outcome_key(push), b"")


def flip(store: FaultyStore, push: str) -> None:
    record = bytearray(store.get(outcome_key(push), 1 << 20))
    record[-1] ^= 1
    store.put(outcome_key(push), record)


def renew(store: FaultyStore, push: str) -> None:
    body = msgpack.packb({"what": "nobody knows yet"})
    fixed = struct.pack(">4sBBBBQQ", b"NBDR", Kind.OUTCOME, 2, 1, 0, len(body), len(body))
    store.put(outcome_key(push), fixed + hashlib.sha256(fixed + body).digest() + body)


def two_roots(store: FaultyStore, push: str) -> None:
    fields = {"push": bytes.fromhex(push), "state": "committed", "why": "", "roots": [{}, {}]}
    store.put(outcome_key(push), seal(Kind.OUTCOME, fields))


def abort(store: FaultyStore, push: str) -> None:
    store.put(outcome_key(push), Outcome(push, None, "given up").encode())


@pytest.mark.parametrize("harm", [empty, flip, renew, two_roots, abort])
def test_what_cannot_be_restored_takes_no_place_and_is_not_deleted(
    repository: Repository, store: FaultyStore, harm: Callable[[FaultyStore, str], None]
) -> None:
    """Its pointer is sound, so a listing shows it: the newest, and an old one."""
    pushed = fill(repository, ["one", "two", "three", "four"])
    harm(store, pushed["one"][0])
    harm(store, pushed["four"][0])
    assert names_of(repository) == ["one", "two", "three", "four"]
    decided = prune(repository, Rules(last=1))
    assert {name: action.value for name, (action, _) in decided.items()} == {
        "one": "leave", "two": "delete", "three": "keep", "four": "leave",
    }  # fmt: skip
    assert restored(repository, pushed["three"][1]) == pushed["three"][1].content
    tombstones = [key for key, _ in store.list("tombstones/")]
    assert tombstones == [tombstone_key(pushed["two"][0])]


def test_an_outcome_that_is_gone_is_no_snapshot(repository: Repository, store: FaultyStore) -> None:
    pushed = fill(repository, ["one", "two", "three"])
    remove(store, pushed["three"][0])
    assert prune(repository, Rules(last=1))["two"][0] is Action.KEEP
    assert pointer_key("web", "three", pushed["three"][0]) in dict(store.list("snapshots/"))


def test_an_outcome_that_goes_meanwhile_takes_no_place(
    repository: Repository, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = fill(repository, ["one", "two", "three"])
    listed = repository.list("web")
    remove(store, pushed["three"][0])
    monkeypatch.setattr(repository, "list", lambda volume: listed)
    decided = prune(repository, Rules(last=1))
    assert [decided[name][0].value for name in pushed] == ["delete", "keep", "leave"]


def test_a_pointer_that_lies_or_is_missing(repository: Repository, store: FaultyStore) -> None:
    pushed = fill(repository, ["one", "two", "three"])
    # A pointer that is gone is no loss: the outcome tells.
    store.delete(pointer_key("web", "three", pushed["three"][0]))
    # This one makes the oldest the newest.
    summary = repository.find("web", "one")
    forged = type(summary)(**{**vars(summary), "created": time.time()})
    store.put(pointer_key("web", "one", summary.push), Pointer(forged).encode())
    decided = prune(repository, Rules(last=1))
    assert decided["one"][0] is Action.LEAVE
    assert "pointer" in decided["one"][1]
    assert [decided[name][0].value for name in ("two", "three")] == ["delete", "keep"]


def test_a_record_that_nobody_can_place_stops_nothing_and_stays(
    repository: Repository, store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither its pointer nor its outcome can be read: whose it is, is not known."""
    pushed = fill(repository, ["one", "two", "three"])
    flip(store, pushed["one"][0])
    store.put(pointer_key("web", "one", pushed["one"][0]), b"nothing")
    assert set(prune(repository, Rules(last=1))) == {"two", "three"}
    assert "left out" in caplog.text
    assert store.size(tombstone_key(pushed["one"][0])) is None


def test_a_pointer_of_a_newer_version_stops_everything(
    repository: Repository, store: FaultyStore
) -> None:
    """A program that does not know what is there must not decide what goes."""
    pushed = fill(repository, ["one", "two", "three"])
    body = msgpack.packb({})
    fixed = struct.pack(">4sBBBBQQ", b"NBDR", Kind.POINTER, 2, 1, 0, len(body), len(body))
    record = fixed + hashlib.sha256(fixed + body).digest() + body
    store.put(pointer_key("web", "two", pushed["two"][0]), record)
    with pytest.raises(InvalidError, match="newer nbdserve"):
        prune(repository, Rules(last=1))
    assert list(store.list("tombstones/")) == []


def test_two_of_one_name_are_left_alone(repository: Repository) -> None:
    pushed = fill(repository, ["one", "two", "three"])
    twin = ModelVolume("web", 4 * CHUNK).snapshot("one")
    # Two hosts at the same instant: neither sees the other's pointer.
    push, _ = pushed["one"]
    pointer = pointer_key("web", "one", push)
    outcome = repository.store.get(outcome_key(push), 1 << 20)
    record = repository.store.get(pointer, 1 << 16)
    repository.store.delete(pointer)
    repository.store.delete(outcome_key(push))
    repository.push(twin)
    repository.store.put(outcome_key(push), outcome)
    repository.store.put(pointer, record)
    assert names_of(repository).count("one") == 2
    decided = prune(repository, Rules(last=1))
    assert decided["one"][0] is Action.LEAVE
    assert "2 snapshots of this name" in decided["one"][1]
    assert sorted(names_of(repository)) == ["one", "one", "three"]


def test_a_store_that_does_not_answer_decides_nothing(
    repository: Repository, store: FaultyStore
) -> None:
    fill(repository, ["one", "two", "three"])
    store.read_back_fails = True
    with pytest.raises(UnavailableError):
        prune(repository, Rules(last=1))
    store.read_back_fails = False
    assert names_of(repository) == ["one", "two", "three"]


def test_a_failure_in_the_middle_says_how_far_it_came(
    repository: Repository, store: FaultyStore
) -> None:
    pushed = fill(repository, [f"s{number}" for number in range(6)])
    store.fail_at = store.puts + 3
    with pytest.raises(UnavailableError, match=r"pruning web stopped after .* of 5 deletions"):
        prune(repository, Rules(last=1))
    assert "s5" in names_of(repository)
    assert prune(repository, Rules(last=1))
    assert names_of(repository) == ["s5"]
    assert restored(repository, pushed["s5"][1]) == pushed["s5"][1].content


def test_only_what_backups_made(repository: Repository) -> None:
    names = ["backup-20260101T000000Z", "release", "backup-20260102T000000Z", "backup-2026"]
    fill(repository, names)
    decisions = plan_prune(repository, "web", Rules(last=1), only_backups=True)
    assert [one.action.value for one in decisions] == ["leave", "keep", "leave", "delete"]
    assert {names[1], names[3]} == {
        one.summary.snapshot for one in decisions if one.action is Action.LEAVE
    }


def test_what_was_pushed_just_now_is_kept_whatever_its_time(repository: Repository) -> None:
    """The clock of its host was set back by years."""
    pushed = fill(repository, ["new", "two", "three"])
    spared = {pushed["new"][0]}
    decisions = plan_prune(repository, "web", Rules(last=1), spared=spared)
    assert {one.summary.snapshot: one.reasons for one in decisions} == {
        "three": ["last 1 of 1"], "two": ["no rule keeps it"], "new": ["pushed just now"],
    }  # fmt: skip


def test_protected(repository: Repository, store: FaultyStore) -> None:
    pushed = fill(repository, ["one", "two", "three"])
    repository.protect("web", "one")
    before = dict(store.list("protections/"))
    repository.protect("web", "one")  # again: the same object
    assert dict(store.list("protections/")) == before
    assert repository.list_protected() == {pushed["one"][0]}
    with pytest.raises(InUseError, match="unprotect"):
        repository.delete("web", "one")
    assert prune(repository, Rules(last=1))["one"] == (Action.KEEP, "protected")
    assert names_of(repository) == ["one", "three"]
    assert restored(repository, pushed["one"][1]) == pushed["one"][1].content
    repository.unprotect("web", "one")
    repository.unprotect("web", "one")
    assert prune(repository, Rules(last=1))["one"][0] is Action.DELETE
    for call in (repository.protect, repository.unprotect):
        with pytest.raises(NotFoundError):
            call("web", "one")


def test_protected_between_the_plan_and_the_deletion(repository: Repository) -> None:
    fill(repository, ["one", "two", "three"])
    planned = plan_prune(repository, "web", Rules(last=1))
    repository.protect("web", "two")
    done = {one.summary.snapshot: one for one in carry_out(repository, planned)}
    assert done["two"].action is Action.LEAVE
    assert "protected" in done["two"].reasons[0]
    assert names_of(repository) == ["two", "three"]


def test_a_protection_that_comes_too_late_says_so(
    repository: Repository, store: FaultyStore
) -> None:
    pushed = fill(repository, ["one", "two"])

    def delete_first(key: str) -> None:
        if key.startswith("protections/"):
            store.before_put = None
            repository.delete("web", "one")

    store.before_put = delete_first
    with pytest.raises(NotFoundError, match="meanwhile"):
        repository.protect("web", "one")
    assert names_of(repository) == ["two"]
    assert repository.list_protected() == set()
    assert store.size(tombstone_key(pushed["one"][0])) is not None


def test_a_repository_of_an_older_program_has_no_protections() -> None:
    repository = init_in_store(MemoryObjectStore(), CHUNK)
    assert repository.list_protected() == set()
    # What does not look like a protection is ignored.
    repository.store.put("protections/something", b"")
    assert repository.list_protected() == set()
