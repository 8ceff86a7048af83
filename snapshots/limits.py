"""How much of a volume's requests is carried out in a second, as it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from backends.errors import InvalidError

MOST: Final = {
    "iops": 10**9,
    "iops_burst": 10**9,
    "bandwidth": 1 << 50,
    "bandwidth_burst": 1 << 50,
}
"""The largest values; the smallest is 1."""


@dataclass(frozen=True)
class Limits:
    """``iops`` requests and ``bandwidth`` bytes a second; None is no limit.

    After a pause, a burst of so many requests or bytes may be done at once; None: a tenth of a
    second's.
    """

    iops: int | None = None
    iops_burst: int | None = None
    bandwidth: int | None = None
    bandwidth_burst: int | None = None

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return self.iops is not None or self.bandwidth is not None

    def check(self) -> Limits:
        """Itself; InvalidError when a value is none that there can be."""
        for name, value in asdict(self).items():
            if value is not None and not 1 <= value <= MOST[name]:
                raise InvalidError(f"{name} must be from 1 to {MOST[name]}, not {value}")
        for rate in ("iops", "bandwidth"):
            if getattr(self, f"{rate}_burst") is not None and getattr(self, rate) is None:
                raise InvalidError(f"{rate}_burst without {rate}: there is no limit to exceed")
        return self

    def as_map(self) -> dict[str, int]:
        """What is limited, as msgpack can hold it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


NO_LIMITS: Final = Limits()
LIMIT_NAMES: Final = tuple(field.name for field in fields(Limits))


def limits_from_map(found: Mapping[str, Any]) -> Limits:
    """Inverse of ``as_map``; TypeError or ValueError when it does not fit."""
    for value in found.values():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError("a limit is a number")
    try:
        return Limits(**found).check()
    except InvalidError as error:
        raise ValueError(str(error)) from None
