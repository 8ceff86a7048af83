"""Names and sizes as users write them.

A name has letters, digits, ``.``, ``_`` and ``-``, at most 127 of them, and does not begin with
``.`` or ``-`` (so that it is neither a path of its own nor an option). ``VOLUME@SNAPSHOT`` names a
snapshot. A size is a number of bytes, or a number with K, M, G, T or P for powers of 1024.
"""

from __future__ import annotations

import re

from backends.errors import InvalidError

BLOCK_SHIFT = 12
BLOCK_SIZE = 1 << BLOCK_SHIFT
MAX_VOLUME_SIZE = 16 << 40
MAX_NAME = 127

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,126}", re.ASCII)
_SIZE = re.compile(r"([0-9]{1,20})([KMGTP]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_UNITS = "KMGTP"
_SHOWN_UNITS = "KMGTPE"


def check_name(kind: str, name: str) -> str:
    """Return ``name`` when it may name a volume or snapshot (``kind`` is for the message)."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = name if len(name) <= 140 else name[:130] + "…"
        raise InvalidError(
            f"{kind} name {shown!r} is not allowed: use 1 to 127 letters, digits, '.', '_' or '-',"
            " not beginning with '.' or '-'"
        )
    return name


def parse_snapshot_name(text: str) -> tuple[str, str]:
    """Split ``VOLUME@SNAPSHOT`` into its two names."""
    volume, at, snapshot = text.partition("@")
    if not at:
        raise InvalidError(f"{text!r} is not a snapshot: write VOLUME@SNAPSHOT")
    return check_name("volume", volume), check_name("snapshot", snapshot)


def parse_size(text: str) -> int:
    """Bytes of ``10G``, ``512M``, ``4096``…; InvalidError names what is allowed."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InvalidError(f"size {text!r} is not a number of bytes; write for example 512M or 10G")
    number, unit = match.groups()
    shift = 10 * (_UNITS.index(unit.upper()) + 1) if unit else 0
    return int(number) << shift


def format_size(size: float) -> str:
    """``size`` in bytes as ``512``, ``4K`` or ``1.5G`` (powers of 1024)."""
    if size < 1024:
        return f"{size:.0f}"
    for unit in _SHOWN_UNITS:
        size /= 1024
        if round(size, 1) < 1024 or unit == _SHOWN_UNITS[-1]:
            break
    return f"{size:.1f}".removesuffix(".0") + unit


def check_volume_size(size: int) -> int:
    """Return ``size`` when a volume may have it: 4 KiB to 16 TiB, in steps of 4 KiB."""
    if size < BLOCK_SIZE:
        raise InvalidError(f"size {size} is too small: a volume has at least 4 KiB")
    if size > MAX_VOLUME_SIZE:
        raise InvalidError(f"size {size} is too large: a volume has at most 16 TiB")
    if size % BLOCK_SIZE:
        below = size - size % BLOCK_SIZE
        raise InvalidError(
            f"size {size} is not a multiple of 4 KiB; the nearest are {below} and"
            f" {below + BLOCK_SIZE}"
        )
    return size
