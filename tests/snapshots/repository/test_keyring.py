"""Keys of encrypted repositories: several, changed, removed, killed at any moment, damaged."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from backends.errors import (
    CorruptError,
    InUseError,
    InvalidError,
    NotFoundError,
    StorageError,
    UnavailableError,
)
from backends.memory_objects import MemoryObjectStore
from backends.objects import ObjectStore
from snapshots.repository import init_in_store, key_slots, keyring, open_in_store
from snapshots.repository.envelope import Kind, seal, unseal
from snapshots.repository.key_slots import make_slot
from snapshots.repository.keyring import Keyring
from snapshots.repository.secret import (
    Secret,
    key_file,
    new_key_file,
    passphrase,
    passphrase_line,
)
from tests.snapshots.repository.encrypted import (
    FILE,
    HEX,
    OTHER,
    SECRET,
    TEXT,
    bucket,
    fill_repository,
)
from tests.snapshots.repository.test_repository import CHUNK, restored
from tests.snapshots.repository.twin_reader import TwinReader


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_slots, "SCRYPT_N", 2)


def made(secret: Secret = SECRET) -> MemoryObjectStore:
    store = MemoryObjectStore()
    init_in_store(store, CHUNK, secret)
    return store


def ring(store: ObjectStore, secret: Secret) -> Keyring:
    found = open_in_store(store, secret).keyring
    assert found is not None
    return found


def opens(store: ObjectStore, secret: Secret) -> bool:
    try:
        open_in_store(store, secret)
    except InvalidError:
        return False
    return True


def test_several_keys_and_a_change_write_no_data() -> None:
    store = MemoryObjectStore()
    _, volume = fill_repository(store)
    before = {key: data for key, data in bucket(store).items() if not key.startswith("keys/")}
    keys = ring(store, SECRET)
    file_id = keys.add(FILE)
    assert [(info.kind, info.current) for info in keys.list_keys()] == [
        ("passphrase", True),
        ("key file", False),
    ]
    assert all(opens(store, secret) for secret in (SECRET, FILE))
    old = keys.current
    new = keys.change(OTHER)
    assert {info.id for info in keys.list_keys()} == {file_id, new}
    assert [opens(store, secret) for secret in (SECRET, FILE, OTHER)] == [False, True, True]
    assert [info.id for info in ring(store, OTHER).list_keys() if info.current] == [new]
    with pytest.raises(NotFoundError, match=old):
        keys.remove(old)
    keys.remove(file_id)
    assert [opens(store, secret) for secret in (SECRET, FILE, OTHER)] == [False, False, True]
    with pytest.raises(InvalidError, match="passwd"):
        keys.remove(new)
    for name in ("x", "../config", "0" * 16, ""):
        with pytest.raises(NotFoundError):
            keys.remove(name)
    after = {key: data for key, data in bucket(store).items() if not key.startswith("keys/")}
    assert after == before
    repository = open_in_store(store, OTHER)
    for source in volume.taken:
        assert restored(repository, source) == source.content


def test_a_secret_of_the_other_kind_does_not_open_it() -> None:
    text = passphrase(HEX, "here")
    for secret, wrong in ((FILE, text), (text, FILE), (FILE, SECRET)):
        store = made(secret)
        with pytest.raises(InvalidError, match=f"the {wrong.kind} given does not open") as caught:
            open_in_store(store, wrong)
        assert wrong.value.hex() not in str(caught.value)


def test_the_twin_opens_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    store = made()
    ring(store, SECRET).add(FILE)
    monkeypatch.setattr(key_slots, "SCRYPT_N", 1024)
    ring(store, FILE).change(passphrase("a\u0308", "decomposed"))
    one = TwinReader(bucket(store), passphrase=TEXT)
    two = TwinReader(bucket(store), passphrase="\u00e4")
    assert one.master == two.master


def test_the_usual_cost_is_high() -> None:
    assert (key_slots.SCRYPT_R, key_slots.SCRYPT_P) == (8, 1)
    source = key_slots.__file__
    with open(source) as file:
        assert "SCRYPT_N = 1 << 17" in file.read()


def test_too_many_keys() -> None:
    store = made()
    keys = ring(store, SECRET)
    for _ in range(keyring.MAX_KEYS - 1):
        keys.add(FILE)
    with pytest.raises(InvalidError, match="32"):
        keys.add(FILE)
    assert opens(store, FILE)
    # Others may have added theirs at the same instant. More than that was somebody else.
    for number in range(keyring.MAX_KEYS):
        store.put(f"keys/{number:016x}", b"")
    assert opens(store, FILE)
    store.put("keys/" + "f" * 16, b"")
    with pytest.raises(CorruptError, match="65"):
        open_in_store(store, FILE)


def test_what_is_no_key_is_passed_over() -> None:
    store = made()
    for name in ("keys/readme", "keys/" + "0" * 15, "keys/deeper/" + "0" * 16):
        store.put(name, b"x")
    assert opens(store, SECRET)
    # These come first, and harm nobody who has another key; verify tells of them.
    bad = {
        "keys/" + "0" * 16: b"",
        "keys/" + "0" * 15 + "1": b"x" * 200,
        "keys/" + "0" * 15 + "2": b"x" * 100_000,
    }
    for name, data in bad.items():
        store.put(name, data)
    repository = open_in_store(store, SECRET)
    assert {damage.key for damage in repository.verify().damaged} == bad.keys()
    with pytest.raises(CorruptError, match=r"does not open.*0000"):
        open_in_store(store, OTHER)
    for name in bad:
        repository.keyring.remove(name.removeprefix("keys/"))  # type: ignore[union-attr]
    assert repository.verify().damaged == []


def changed_slot(store: MemoryObjectStore, **fields: object) -> None:
    (name,) = [key for key in bucket(store) if key.startswith("keys/")]
    content = store.get(name, 4096)
    old = unseal(Kind.KEY, content[:-32], "here")._fields
    store.put(name, seal(Kind.KEY, {**old, **fields}) + content[-32:])


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1 << 40},
        {"n": 1 << 22, "r": 1, "p": 2},
        {"n": 1 << 21},
        {"n": 3},
        {"n": 1},
        {"n": 0},
        {"r": 0},
        {"p": 0},
        {"r": 65},
        {"p": 65},
        {"n": -2},
        {"n": 2.0},
        {"salt": b""},
        {"salt": bytes(33)},
        {"wrapped": bytes(49)},
        {"commitment": bytes(31)},
        {"kind": "what comes later"},
        {"kind": 5},
        {"repository": b"x"},
    ],
)
def test_hostile_parameters_are_refused_before_scrypt_is_run(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made()
    changed_slot(store, **fields)
    runs: list[object] = []
    monkeypatch.setattr(hashlib, "scrypt", lambda *a, **k: runs.append(a))
    with pytest.raises(CorruptError, match="does not open") as caught:
        open_in_store(store, SECRET)
    assert "\n" not in str(caught.value)
    assert not runs


@pytest.mark.parametrize(
    "fields", [{"n": 4}, {"r": 7}, {"p": 2}, {"salt": bytes(32)}, {"commitment": bytes(32)},
               {"repository": bytes(16)}, {"kind": "key file"}]
)  # fmt: skip
def test_other_parameters_do_not_open(fields: dict[str, object]) -> None:
    store = made()
    changed_slot(store, **fields)
    with pytest.raises(InvalidError, match="does not open"):
        open_in_store(store, SECRET)


@pytest.mark.parametrize("fields", [{"created": 5.0}, {"wrapped": bytes(48)}])
def test_a_key_that_was_tampered_with_is_called_damaged(fields: dict[str, object]) -> None:
    store = made()
    changed_slot(store, **fields)
    with pytest.raises(CorruptError, match=r"keys/.*damaged"):
        open_in_store(store, SECRET)


def test_a_key_under_another_id_does_not_open() -> None:
    store = made()
    (name,) = [key for key in bucket(store) if key.startswith("keys/")]
    store.put("keys/" + "a" * 16, store.get(name, 4096))
    store.delete(name)
    assert not opens(store, SECRET)


def test_a_key_that_somebody_else_made_is_reported() -> None:
    store = made()
    repository = open_in_store(store, SECRET)
    slot = make_slot(bytes(32), repository.config.repository_id, SECRET, 1.0)
    from snapshots.repository.sealed_objects import Sealer  # noqa: PLC0415

    foreign = slot.encode(Sealer(bytes(32), repository.config.repository_id))
    store.put(slot.key, foreign)
    assert [damage.key for damage in repository.verify().damaged] == [slot.key]
    shown = repository.keyring.list_keys()[-1]  # type: ignore[union-attr]
    assert shown.id == slot.id
    assert shown.problem is not None


def test_no_key_left() -> None:
    store = made()
    for key in bucket(store):
        if key.startswith("keys/"):
            store.delete(key)
    with pytest.raises(CorruptError, match="no key left"):
        open_in_store(store, SECRET)


def test_scrypt_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    store = made()

    def fail(*arguments: object, **named: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(hashlib, "scrypt", fail)
    with pytest.raises(CorruptError, match="MiB of memory"):
        open_in_store(store, SECRET)


def test_a_key_put_in_anothers_place_while_it_is_looked_for() -> None:
    store = made()
    keys = ring(store, SECRET)
    keys.add(FILE)
    get, changes = store.get, []

    def change_meanwhile(key: str, limit: int) -> bytes:
        if key.startswith("keys/") and not changes:
            changes.append(1)
            keys.change(SECRET)
        return get(key, limit)

    store.get = change_meanwhile  # type: ignore[method-assign]
    assert opens(store, SECRET)


class Killed(BaseException):
    """The process was killed."""


class KilledStore:
    """Ends the process before or after the call of that number that changes something."""

    def __init__(self, inner: MemoryObjectStore, number: int, after: bool) -> None:
        self.inner, self.number, self.after = inner, number, after
        self.name = inner.name

    def __getattr__(self, name: str) -> Callable[..., object]:
        return getattr(self.inner, name)  # type: ignore[no-any-return]

    def _change(self, call: Callable[..., None], *arguments: object) -> None:
        self.number -= 1
        if self.number == 0 and not self.after:
            raise Killed
        call(*arguments)
        if self.number == 0:
            raise Killed

    def put(self, key: str, data: bytes) -> None:
        self._change(self.inner.put, key, data)

    def delete(self, key: str) -> None:
        self._change(self.inner.delete, key)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_moment_of_a_change(after: bool) -> None:
    for number in itertools.count(1):
        inner = made()
        store = KilledStore(inner, number, after)
        keys = ring(store, SECRET)  # type: ignore[arg-type]
        try:
            keys.change(OTHER)
        except Killed:
            pass
        else:
            break
        usable = [secret for secret in (SECRET, OTHER) if opens(inner, secret)]
        assert usable
        # It can be done to the end, with either that opens it.
        for secret in usable:
            copy = MemoryObjectStore()
            for key, data in bucket(inner).items():
                copy.put(key, data)
            again = ring(copy, secret)
            again.change(FILE)
            for info in again.list_keys():
                if not info.current:
                    again.remove(info.id)
            assert [opens(copy, each) for each in (SECRET, OTHER, FILE)] == [False, False, True]
    assert number == 5  # PUT keys, PUT removals, DELETE keys, DELETE removals


def test_a_change_whose_old_key_cannot_be_removed_says_so() -> None:
    inner = made()
    store = KilledStore(inner, 3, False)
    keys = ring(store, SECRET)  # type: ignore[arg-type]

    def fail(call: object, *arguments: object) -> None:
        raise UnavailableError("gone")

    delete = store.delete
    store.delete = lambda key: fail(delete, key)  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match=r"was added, but the old one.*gone"):
        keys.change(OTHER)
    assert opens(inner, OTHER)
    assert opens(inner, SECRET)


class SteppedStore:
    """A store whose calls each wait for their turn."""

    def __init__(self, inner: MemoryObjectStore, turn: Callable[[], None]) -> None:
        self.inner, self.turn, self.name = inner, turn, inner.name

    def _step(self, call: str, *arguments: object) -> object:
        self.turn()
        return getattr(self.inner, call)(*arguments)

    def put(self, key: str, data: bytes) -> None:
        self._step("put", key, data)

    def delete(self, key: str) -> None:
        self._step("delete", key)

    def size(self, key: str) -> object:
        return self._step("size", key)


class Remover(threading.Thread):
    """One command that removes a key, a call at a time; it may be killed instead."""

    def __init__(self, store: MemoryObjectStore, keys: Keyring, victim: str) -> None:
        super().__init__(daemon=True)
        self.go, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self.over = self.killed = False
        keys._store = SteppedStore(store, self.turn)  # type: ignore[assignment]
        self.keys, self.victim = keys, victim
        self.start()
        self.waits.acquire()

    def turn(self) -> None:
        self.waits.release()
        self.go.acquire()
        if self.killed:
            raise Killed

    def run(self) -> None:
        try:
            self.keys.remove(self.victim)
        except (InUseError, NotFoundError, Killed):
            pass
        finally:
            self.over = True
            self.waits.release()

    def step(self) -> None:
        """Let it do one call."""
        if not self.over:
            self.go.release()
            self.waits.acquire()

    def end(self) -> None:
        self.killed = True
        self.step()
        self.join()


def schedules() -> Iterator[list[int]]:
    """Every order in which two commands can do six calls each."""
    for places in itertools.combinations(range(12), 6):
        yield [int(number in places) for number in range(12)]


def lost_repositories(kill: bool) -> int:
    """In how many of the orders no key is left. With ``kill`` also killed after each number."""
    lost = 0
    store = made()
    ring(store, SECRET).add(OTHER)
    start = bucket(store)
    for number, schedule in enumerate(schedules()):
        store = MemoryObjectStore()
        for key, data in start.items():
            store.put(key, data)
        keys = [ring(store, SECRET), ring(store, OTHER)]
        removers = [
            Remover(store, keys[0], keys[1].current),
            Remover(store, keys[1], keys[0].current),
        ]
        for who in schedule[: number % 12] if kill else schedule:
            removers[who].step()
        for remover in removers:
            remover.end()
        if any(key.startswith("keys/") for key in bucket(store)):
            assert opens(store, SECRET) or opens(store, OTHER)
        else:
            lost += 1
    return lost


@pytest.mark.parametrize("kill", [False, True])
def test_two_that_remove_each_others_key(kill: bool) -> None:
    assert lost_repositories(kill) == 0


def test_without_looking_at_the_other_removal_it_would_be_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def careless(self: Keyring, slot_id: str, staying: str) -> None:
        if self._store.size("keys/" + staying) is None:
            raise InUseError("gone")
        self._store.delete("keys/" + slot_id)

    monkeypatch.setattr(Keyring, "_retire", careless)
    assert lost_repositories(False) > 0


def test_a_removal_that_was_killed_can_be_finished() -> None:
    store = made()
    keys = ring(store, SECRET)
    other = keys.add(OTHER)
    store.put(f"removals/{other}", b"")  # killed after its first step
    assert opens(store, OTHER)
    with pytest.raises(InUseError, match=f"{other}.*passwd"):
        ring(store, OTHER).remove(keys.current)
    assert opens(store, SECRET)
    ring(store, OTHER).change(OTHER)
    assert opens(store, OTHER)
    assert not [key for key in bucket(store) if key.startswith("removals/")]
    other = ring(store, OTHER).current
    store.put(f"removals/{other}", b"")
    keys.remove(other)
    assert not opens(store, OTHER)
    assert not [key for key in bucket(store) if key.startswith("removals/")]


def test_secrets_are_what_they_are_and_not_shown() -> None:
    secret = passphrase_line("pässword\r\n".encode(), "here")
    assert secret == passphrase("pa\u0308ssword", "here")
    assert "ssword" not in repr(secret)
    assert key_file(b" " + HEX.upper().encode() + b"\r\n", "here") == FILE
    assert key_file(new_key_file(), "here") != key_file(new_key_file(), "here")
    for line in (b"", b"\n", b"two\nlines\n", b"a\0b", b"\xff\xfe", b"x" * 2000, b"a\tb"):
        with pytest.raises(InvalidError, match="here") as caught:
            passphrase_line(line, "here")
        assert "lines" not in str(caught.value).replace("one line", "")
    for content in (b"", HEX.encode()[:-1], HEX.encode() + b"0", b"g" * 64, HEX.encode() * 2):
        with pytest.raises(InvalidError, match="here") as caught:
            key_file(content, "here")
        assert "5a5a" not in str(caught.value)


def test_errors_show_no_secret() -> None:
    store = made()
    keys = ring(store, SECRET)
    for shown in (
        keys,
        keys.sealer,
        open_in_store(store, SECRET),
        make_slot(bytes(32), "00" * 16, SECRET, 1.0),
    ):
        assert TEXT not in repr(shown)
        assert keys._master_key.hex() not in repr(shown)
    try:
        open_in_store(store, passphrase("wrong-passphrase", "here"))
    except StorageError as error:
        assert "wrong" not in str(error)
