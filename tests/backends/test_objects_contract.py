"""What every object store promises, run over memory and directory; S3 runs it as integration."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends.directory_objects import DirectoryObjectStore
from backends.errors import CorruptError, InvalidError, NotFoundError
from backends.memory_objects import MemoryObjectStore
from backends.objects import ObjectStore

BAD_KEYS = ["", "/", "/a", "a/", "a//b", "../a", "a/../b", "a/..", ".", "a/./b", "a b", "a\0", "é"]


class ObjectStoreContract:
    """Subclasses have a fixture ``make`` that gives a function which opens the same store anew."""

    @pytest.fixture
    def store(self, make: Callable[[], ObjectStore]) -> ObjectStore:
        return make()

    def test_what_is_put_is_read_back(self, store: ObjectStore) -> None:
        data = bytes(range(256)) * 5000
        store.put("a/b/c", data)
        assert store.get("a/b/c", len(data)) == data
        assert store.size("a/b/c") == len(data)
        assert store.get_range("a/b/c", 0, 10) == data[:10]
        assert store.get_range("a/b/c", 70000, 5001) == data[70000:75001]
        assert store.get_range("a/b/c", len(data) - 1, 1) == data[-1:]
        assert store.get_range("a/b/c", 5, 0) == b""

    def test_a_bytearray_and_an_empty_object(self, store: ObjectStore) -> None:
        store.put("array", bytearray(b"12345"))
        store.put("empty", b"")
        assert store.get("array", 5) == b"12345"
        assert store.get("empty", 0) == b""
        assert store.size("empty") == 0
        assert store.put_if_absent("also", bytearray(b"678"))
        assert store.get("also", 5) == b"678"

    def test_put_replaces(self, store: ObjectStore) -> None:
        store.put("key", b"longer than the next")
        store.put("key", b"short")
        assert store.get("key", 100) == b"short"

    def test_put_if_absent_only_creates(self, store: ObjectStore) -> None:
        assert store.put_if_absent("dir/key", b"first") is True
        assert store.put_if_absent("dir/key", b"second") is False
        assert store.get("dir/key", 100) == b"first"
        store.delete("dir/key")
        assert store.put_if_absent("dir/key", b"third") is True
        assert store.get("dir/key", 100) == b"third"

    def test_exactly_one_of_many_wins(self, make: Callable[[], ObjectStore]) -> None:
        stores = [make() for _ in range(4)]
        with ThreadPoolExecutor(8) as pool:
            for race in range(5):

                def attempt(number: int, race: int = race) -> bool:
                    return stores[number % 4].put_if_absent(f"race/{race}", b"%d" % number)

                won = list(pool.map(attempt, range(8)))
                assert won.count(True) == 1
                assert stores[0].get(f"race/{race}", 9) == b"%d" % won.index(True)

    def test_what_is_not_there(self, store: ObjectStore) -> None:
        store.put("a/b", b"x")
        for key in ("missing", "a", "a/b/c", "a/c"):
            assert store.size(key) is None
            with pytest.raises(NotFoundError, match=key):
                store.get(key, 100)
            with pytest.raises(NotFoundError, match=key):
                store.get_range(key, 0, 1)
            store.delete(key)
        assert store.get("a/b", 1) == b"x"

    def test_longer_or_shorter_than_expected(self, store: ObjectStore) -> None:
        store.put("key", b"0123456789")
        with pytest.raises(CorruptError, match="key"):
            store.get("key", 9)
        for offset, length in ((0, 11), (9, 2), (10, 1), (1000, 1000)):
            with pytest.raises(CorruptError, match="key"):
                store.get_range("key", offset, length)

    def test_list(self, store: ObjectStore) -> None:
        keys = ["a", "a-b/x", "a.b/x", "a/b", "a/c/d", "a/c/e", "ab", "b/a", "b0"]
        for number, key in enumerate(keys):
            if key != "a":
                store.put(key, b"x" * number)
        rest = [(key, number) for number, key in enumerate(keys) if key != "a"]
        assert list(store.list("")) == rest
        assert list(store.list("a/")) == [pair for pair in rest if pair[0].startswith("a/")]
        assert list(store.list("a/c")) == [("a/c/d", 4), ("a/c/e", 5)]
        assert [key for key, _ in store.list("b")] == ["b/a", "b0"]
        assert [key for key, _ in store.list("a")] == [key for key in keys[1:] if key[0] == "a"]
        assert list(store.list("none/")) == []

    def test_delete_of_the_last_makes_no_trouble(self, store: ObjectStore) -> None:
        for _ in range(3):
            store.put("deep/er/key", b"x")
            store.delete("deep/er/key")
            store.delete("deep/er/key")
            assert list(store.list("")) == []

    def test_keys_cannot_escape(self, store: ObjectStore) -> None:
        for key in [*BAD_KEYS, "k" * 801]:
            for use in (
                lambda key=key: store.put(key, b""),
                lambda key=key: store.put_if_absent(key, b""),
                lambda key=key: store.get(key, 1),
                lambda key=key: store.get_range(key, 0, 1),
                lambda key=key: store.size(key),
                lambda key=key: store.delete(key),
            ):
                with pytest.raises(InvalidError):
                    use()
        for prefix in ("../", "a/../", "a b"):
            with pytest.raises(InvalidError):
                list(store.list(prefix))

    def test_writers_and_deleters_of_one_directory(self, make: Callable[[], ObjectStore]) -> None:
        stores = [make() for _ in range(4)]

        def work(number: int) -> None:
            for turn in range(20):
                key = f"shared/dir/{number}-{turn}"
                assert stores[number].put_if_absent(key, b"x")
                assert stores[number].get(key, 1) == b"x"
                stores[number].delete(key)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert list(stores[0].list("")) == []


class TestMemoryObjects(ObjectStoreContract):
    @pytest.fixture
    def make(self) -> Callable[[], ObjectStore]:
        store = MemoryObjectStore()
        return lambda: store


class TestDirectoryObjects(ObjectStoreContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[[], ObjectStore]:
        return lambda: DirectoryObjectStore(tmp_path)
