"""A simulated file system that knows what of it is durable (the package's text has the rules).

Each file and directory has its present content and its **stable** one, which is what a power cut
leaves for certain; between the two lie the changes that were not synced. ``Disk.copy`` is the
file system as it is, ``Disk.cut`` one that a power cut could leave; a ``Choice`` says which.

Contents are pages of immutable bytes, shared between copies: a state costs as much as it changes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from random import Random

PAGE = 4096
SECTOR = 512
ZEROES = bytes(PAGE)


class PowerCutError(BaseException):
    """Whoever still runs on a disk that is dead; no handler of the product takes it for an error of
    the disk."""


class Choice:
    """Which of the changes that were not synced have come; ``made`` says it.

    All are alike likely within one file, or within what is not in files; how likely is drawn anew
    for each, so that much of one and little of another is as common as some of all.
    """

    def __init__(self, seed: object) -> None:
        self.random = Random(repr(seed))
        self.made: list[int] = []
        self.alike = self.random.random() < 0.3
        self.likely = 0.0
        self.torn = self.random.choice((0.0, 0.0, 0.3, 1.0))
        self._draw()

    def _draw(self) -> None:
        self.likely = self.random.choice((0.0, 1.0, 0.1, 0.5, 0.5, 0.9))

    def begin(self) -> None:
        """A file, or the directories."""
        if not self.alike:
            self._draw()

    def of(self, count: int) -> int:
        """One of ``count`` versions, 0 the oldest."""
        random = self.random
        if count == 1:
            made = 0
        elif random.random() < self.likely:
            made = count - 1
        else:
            made = 0 if count == 2 else random.randrange(count - 1)
        self.made.append(made)
        return made

    def tears(self) -> bool:
        """Whether the sectors of a page come each by itself."""
        return self.random.random() < self.torn


class Change:
    """A page after a change: sectors ``first`` to ``last`` were written; or, ``hole``, all of it
    at once, by the metadata that says where a file has anything."""

    __slots__ = ("content", "first", "hole", "last")

    def __init__(self, first: int, last: int, content: bytes | None, hole: bool) -> None:
        self.first = first
        self.last = last
        self.content = content
        self.hole = hole


class File:
    """Pages by number, those missing being holes; see the module's text."""

    def __init__(self, pages: dict[int, bytes], size: int) -> None:
        self.pages = pages
        self.size = size
        self.stable = dict(pages)
        self.stable_size = size
        self.changes: dict[int, list[Change]] = {}
        self.sizes: list[int] = []

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        parts = []
        end = offset + length
        while offset < end:
            page, start = divmod(offset, PAGE)
            stop = min(PAGE, start + end - offset)
            parts.append(self.pages.get(page, ZEROES)[start:stop])
            offset += stop - start
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        position = 0
        while position < len(data):
            page, start = divmod(offset + position, PAGE)
            stop = min(PAGE, start + len(data) - position)
            part = data[position : position + stop - start]
            if stop - start < PAGE:
                old = self.pages.get(page, ZEROES)
                part = old[:start] + part + old[stop:]
            self.pages[page] = part
            change = Change(start // SECTOR, -(-stop // SECTOR), part, False)
            self.changes.setdefault(page, []).append(change)
            position += stop - start
        self.grow(offset + len(data))

    def grow(self, size: int) -> None:
        if size > self.size:
            self.sizes += range(-(-(self.size + 1) // PAGE) * PAGE, size, PAGE)
            self.sizes.append(size)
            self.size = size

    def clear(self, offset: int, length: int, *, allocated: bool) -> None:
        """Punch a hole, or make it a range of zeroes that has space."""
        end = offset + length
        while offset < end:
            page, start = divmod(offset, PAGE)
            stop = min(PAGE, start + end - offset)
            if stop - start < PAGE:
                if page in self.pages:
                    size = self.size
                    self.write(offset, ZEROES[start:stop])
                    assert self.size == size
            else:
                if allocated:
                    self.pages[page] = ZEROES
                else:
                    self.pages.pop(page, None)
                hole = Change(0, PAGE // SECTOR, ZEROES if allocated else None, True)
                self.changes.setdefault(page, []).append(hole)
            offset += stop - start

    def truncate(self, size: int) -> None:
        if size < self.size:
            border = -(-size // PAGE) * PAGE
            if border > size:
                self.write(size, ZEROES[: min(border, self.size) - size])
            last = max((*self.pages, *self.changes), default=0) + 1
            self.clear(border, max(0, last * PAGE - border), allocated=False)
        self.size = size
        self.sizes.append(size)

    def sync(self) -> None:
        for page in self.changes:
            if page in self.pages:
                self.stable[page] = self.pages[page]
            else:
                self.stable.pop(page, None)
        self.changes.clear()
        self.sizes.clear()
        self.stable_size = self.size

    def copy(self) -> File:
        new = File(dict(self.pages), self.size)
        new.stable = dict(self.stable)
        new.stable_size = self.stable_size
        new.changes = {page: list(changes) for page, changes in self.changes.items()}
        new.sizes = list(self.sizes)
        return new

    def cut(self, choice: Choice) -> File:
        if not self.changes and not self.sizes:
            return File(dict(self.stable), self.stable_size)
        choice.begin()
        pages = dict(self.stable)
        for page, changes in self.changes.items():
            content = _cut_page(pages.get(page), changes, choice)
            if content is None:
                pages.pop(page, None)
            else:
                pages[page] = content
        size = self.stable_size
        if self.sizes:
            made = choice.of(len(self.sizes) + 1)
            size = self.sizes[made - 1] if made else size
        if size < max(self.stable_size, *self.sizes, 0):
            end, rest = divmod(size, PAGE)
            pages = {page: data for page, data in pages.items() if page < end + (rest > 0)}
            if rest and end in pages:
                pages[end] = pages[end][:rest] + ZEROES[rest:]
        return File(pages, size)


def _cut_page(content: bytes | None, changes: list[Change], choice: Choice) -> bytes | None:
    """What a page holds: first which holes have come, then which of the bytes since."""
    holes = [index for index, change in enumerate(changes) if change.hole]
    if holes:
        made = choice.of(len(holes) + 1)
        begin = 0 if made == 0 else holes[made - 1] + 1
        end = holes[made] if made < len(holes) else len(changes)
        if made:
            content = changes[begin - 1].content
        changes = changes[begin:end]
    if not changes:
        return content
    if not choice.tears():
        # Pages that come whole, each at some time: the usual case.
        made = choice.of(len(changes) + 1)
        return changes[made - 1].content if made else content
    old = ZEROES if content is None else content
    parts = []
    for sector in range(PAGE // SECTOR):
        versions = [old, *(c.content for c in changes if c.first <= sector < c.last)]
        chosen = versions[choice.of(len(versions))]
        assert chosen is not None
        parts.append(chosen[sector * SECTOR : (sector + 1) * SECTOR])
    return b"".join(parts)


class Directory:
    """Entries by name; see the module's text."""

    def __init__(self, entries: dict[str, Node]) -> None:
        self.entries = entries
        self.stable = dict(entries)


Node = File | Directory
Slot = tuple[Directory, str, Node | None]
"""A name in a directory, and what it is from now on."""


class Disk:
    """The file system; ``on_call`` is told of every call that changes or syncs, before it is done.

    ``log`` has them all, for people to read.
    """

    def __init__(self, root: Directory | None = None) -> None:
        self.root = root or Directory({})
        self.unordered: list[tuple[Slot, ...]] = []
        self.log: list[str] = []
        self.on_call: Callable[[str], None] = lambda call: None
        self.dead = False
        self.boots = 1

    def note(self, call: str) -> None:
        """A call begins."""
        if self.dead:
            raise PowerCutError
        self.on_call(call)
        self.log.append(call)

    # Names

    def find(self, path: str) -> Node:
        """What is there; FileNotFoundError."""
        node: Node = self.root
        try:
            for name in path.split("/"):
                if name:
                    node = node.entries[name]  # type: ignore[union-attr]
        except (KeyError, AttributeError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        return node

    def place(self, path: str) -> tuple[Directory, str]:
        """The directory that a path is in, and its name there."""
        above, _, name = path.rstrip("/").rpartition("/")
        directory = self.find(above)
        if not isinstance(directory, Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return directory, name

    def change(self, *slots: Slot) -> None:
        """Change directories, as a whole."""
        for directory, name, node in slots:
            if node is None:
                del directory.entries[name]
            else:
                directory.entries[name] = node
        self.unordered.append(slots)

    def sync_directory(self, directory: Directory) -> None:
        """Make the changes of a directory durable, and those that they need."""
        needed: set[tuple[int, str]] = set()
        durable = []
        left = []
        for slots in reversed(self.unordered):
            names = {(id(found), name) for found, name, _ in slots}
            if any(found is directory for found, _, _ in slots) or needed & names:
                needed |= names
                durable.append(slots)
            else:
                left.append(slots)
        for slots in reversed(durable):
            for found, name, node in slots:
                _set(found.stable, name, node)
        self.unordered = left[::-1]

    # Copies

    def copy(self) -> Disk:
        """The same once more, with all that is not durable yet: what a kill leaves."""
        made: dict[int, Node] = {}

        def take(node: Node) -> Node:
            if id(node) not in made:
                if isinstance(node, File):
                    made[id(node)] = node.copy()
                else:
                    made[id(node)] = new = Directory({})
                    new.entries = {name: take(below) for name, below in node.entries.items()}
                    new.stable = {name: take(below) for name, below in node.stable.items()}
            return made[id(node)]

        root = take(self.root)
        assert isinstance(root, Directory)
        disk = Disk(root)
        for slots in self.unordered:
            disk.unordered.append(
                tuple(
                    (take(directory), name, None if node is None else take(node))  # type: ignore[misc]
                    for directory, name, node in slots
                )
            )
        disk.log = self.log[-2000:]
        disk.boots = self.boots
        return disk

    def fingerprint(self) -> int:
        """The same for the same files with the same content, whatever of that is durable."""

        def take(node: Node) -> int:
            if isinstance(node, File):
                return hash((node.size, frozenset(node.pages.items())))
            return hash(frozenset((name, take(below)) for name, below in node.entries.items()))

        return take(self.root)

    def cut(self, choice: Choice) -> Disk:
        """What a power cut leaves."""
        views: dict[int, dict[str, Node]] = {}

        def view(directory: Directory) -> dict[str, Node]:
            if id(directory) not in views:
                views[id(directory)] = dict(directory.stable)
            return views[id(directory)]

        choice.begin()
        lost: set[tuple[int, str]] = set()
        for slots in self.unordered:
            names = {(id(directory), name) for directory, name, _ in slots}
            if lost & names or not choice.of(2):
                lost |= names
                continue
            for directory, name, node in slots:
                _set(view(directory), name, node)

        def take(node: Node) -> Node:
            if isinstance(node, File):
                return node.cut(choice)
            return Directory({name: take(below) for name, below in view(node).items()})

        root = take(self.root)
        assert isinstance(root, Directory)
        disk = Disk(root)
        disk.log = [*self.log[-2000:], "— cut —"]
        disk.boots = self.boots + 1
        return disk


def _set(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node
