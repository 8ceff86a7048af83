"""The root of a snapshot: that of its push, or the newest that repacking has put in its place.

A root of a higher generation is ``roots/<snapshot's push>/<generation>/<repack's push>``, and means
something when the outcome of that repack says that it is committed. All of them restore the same;
but what only an older one refers to is collected. So a reader that misses an object looks for the
newest root again and goes on with that.
"""

from __future__ import annotations

import threading

from backends.errors import CorruptError, NotFoundError
from backends.objects import ObjectStore
from snapshots.repository.layout import PAGE_ENTRIES, ROOTS, outcome_key, parse_root_key
from snapshots.repository.pages import Entry, Page
from snapshots.repository.reading import read_page
from snapshots.repository.records import Config, Outcome, Repacked, Root
from snapshots.repository.steps import Get, List, Steps, perform

LOOKS = 8  # at a root that others keep superseding


class SupersededError(Exception):
    """The root was the newest when it was listed, and is gone."""


def finding_root(push: str) -> Steps[Repacked]:
    """The newest root of a committed snapshot, with its generation.

    Raises NotFoundError or CorruptError when there is none that can be read.
    """
    for _ in range(LOOKS):
        try:
            return (yield from _look(push))
        except SupersededError:
            continue
    raise NotFoundError(f"the newest root of the push {push} keeps disappearing")


def _look(push: str) -> Steps[Repacked]:
    listed = yield List(f"{ROOTS}{push}/")
    for key, _ in sorted(listed, reverse=True):
        parsed = parse_root_key(key)
        if parsed is None:
            continue
        try:
            repack = yield Get(outcome_key(parsed[2]), Outcome)
        except NotFoundError:
            continue  # not committed yet, or for ever
        if repack.repacked:
            try:
                newest: Repacked = yield Get(key, Repacked)
            except NotFoundError:
                raise SupersededError from None
            return newest
    outcome = yield Get(outcome_key(push), Outcome)
    if outcome.root is None:
        raise NotFoundError(f"the push {push} was never committed")
    return Repacked(push, 0, outcome.root)


def find_root(store: ObjectStore, config: Config, push: str) -> Root:
    """The newest root of a committed snapshot."""
    return perform(store, config, finding_root(push)).root


class Newest:
    """Where the pages of a snapshot are by now, for a reader in the middle of it."""

    def __init__(self, store: ObjectStore, config: Config, root: Root) -> None:
        self._store = store
        self._config = config
        self._root = root
        self._label = root.summary.label
        self._pages: dict[int, Page] = {}
        self._lock = threading.Lock()

    def read_page(self, number: int) -> Page:
        """Page ``number`` by the newest root; NotFoundError or CorruptError when there is none."""
        with self._lock:
            return self._read(number)

    def find_chunk(self, chunk: int, missed: Entry, *, look: bool = True) -> Entry | None:
        """Where ``chunk`` is by the newest root, when ``missed`` is not there.

        Without ``look`` the newest root that is known must do.
        """
        number, place = divmod(chunk, PAGE_ENTRIES)
        with self._lock:
            entry = self._read(number)[place]
            if entry == missed and look:
                self._look_again()
                entry = self._read(number)[place]
            return None if entry == missed else entry

    def _look_again(self) -> None:
        self._root = find_root(self._store, self._config, self._root.summary.push)
        self._pages = {}

    def _read(self, number: int) -> Page:
        try:
            return self._read_known(number)
        except NotFoundError:  # by the root that was the newest when we looked last
            self._look_again()
            return self._read_known(number)

    def _read_known(self, number: int) -> Page:
        page = self._pages.get(number)
        if page is None:
            ref = next((ref for ref in self._root.table if ref.page == number), None)
            if ref is None:
                raise CorruptError(f"the newest root of {self._label} has no page {number}")
            page = read_page(self._store, self._config.chunk_size, ref)
            self._pages = {number: page}
        return page
