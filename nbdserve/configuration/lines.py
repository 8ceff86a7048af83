"""On which line of a TOML document each key and each item of a list is.

``tomllib`` says what a document holds, not where. This goes through a text that tomllib has
accepted, so it need not find mistakes, only where one thing ends and the next begins: strings of
four kinds (whatever looks like TOML in them is none), comments, lists and tables in braces.

A path is the way to a value in what tomllib returns: keys of tables, numbers of items in lists.
``[[listener]]`` makes ``("listener", 0)``, its key ``tls`` is at ``("listener", 0, "tls")``. A
table is where its header is, or where a dotted key first names it; ``()`` is the document.
"""

import re
import tomllib
from typing import Final

Place = tuple[str | int, ...]

_BLANK: Final = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE: Final = re.compile(r"[ \t]*")
_DOT: Final = re.compile(r"[ \t]*\.[ \t]*")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# A string of three quotes ends with the first three, and up to two more that belong to it.
_STRING: Final = re.compile(
    r'"""(?:\\.|[^\\])*?""""{0,2}' r"|'''.*?''''{0,2}" r'|"(?:\\.|[^"\\])*"' r"|'[^']*'", re.DOTALL
)
_OTHER_VALUE: Final = re.compile(r"[^,\]}#\n]+")  # numbers, dates, true and false


def find_lines(text: str) -> dict[Place, int]:
    """The line, from 1 on, of everything in a document that ``tomllib.loads`` takes."""
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._lines: dict[Place, int] = {(): 1}
        self._counts: dict[Place, int] = {}  # of the tables in each list that headers make

    def scan(self) -> dict[Place, int]:
        table: Place = ()
        self._take(_BLANK)
        while self._at < len(self._text):
            if self._skip("["):
                table = self._header(in_list=self._skip("["))
            else:
                self._pair(table)
            self._take(_BLANK)
        return self._lines

    def _take(self, pattern: re.Pattern[str]) -> str:
        """Pass what the pattern matches here; the text is valid, so it does."""
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        self._line += match[0].count("\n")
        return match[0]

    def _skip(self, character: str) -> bool:
        if not self._text.startswith(character, self._at):
            return False
        self._at += 1
        return True

    def _keys(self) -> list[str]:
        """The parts of a dotted key."""
        keys = []
        while True:
            if self._text[self._at] in "\"'":
                keys.append(tomllib.loads(f"key = {self._take(_STRING)}")["key"])
            else:
                keys.append(self._take(_BARE_KEY))
            if _DOT.match(self._text, self._at) is None:
                return keys
            self._take(_DOT)

    def _header(self, in_list: bool) -> Place:
        self._take(_SPACE)
        *parents, last = self._keys()
        self._take(_SPACE)
        self._at += 2 if in_list else 1
        path: Place = ()
        for key in parents:
            path += (key,)
            self._lines.setdefault(path, self._line)
            if path in self._counts:  # the last table of the list
                path += (self._counts[path] - 1,)
        path += (last,)
        if not in_list:
            self._lines[path] = self._line
            return path
        self._lines.setdefault(path, self._line)
        count = self._counts.get(path, 0)
        self._counts[path] = count + 1
        path += (count,)
        self._lines[path] = self._line
        return path

    def _pair(self, path: Place) -> None:
        """``key = value``."""
        for key in self._keys():
            path += (key,)
            self._lines.setdefault(path, self._line)
        self._take(_SPACE)
        self._at += 1  # the equals sign
        self._take(_SPACE)
        self._value(path)

    def _value(self, path: Place) -> None:
        if self._skip("["):
            count = 0
            while not self._ends("]"):
                self._lines[(*path, count)] = self._line
                self._value((*path, count))
                count += 1
        elif self._skip("{"):
            while not self._ends("}"):
                self._pair(path)
        elif self._text[self._at] in "\"'":
            self._take(_STRING)
        else:
            self._take(_OTHER_VALUE)

    def _ends(self, bracket: str) -> bool:
        """Whether a list or a table in braces ends here; passes the comma before what follows."""
        self._take(_BLANK)
        if self._skip(","):
            self._take(_BLANK)
        return self._skip(bracket)
