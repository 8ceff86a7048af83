"""One table of the configuration file, and errors that say where they are."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from backends.errors import InvalidError


class Table:
    """One table of the file; ``where`` names both in errors. A key that is absent is None."""

    def __init__(self, where: str, values: Mapping[str, object], keys: Sequence[str]) -> None:
        self.where = where
        self._values = values
        for key in values:
            if key not in keys:
                raise InvalidError(f"{where}: unknown key {key!r}; the keys are {', '.join(keys)}")

    def error(self, key: str, wanted: str) -> InvalidError:
        return InvalidError(f"{self.where}: {key!r} must be {wanted}")

    def has(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, meaning: str) -> str | None:
        value = self._values.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.error(key, f"a string: {meaning}")
        return value

    def required_text(self, key: str, meaning: str) -> str:
        value = self.text(key, meaning)
        if value is None:
            raise InvalidError(f"{self.where}: {key!r} is missing: {meaning}")
        return value

    def path(self, key: str, meaning: str) -> Path | None:
        value = self.text(key, meaning)
        return None if value is None else Path(value)

    def choice(self, key: str, allowed: Sequence[str]) -> str | None:
        value = self.text(key, f"one of {', '.join(allowed)}")
        if value is not None and value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}")
        return value

    def number(self, key: str, most: int, unit: str = "") -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.error(key, f"a number{unit and ' of '}{unit} from 1 to {most}")
        return value

    def decimal(self, key: str, most: float) -> float | None:
        """A number above 0, with or without a fraction."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            raise self.error(key, f"a number above 0, at most {most:g}")
        return float(value)

    def text_or_number(self, key: str, meaning: str) -> str | int | None:
        value = self._values.get(key)
        if value is None or (
            isinstance(value, str | int) and not isinstance(value, bool) and value != ""
        ):
            return value
        raise self.error(key, meaning)

    def items(self, key: str, kinds: type | tuple[type, ...], wanted: str) -> list[object] | None:
        """A list of one or more values of these types, none of them empty."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise self.error(key, f"a list of {wanted}")
        for item in value:
            if not isinstance(item, kinds) or isinstance(item, bool) or item == "":
                raise self.error(key, f"a list of {wanted}")
        return value

    def texts(self, key: str, meaning: str) -> tuple[str, ...] | None:
        value = self.items(key, str, f"strings, {meaning}")
        return None if value is None else tuple(map(str, value))

    def table(self, key: str, keys: Sequence[str]) -> "Table | None":
        """The table written ``[key]``."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"written as a table, [{key}]")
        return Table(f"{self.where}: [{key}]", value, keys)

    def tables(self, key: str, name: str, keys: Sequence[str]) -> "Iterator[Table]":
        """The tables written ``[[key]]``; errors call each by its value of ``name``."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, f"written as tables, [[{key}]]")
        for number, values in enumerate(value, 1):
            called = values.get(name)
            which = repr(called) if isinstance(called, str) and called else f"number {number}"
            yield Table(f"{self.where}: [[{key}]] {which}", values, keys)
