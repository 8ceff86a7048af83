"""NBD_CMD_BLOCK_STATUS, and what base:allocation says."""

from __future__ import annotations

from ..check import Section
from ..constants import (
    BASE_ALLOCATION,
    STATE_HOLE,
    STATE_ZERO,
    Cmd,
    CmdFlag,
    Errno,
    Flag,
)
from ..target import Target
from ..transmission import Mode, Transmission
from ..verdicts import Violation
from .ranges import beyond_the_end, overflowing
from .requests import UNKNOWN_FLAG

BLOCK_STATUS = Section("NBD_CMD_BLOCK_STATUS")
REPLY_TYPE = Section("NBD_REPLY_TYPE_BLOCK_STATUS")
ALLOCATION = Section("base:allocation metadata context")

_MOST_STEPS = 200


def _transmissions(target: Target) -> list[Transmission]:
    """One for each kind of replies that has chunks, with every context selected."""
    target.need_context()
    target.need_size(target.block)
    return [target.enter(mode, target.facts.contexts) for mode in target.modes[1:]]


def _ask(
    transmission: Transmission, offset: int, length: int, flags: int = 0
) -> dict[int, list[tuple[int, int]]]:
    """Statuses of a range, by context ID."""
    return transmission.succeed(Cmd.BLOCK_STATUS, offset, length, flags=flags).statuses


def _whole(target: Target, mode: Mode) -> int:
    """The longest request of whole blocks."""
    return min(target.end, (1 << 32) - target.block if mode is not Mode.EXTENDED else target.end)


@BLOCK_STATUS.must("the server MUST use one reply chunk per selected context id")
def one_chunk_for_each_context(target: Target) -> None:
    for transmission in _transmissions(target):
        _ask(transmission, 0, target.block)
        _ask(transmission, 0, _whole(target, transmission.mode))


@BLOCK_STATUS.must(
    "one reply chunk per selected context id, and none for a context that was not selected"
)
def each_context_alone(target: Target) -> None:
    target.need_context()
    target.need_size(target.block)
    for mode in target.modes[1:]:
        for name in target.facts.contexts:
            _ask(target.enter(mode, (name,)), 0, target.block)


@BLOCK_STATUS.must("the server MUST return at least one status descriptor, of nonzero length")
def progress_to_the_end(target: Target) -> None:
    for transmission in _transmissions(target):
        offset = 0
        for _ in range(_MOST_STEPS):
            if offset >= target.end:
                break
            length = min(_whole(target, transmission.mode), target.end - offset)
            runs = _ask(transmission, offset, length)
            step = min(sum(length for length, _ in found) for found in runs.values())
            offset += max(step - step % target.block, target.block)


@BLOCK_STATUS.must(
    "NBD_CMD_FLAG_REQ_ONE: every chunk MUST contain exactly one descriptor, not longer than the "
    "length of the request"
)
def req_one(target: Target) -> None:
    for transmission in _transmissions(target):
        for length in (target.block, _whole(target, transmission.mode)):
            for runs in _ask(transmission, 0, length, CmdFlag.REQ_ONE).values():
                if len(runs) != 1 or runs[0][0] > length:
                    raise Violation(f"one descriptor of at most {length} bytes", str(runs[:4]))


@REPLY_TYPE.must(
    "with N extents, the sum of the lengths of the first N-1 MUST be less than the requested length"
)
def all_but_the_last_within_the_request(target: Target) -> None:
    for transmission in _transmissions(target):
        half = _whole(target, transmission.mode) // 2
        for length in (target.block, max(half - half % target.block, target.block)):
            for runs in _ask(transmission, 0, length).values():
                if sum(run for run, _ in runs[:-1]) >= length:
                    raise Violation(f"less than {length} bytes before the last", str(runs[:4]))


@REPLY_TYPE.should("servers SHOULD NOT send more than 2^20 extents in a single reply chunk")
def extents_in_a_chunk(target: Target) -> None:
    for transmission in _transmissions(target):
        for runs in _ask(transmission, 0, _whole(target, transmission.mode)).values():
            if len(runs) > 1 << 20:
                raise Violation("1048576 descriptors or fewer", str(len(runs)))


@BLOCK_STATUS.must(
    "the server MUST use descriptor lengths that are an integer multiple of the minimum block size"
)
def multiples_of_the_minimum_block(target: Target) -> None:
    minimum = target.facts.minimum_block
    _require_multiples(target, minimum)


@BLOCK_STATUS.should("the server SHOULD use descriptor lengths that are a multiple of 512 bytes")
def multiples_of_512(target: Target) -> None:
    target.need(target.facts.size % 512 == 0, "the export's size is no multiple of 512")
    _require_multiples(target, 512)


def _require_multiples(target: Target, unit: int) -> None:
    for transmission in _transmissions(target):
        for runs in _ask(transmission, 0, _whole(target, transmission.mode)).values():
            odd = [length for length, _ in runs if length % unit]
            # What is left of an export that is no multiple itself cannot be one either.
            if odd and not (len(odd) == 1 and runs[-1][0] == odd[0] and target.facts.size % unit):
                raise Violation(f"multiples of {unit}", str(odd[:4]))


