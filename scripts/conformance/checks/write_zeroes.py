"""NBD_CMD_WRITE_ZEROES, and NBD_CMD_FLAG_FAST_ZERO with it."""

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

WRITE_ZEROES = Section("NBD_CMD_WRITE_ZEROES")
FAST_ZERO = Section("NBD_CMD_FLAG_FAST_ZERO")


@WRITE_ZEROES.must("it MUST ensure that the data reads back as zero", writes=True)
def reads_back_as_zero(target: Target) -> None:
    need_effect(target, Flag.SEND_WRITE_ZEROES, 8 * target.block)
    block = target.block
    for mode in target.modes:
        for flags in (0, int(CmdFlag.NO_HOLE)):
            transmission = target.enter(mode)
            transmission.succeed(Cmd.WRITE, 0, payload=b"z" * 8 * block)
            transmission.succeed(Cmd.WRITE_ZEROES, block, 4 * block, flags=flags)
            expected = b"z" * block + bytes(4 * block) + b"z" * 3 * block
            if transmission.succeed(Cmd.READ, 0, 8 * block).data != expected:
                raise Violation("zeroes in the range, and only there", "other data")


@WRITE_ZEROES.must(
    "the server MUST support the use of NBD_CMD_FLAG_NO_HOLE if it advertises "
    "NBD_FLAG_SEND_WRITE_ZEROES",
    writes=True,
)
def no_hole(target: Target) -> None:
    need_effect(target, Flag.SEND_WRITE_ZEROES, target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.succeed(Cmd.WRITE_ZEROES, 0, target.block, flags=CmdFlag.NO_HOLE)


@WRITE_ZEROES.should(
    "length 0: the behavior is unspecified although the server SHOULD NOT disconnect", writes=True
)
def length_zero(target: Target) -> None:
    need_effect(target, Flag.SEND_WRITE_ZEROES, 0)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.call(Cmd.WRITE_ZEROES, 0, 0)
        transmission.check_in_step()


@WRITE_ZEROES.should(
    "the server SHOULD return NBD_ENOSPC beyond the size of the device", writes=True
)
def beyond(target: Target) -> None:
    need_effect(target, Flag.SEND_WRITE_ZEROES, 0)
    refuse_ranges(
        target, (Errno.ENOSPC,), Cmd.WRITE_ZEROES, beyond_the_end(target) + overflowing(target)
    )


@WRITE_ZEROES.should(
    "an effect length larger than the maximum payload: the server SHOULD NOT disconnect, but MAY "
    "reply with NBD_EOVERFLOW or NBD_EINVAL",
    writes=True,
)
def longer_than_the_maximum_payload(target: Target) -> None:
    need_effect(target, Flag.SEND_WRITE_ZEROES, 0)
    length = longer_than_payload(target)
    for mode in target.modes:
        transmission = target.enter(mode)
        reply = transmission.call(Cmd.WRITE_ZEROES, 0, length)
        if reply.error not in CARRIED_OUT:
            raise Violation("success, NBD_EOVERFLOW or NBD_EINVAL", str(reply))
        transmission.check_in_step()


@WRITE_ZEROES.should("NBD_EINVAL for unknown flags, and for flags of other commands", writes=True)
def flags_of_others(target: Target) -> None:
    need_effect(target, Flag.SEND_WRITE_ZEROES, target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        for flag in (1 << 6, UNKNOWN_FLAG, CmdFlag.DF, CmdFlag.REQ_ONE):
            transmission.refuse((Errno.EINVAL,), Cmd.WRITE_ZEROES, 0, target.block, flags=flag)


# NBD_CMD_FLAG_FAST_ZERO


@FAST_ZERO.must(
    "the server MUST fail quickly with NBD_ENOTSUP unless the request can be serviced in less time "
    "than a write: so it succeeds, or fails with that",
    writes=True,
)
def done_or_not_supported(target: Target) -> None:
    need_effect(target, Flag.SEND_FAST_ZERO, 4 * target.block)
    for mode in target.modes:
        for flags in (CmdFlag.FAST_ZERO, CmdFlag.FAST_ZERO | CmdFlag.NO_HOLE):
            transmission = target.enter(mode)
            reply = transmission.call(Cmd.WRITE_ZEROES, 0, 4 * target.block, flags=flags)
            if reply.error not in (0, Errno.ENOTSUP):
                raise Violation("success or NBD_ENOTSUP", str(reply))
            data = transmission.succeed(Cmd.READ, 0, 4 * target.block).data
            if not reply.error and data.strip(b"\0"):
                raise Violation("zeroes after success", "other data")


@FAST_ZERO.should(
    "the server SHOULD NOT alter the contents of the export when returning NBD_ENOTSUP",
    writes=True,
)
def unaltered_when_not_supported(target: Target) -> None:
    need_effect(target, Flag.SEND_FAST_ZERO, 4 * target.block)
    transmission = target.enter()
    data = b"q" * 4 * target.block
    for flags in (CmdFlag.FAST_ZERO, CmdFlag.FAST_ZERO | CmdFlag.NO_HOLE):
        transmission.succeed(Cmd.WRITE, 0, payload=data)
        reply = transmission.call(Cmd.WRITE_ZEROES, 0, len(data), flags=flags)
        if reply.error and transmission.succeed(Cmd.READ, 0, len(data)).data != data:
            raise Violation("the data from before", "other data")


@FAST_ZERO.must("without the flag, the server MUST NOT fail with NBD_ENOTSUP", writes=True)
def not_asked_for(target: Target) -> None:
    need_effect(target, Flag.SEND_FAST_ZERO, target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        for flags in (0, int(CmdFlag.NO_HOLE)):
            reply = transmission.call(Cmd.WRITE_ZEROES, 0, target.block, flags=flags)
            if reply.error == Errno.ENOTSUP:
                raise Violation("any other reply", str(reply))


@FAST_ZERO.should(
    "if the server did not advertise NBD_FLAG_SEND_FAST_ZERO, it SHOULD fail with NBD_EINVAL if "
    "the flag was set",
    writes=True,
)
def not_advertised(target: Target) -> None:
    need_effect(target, Flag.SEND_WRITE_ZEROES, target.block)
    target.need(not target.facts.flags & Flag.SEND_FAST_ZERO, "it is advertised")
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.refuse(
            (Errno.EINVAL,), Cmd.WRITE_ZEROES, 0, target.block, flags=CmdFlag.FAST_ZERO
        )
