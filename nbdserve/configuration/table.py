"""One table of the configuration file, and errors that say where they are.

Each error is ``FILE:LINE: [[table]] 'name': what is wrong and what is allowed``. A value that is
refused is added to the problems of the file and read as if it was absent, so that all mistakes are
found at once. What a reader raises by itself (``error``, ``problem``) ends the reading of its table
only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from backends.errors import InvalidError
from nbdserve.configuration.lines import Place
from nbdserve.configuration.problems import Problems

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A file, the lines of what is in it, and what is wrong with it."""

    file: Path
    lines: Mapping[Place, int]
    problems: Problems

    def place(self, path: Place) -> str:
        """``FILE:LINE`` of a value; of the table that lacks it when it is absent."""
        while path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines[path]}"


class Table:
    """One table of the file; ``label`` names it in errors. A key that is absent is None."""

    def __init__(
        self,
        source: Source,
        values: Mapping[str, object],
        keys: Sequence[str],
        at: Place = (),
        label: str = "",
    ) -> None:
        self._source = source
        self._values = values
        self._at = at
        self._label = f" {label}:" if label else ""
        for key in values:
            if key not in keys:
                near = get_close_matches(key, keys, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}"
                self.refuse(self.problem(key, f"unknown key {key!r}; {hint}"))

    @property
    def where(self) -> str:
        """The table's place and name, for errors that are found later."""
        return f"{self._source.place(self._at)}:{self._label}".removesuffix(":")

    def problem(self, key: str, text: str, item: int | None = None) -> InvalidError:
        """An error about a key, or about one item of its list; ``text`` says it all."""
        path = (*self._at, key) if item is None else (*self._at, key, item)
        return InvalidError(f"{self._source.place(path)}:{self._label} {text}")

    def error(self, key: str, wanted: str, item: int | None = None) -> InvalidError:
        """An error that says what a key must be."""
        return self.problem(key, f"{key!r} must be {wanted}", item)

    def refuse(self, error: InvalidError) -> None:
        """Add it to the problems of the file, and go on."""
        self._source.problems.add(error)

    def has(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, meaning: str) -> str | None:
        value = self._values.get(key)
        if value is None or (isinstance(value, str) and value):
            return value
        self.refuse(self.error(key, f"a string: {meaning}"))
        return None

    def required_text(self, key: str, meaning: str) -> str:
        """Raises InvalidError when it is absent or refused."""
        value = self._values.get(key)
        if value is None:
            raise self.problem(key, f"{key!r} is missing: {meaning}")
        if not isinstance(value, str) or not value:
            raise self.error(key, f"a string: {meaning}")
        return value

    def path(self, key: str, meaning: str) -> Path | None:
        value = self.text(key, meaning)
        return None if value is None else Path(value)

    def choice(self, key: str, allowed: Sequence[str]) -> str | None:
        value = self._values.get(key)
        if value is None or (isinstance(value, str) and value in allowed):
            return value
        self.refuse(self.error(key, f"one of {', '.join(allowed)}"))
        return None

    def flag(self, key: str) -> bool | None:
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return value
        self.refuse(self.error(key, "true or false"))
        return None

    def number(self, key: str, most: int, unit: str = "") -> int | None:
        value = self._values.get(key)
        if value is None or (
            isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        ):
            return value
        self.refuse(self.error(key, f"a number{unit and ' of '}{unit} from 1 to {most}"))
        return None

    def seconds(self, key: str, most: float) -> float | None:
        """A time from 0 on, with fractions."""
        value = self._values.get(key)
        if value is None:
            return None
        # What is not a number compares as false.
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
            self.refuse(self.error(key, f"a number of seconds from 0 to {most:g}"))
            return None
        return float(value)

    def decimal(self, key: str, most: float) -> float | None:
        """A number above 0, with or without a fraction."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            self.refuse(self.error(key, f"a number above 0, at most {most:g}"))
            return None
        return float(value)

    def text_or_number(self, key: str, meaning: str) -> str | int | None:
        value = self._values.get(key)
        if value is None or (
            isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        ):
            return value
        self.refuse(self.error(key, meaning))
        return None

    def items(self, key: str, kinds: type | tuple[type, ...], wanted: str) -> list[object] | None:
        """A list of one or more values of these types, none of them empty."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            self.refuse(self.error(key, f"a list of {wanted}"))
            return None
        for number, item in enumerate(value):
            if not isinstance(item, kinds) or isinstance(item, bool) or item == "":
                self.refuse(self.error(key, f"a list of {wanted}", number))
                return None
        return value

    def texts(self, key: str, meaning: str) -> tuple[str, ...] | None:
        value = self.items(key, str, f"strings, {meaning}")
        return None if value is None else tuple(map(str, value))

    def command(self, key: str) -> str | tuple[str, ...] | None:
        """A string that is to be taken apart, or a list of the command's words."""
        if isinstance(self._values.get(key), list):
            return self.texts(key, "the command and its arguments")
        return self.text(key, "a command, or a list of it and its arguments")

    def one(self, key: str, keys: Sequence[str], read: Callable[[Table], T]) -> T | None:
        """What ``read`` makes of the table written ``[key]``; None without it, or without sense."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(self.error(key, f"written as a table, [{key}]"))
            return None
        path = (*self._at, key)
        return self._source.problems.attempt(
            lambda: read(Table(self._source, value, keys, path, f"[{key}]"))
        )

    def each(
        self, key: str, name: str, keys: Sequence[str], read: Callable[[Table], T]
    ) -> tuple[T, ...]:
        """What ``read`` makes of the tables ``[[key]]``; errors call each by its ``name``."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.refuse(self.error(key, f"written as tables, [[{key}]]"))
            return ()
        found: list[T] = []
        for number, values in enumerate(value):
            called = values.get(name)
            which = repr(called) if isinstance(called, str) and called else f"number {number + 1}"
            table = Table(
                self._source, values, keys, (*self._at, key, number), f"[[{key}]] {which}"
            )
            try:
                found.append(read(table))
            except InvalidError as error:
                self.refuse(error)
        return tuple(found)
