"""What is damaged, and whom it harms: the findings of a verification.

An object is harmed as a whole (it is missing), or at some offsets: those of chunks in a segment, of
records in an object of pages. Snapshots are numbered, and who needs an object is one bit for each:
1,000 snapshots that need 10,000 damaged objects are 2 MB. Beside that, memory is some 60 bytes for
each damaged chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from snapshots.repository.layout import segment_key
from snapshots.repository.pages import Entry


@dataclass
class Damage:
    """One damaged object.

    ``offsets`` are where in it something is damaged that a snapshot needs, ascending; none: the
    object as a whole, or a part that no snapshot needs. ``snapshots`` are those that cannot be
    restored whole, sorted.
    """

    key: str
    problem: str  # the first that was found, one line
    offsets: list[int] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)


@dataclass
class Finding:
    """What is known of one object. ``volume`` is that of the snapshots that need it.

    ``needed``: it was found where a snapshot needs it. ``regions`` are the numbers of the pages
    which describe what is damaged, or are it.
    """

    key: str
    problem: str
    whole: bool = False
    needed: bool = False
    volume: str = ""
    offsets: set[int] = field(default_factory=set)
    regions: set[int] = field(default_factory=set)
    harmed: int = 0  # a bit for each snapshot


class Findings:
    """All of them, by key."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}
        self._labels: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Finding:
        return self._found[key]

    def number(self, label: str) -> int:
        """A number for a snapshot."""
        self._labels.append(label)
        return len(self._labels) - 1

    def add(self, key: str, problem: str, snapshot: int | None = None) -> Finding:
        """Something is wrong with an object, and this snapshot needs that; None: nobody does."""
        finding = self._found.setdefault(key, Finding(key, problem))
        if snapshot is not None:
            finding.needed = True
            finding.harmed |= 1 << snapshot
        return finding

    def is_bad(self, key: str, offset: int) -> bool:
        """Whether what is at this place is known to be damaged."""
        finding = self._found.get(key)
        return finding is not None and (finding.whole or offset in finding.offsets)

    def find_bad(self, entry: Entry) -> list[tuple[str, int]]:
        """The places (segment's key, offset) of what ``entry`` needs that are known damaged."""
        if not self._found:
            return []
        places = ((segment_key(*piece[:2]), piece.offset) for piece in entry.pieces())
        return [place for place in places if self.is_bad(*place)]

    def harmed(self) -> int:
        """A bit for each snapshot that is harmed."""
        bits = 0
        for finding in self._found.values():
            bits |= finding.harmed
        return bits

    def forgive(self, snapshot: int) -> None:
        """Nothing harms this snapshot any more; what only it needed is no damage."""
        for key, finding in list(self._found.items()):
            finding.harmed &= ~(1 << snapshot)
            if finding.needed and not finding.harmed:
                del self._found[key]

    def needed(self) -> list[Finding]:
        """Those that harm a snapshot, by key."""
        return [found for _, found in sorted(self._found.items()) if found.harmed]

    def report(self) -> list[Damage]:
        """Each damaged object once, by key."""
        lists: dict[int, list[str]] = {}  # many objects are needed by the same snapshots
        damaged = []
        for key, found in sorted(self._found.items()):
            snapshots = lists.get(found.harmed)
            if snapshots is None:
                bits = bin(found.harmed)[:1:-1]
                snapshots = sorted(
                    {label for label, bit in zip(self._labels, bits, strict=False) if bit == "1"}
                )
                lists[found.harmed] = snapshots
            offsets = [] if found.whole else sorted(found.offsets)
            damaged.append(Damage(key, found.problem, offsets, snapshots))
        return damaged
