"""Ranges of bytes that requests are tried with, and what they need."""

from __future__ import annotations

from ..constants import Errno, Flag
from ..target import Target

CARRIED_OUT = (0, Errno.EINVAL, Errno.EOVERFLOW)
"""What a request may come to that is longer than the maximum payload, and carries none."""


def beyond_the_end(target: Target) -> list[tuple[int, int]]:
    """Offset and length, in whole blocks, of requests that go beyond the end of the export."""
    block, size = target.block, target.end
    past = size if size == target.facts.size else size + block
    requests = [(past, block), (past + block, block), (1 << 62, block)]
    if size >= block:
        requests.append((past - block, 2 * block))
    return requests


def overflowing(target: Target) -> list[tuple[int, int]]:
    """Offset and length whose sum is 2^64 or more, or 2^63."""
    block = target.block
    return [((1 << 64) - block, block), ((1 << 64) - block, 2 * block), (1 << 63, block)]


def unaligned(target: Target) -> list[tuple[int, int]]:
    """Offset and length of requests that are not multiples of the minimum block size."""
    minimum = target.facts.minimum_block
    target.need(minimum > 1, "the minimum block size is 1")
    target.need_size(2 * target.block)
    return [(1, minimum), (0, minimum + 1), (0, 1)]


def refuse_ranges(
    target: Target, errors: tuple[Errno, ...], command: int, ranges: list[tuple[int, int]]
) -> None:
    """In every framing: the command has to be refused for each range, with one of the errors."""
    for mode in target.modes:
        transmission = target.enter(mode)
        for offset, length in ranges:
            transmission.refuse(errors, command, offset, length)


def need_effect(target: Target, flag: Flag, size: int) -> None:
    """Skip the check unless the export is writable, offers the command, and is large enough."""
    target.need_writable()
    target.need_flag(flag)
    target.need_size(size)


def longer_than_payload(target: Target) -> int:
    """A length within the export, longer than the maximum payload."""
    length = target.facts.max_payload + target.block
    target.need(length < 1 << 32, "the maximum payload is 4 GiB")
    length -= length % target.block
    target.need_size(length)
    return length