@BLOCK_STATUS.should(
    "the server SHOULD use different status values between consecutive descriptors"
)
def neighbours_differ(target: Target) -> None:
    for transmission in _transmissions(target):
        for runs in _ask(transmission, 0, _whole(target, transmission.mode)).values():
            for (_, one), (_, other) in zip(runs, runs[1:]):
                if one == other:
                    raise Violation("statuses that differ", f"{one} twice: {runs[:4]}")


@BLOCK_STATUS.should(
    "length 0: the behavior is unspecified although the server SHOULD NOT disconnect"
)
def length_zero(target: Target) -> None:
    for transmission in _transmissions(target):
        transmission.call(Cmd.BLOCK_STATUS, 0, 0)
        transmission.check_in_step()


@BLOCK_STATUS.should("NBD_EINVAL for a request with an effect length exceeding the export")
def beyond(target: Target) -> None:
    for transmission in _transmissions(target):
        for offset, length in beyond_the_end(target) + overflowing(target):
            transmission.refuse((Errno.EINVAL,), Cmd.BLOCK_STATUS, offset, length)


@BLOCK_STATUS.should("NBD_EINVAL for BLOCK_STATUS without selecting at least one metadata context")
def without_context(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        target.enter(mode).refuse((Errno.EINVAL,), Cmd.BLOCK_STATUS, 0, target.block)


@BLOCK_STATUS.should("NBD_EINVAL for unknown flags, and for flags of other commands")
def flags_of_others(target: Target) -> None:
    for transmission in _transmissions(target):
        for flag in (1 << 6, UNKNOWN_FLAG, CmdFlag.DF, CmdFlag.NO_HOLE, CmdFlag.FAST_ZERO):
            transmission.refuse((Errno.EINVAL,), Cmd.BLOCK_STATUS, 0, target.block, flags=flag)


@BLOCK_STATUS.must("NBD_CMD_FLAG_FUA: the server MUST accept all commands with this bit set")
def fua(target: Target) -> None:
    target.need_flag(Flag.SEND_FUA)
    for transmission in _transmissions(target):
        _ask(transmission, 0, target.block, CmdFlag.FUA)


# base:allocation


def _allocation(target: Target, mode: Mode) -> Transmission:
    target.need_context()
    target.need(BASE_ALLOCATION in target.facts.contexts, "base:allocation is not offered")
    return target.enter(mode, (BASE_ALLOCATION,))


def _runs(transmission: Transmission, offset: int, length: int) -> list[tuple[int, int]]:
    (runs,) = _ask(transmission, offset, length).values()
    return runs


@ALLOCATION.should(
    "the remainder of the flags field is reserved: servers SHOULD set it to all-zero"
)
def reserved_flags(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes[1:]:
        for _, flags in _runs(_allocation(target, mode), 0, _whole(target, mode)):
            if flags & ~(STATE_HOLE | STATE_ZERO):
                raise Violation("no flags but bits 0 and 1", f"{flags:#x}")


@ALLOCATION.rule("NBD_STATE_ZERO: if set, the block contents read as all zeroes")
def zero_is_zero(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes[1:]:
        transmission = _allocation(target, mode)
        offset, looked_at = 0, 0
        for length, flags in _runs(transmission, 0, _whole(target, mode)):
            size = min(length, target.end - offset, 1 << 20)
            if flags & STATE_ZERO and size > 0 and not offset % target.block:
                size -= size % target.block
                if transmission.succeed(Cmd.READ, offset, size).data.strip(b"\0"):
                    raise Violation(f"zeroes at {offset}", "other data")
                looked_at += 1
            offset += length
            if looked_at == 16 or offset >= target.end:
                break


@ALLOCATION.rule("data that was written is neither a hole nor zero", writes=True)
def data_is_data(target: Target) -> None:
    target.need_writable()
    target.need_size(1 << 18)
    for mode in target.modes[1:]:
        transmission = _allocation(target, mode)
        transmission.succeed(Cmd.WRITE, 0, payload=b"a" * (1 << 18))
        covered = 0
        for length, flags in _runs(transmission, 0, 1 << 18):
            if flags & STATE_ZERO:
                raise Violation(f"no NBD_STATE_ZERO at {covered}", f"flags {flags}")
            covered += length


@ALLOCATION.rule(
    "what was zeroed may be reported as it is; if it is, it reads as zeroes", writes=True
)
def zeroed_and_data(target: Target) -> None:
    target.need_writable()
    target.need_flag(Flag.SEND_WRITE_ZEROES)
    target.need_size(1 << 20)
    for mode in target.modes[1:]:
        transmission = _allocation(target, mode)
        transmission.succeed(Cmd.WRITE, 0, payload=b"b" * (1 << 20))
        piece = 1 << 17
        for start in range(0, 1 << 20, 2 * piece):
            transmission.succeed(Cmd.WRITE_ZEROES, start, piece)
        offset = 0
        for length, flags in _runs(transmission, 0, 1 << 20):
            end = min(offset + length, 1 << 20)
            data = transmission.succeed(Cmd.READ, offset, end - offset).data
            if flags & STATE_ZERO and data.strip(b"\0"):
                raise Violation(f"zeroes from {offset} to {end}", "other data")
            offset = end
