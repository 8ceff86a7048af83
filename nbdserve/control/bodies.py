"""What a request asks for, checked: anything else is an :class:`InvalidError`.

Only the shape is checked here (which fields, of which type); names and sizes are checked where
they are used, so that every way in gives the same line.
"""

import json
import re
from collections.abc import Mapping

from aiohttp import web

from backends.errors import InvalidError
from snapshots.names import parse_size, parse_snapshot_name

MAX_BODY = 256 * 1024
"""Bytes; a group of 1000 snapshots with the longest names fits."""


class Fields:
    """The JSON object of a request body. Every getter takes a field away; ``end`` refuses rest."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = dict(values)

    @classmethod
    async def of(cls, request: web.Request) -> "Fields":
        text = await request.read()
        if not text:
            return cls({})
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidError(f"the request body is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InvalidError("the request body must be a JSON object")
        return cls(values)

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str):
            raise InvalidError(f"{name!r} must be a string")
        return value

    def optional_text(self, name: str) -> str | None:
        return None if self._absent(name) else self.text(name)

    def size(self, name: str) -> int:
        """Bytes, or text such as ``10G``."""
        value = self._take(name)
        if isinstance(value, str):
            return parse_size(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise InvalidError(f"{name!r} must be a number of bytes or a text like '10G'")

    def optional_size(self, name: str) -> int | None:
        return None if self._absent(name) else self.size(name)

    def number(self, name: str, most: float) -> float:
        """From 0 to ``most``; an int when it is whole and was sent as such."""
        value = self._take(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
            raise InvalidError(f"{name!r} must be a number from 0 to {most:g}")
        return value

    def flag(self, name: str) -> bool:
        """False when absent."""
        value = self._values.pop(name, False)
        if not isinstance(value, bool):
            raise InvalidError(f"{name!r} must be true or false")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings, not empty."""
        value = self._take(name)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise InvalidError(f"{name!r} must be a list of strings, not empty")
        return value

    def snapshots(self, name: str) -> list[tuple[str, str]]:
        """A list of ``VOLUME@SNAPSHOT``."""
        return [parse_snapshot_name(text) for text in self.texts(name)]

    def labels(self, name: str) -> dict[str, str]:
        """An object whose values are strings; empty when absent."""
        value = self._values.pop(name, {})
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise InvalidError(f"{name!r} must be an object whose values are strings")
        return value

    def end(self) -> None:
        """Refuse what nobody asked for: a misspelled option must not be ignored."""
        if self._values:
            raise InvalidError(f"unknown field {min(self._values)!r} in the request body")

    def _absent(self, name: str) -> bool:
        if self._values.get(name) is None:
            self._values.pop(name, None)
            return True
        return False

    def _take(self, name: str) -> object:
        try:
            return self._values.pop(name)
        except KeyError:
            raise InvalidError(f"the request body lacks {name!r}") from None


def query_flag(request: web.Request, name: str) -> bool:
    """A flag of the query string: absent is false."""
    value = request.query.get(name, "false")
    if value not in {"true", "false"}:
        raise InvalidError(f"{name!r} must be true or false")
    return value == "true"


def query_number(request: web.Request, name: str, absent: int) -> int:
    """A whole number of the query string."""
    value = request.query.get(name)
    if value is None:
        return absent
    if not re.fullmatch("[0-9]{1,9}", value):
        raise InvalidError(f"{name!r} must be a whole number")
    return int(value)
