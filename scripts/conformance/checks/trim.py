"""NBD_CMD_TRIM."""

from __future__ import annotations

from ..check import Section
from ..constants import Cmd, CmdFlag, Errno, Flag
from ..target import Target
from ..verdicts import Violation
from .ranges import (
    CARRIED_OUT,
    beyond_the_end,
    longer_than_payload,
    need_effect,
    overflowing,
    refuse_ranges,
)
from .requests import UNKNOWN_FLAG

TRIM = Section("NBD_CMD_TRIM")


@TRIM.rule("a hint that data is no longer needed: it succeeds, and keeps to its range", writes=True)
def range_is_kept(target: Target) -> None:
    need_effect(target, Flag.SEND_TRIM, 8 * target.block)
    block = target.block
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.succeed(Cmd.WRITE, 0, payload=b"t" * 8 * block)
        transmission.succeed(Cmd.TRIM, 2 * block, 4 * block)
        data = transmission.succeed(Cmd.READ, 0, 8 * block).data
        if data[: 2 * block] + data[6 * block :] != b"t" * 4 * block:
            raise Violation("what is around the range to stay", "other data")


@TRIM.should(
    "length 0: the behavior is unspecified although the server SHOULD NOT disconnect", writes=True
)
def length_zero(target: Target) -> None:
    need_effect(target, Flag.SEND_TRIM, 0)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.call(Cmd.TRIM, 0, 0)
        transmission.check_in_step()


@TRIM.should("it SHOULD return NBD_EINVAL for a trim beyond the size of the device", writes=True)
def beyond(target: Target) -> None:
    need_effect(target, Flag.SEND_TRIM, 0)
    refuse_ranges(target, (Errno.EINVAL,), Cmd.TRIM, beyond_the_end(target) + overflowing(target))


@TRIM.should("an effect length larger than the maximum payload: SHOULD NOT disconnect", writes=True)
def longer_than_the_maximum_payload(target: Target) -> None:
    need_effect(target, Flag.SEND_TRIM, 0)
    length = longer_than_payload(target)
    for mode in target.modes:
        transmission = target.enter(mode)
        reply = transmission.call(Cmd.TRIM, 0, length)
        if reply.error not in CARRIED_OUT:
            raise Violation("success, NBD_EOVERFLOW or NBD_EINVAL", str(reply))
        transmission.check_in_step()


@TRIM.should("NBD_EINVAL for unknown flags, and for flags of other commands", writes=True)
def flags_of_others(target: Target) -> None:
    need_effect(target, Flag.SEND_TRIM, target.block)
    wrong = (1 << 6, UNKNOWN_FLAG, CmdFlag.NO_HOLE, CmdFlag.DF, CmdFlag.REQ_ONE, CmdFlag.FAST_ZERO)
    for mode in target.modes:
        transmission = target.enter(mode)
        for flag in wrong:
            transmission.refuse((Errno.EINVAL,), Cmd.TRIM, 0, target.block, flags=flag)
