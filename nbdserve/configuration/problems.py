"""All that is wrong with a configuration, found in one go."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from backends.errors import InvalidError

T = TypeVar("T")


class ConfigurationError(InvalidError):
    """``problems`` has a line for each; ``str()`` is the first, and how many more there are."""

    def __init__(self, problems: Iterable[str], file: Path | None = None) -> None:
        self.problems = tuple(problems)
        line = self.problems[0]
        more = len(self.problems) - 1
        if more:
            where = "" if file is None else f", see nbdserve config check {file}"
            line += f" (and {more} more problem{'s' if more > 1 else ''}{where})"
        super().__init__(line)


class Problems:
    """Collects what is wrong, with ``file`` if given, while the rest is still looked at."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._lines: list[str] = []

    def add(self, error: InvalidError) -> None:
        found = error.problems if isinstance(error, ConfigurationError) else (str(error),)
        self._lines += (line for line in found if line not in self._lines)

    def attempt(self, function: Callable[[], T]) -> T | None:
        """What the function returns; None when it raises an InvalidError, which is then added."""
        try:
            return function()
        except InvalidError as error:
            self.add(error)
            return None

    def check(self) -> None:
        """Raise ConfigurationError when there is any."""
        if self._lines:
            raise ConfigurationError(self._lines, self._file)
