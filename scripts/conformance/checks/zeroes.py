"""NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM and NBD_CMD_CACHE: commands with an effect, not a payload."""

from __future__ import annotations

from ..check import Section
from ..constants import Cmd, CmdFlag, Errno, Flag
from ..target import Target
from ..verdicts import Closed, Violation
from .reads import beyond_the_end, overflowing
from .requests import UNKNOWN_FLAG

WRITE_ZEROES = Section("NBD_CMD_WRITE_ZEROES")
FAST_ZERO = Section("NBD_CMD_FLAG_FAST_ZERO")
TRIM = Section("NBD_CMD_TRIM")
CACHE = Section("NBD_CMD_CACHE")

_CARRIED_OUT = (0, Errno.EINVAL, Errno.EOVERFLOW)


def _need(target: Target, flag: Flag, size: int) -> None:
    target.need_writable()
    target.need_flag(flag)
    target.need_size(size)


def _longer_than_payload(target: Target) -> int:
    length = target.facts.max_payload + target.block
    target.need(length < 1 << 32, "the maximum payload is 4 GiB")
    length -= length % target.block
    target.need_size(length)
    return length


# WRITE_ZEROES


@WRITE_ZEROES.must("it MUST ensure that the data reads back as zero", writes=True)
def reads_back_as_zero(target: Target) -> None:
    _need(target, Flag.SEND_WRITE_ZEROES, 8 * target.block)
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
    _need(target, Flag.SEND_WRITE_ZEROES, target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.succeed(Cmd.WRITE_ZEROES, 0, target.block, flags=CmdFlag.NO_HOLE)


@WRITE_ZEROES.should(
    "length 0: unspecified, although the server SHOULD NOT disconnect", writes=True
)
def length_zero(target: Target) -> None:
    _need(target, Flag.SEND_WRITE_ZEROES, 0)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.call(Cmd.WRITE_ZEROES, 0, 0)
        transmission.check_in_step()


@WRITE_ZEROES.should(
    "the server SHOULD return NBD_ENOSPC beyond the size of the device", writes=True
)
def beyond(target: Target) -> None:
    _need(target, Flag.SEND_WRITE_ZEROES, 0)
    for mode in target.modes:
        transmission = target.enter(mode)
        for offset, length in beyond_the_end(target) + overflowing(target):
            transmission.refuse((Errno.ENOSPC,), Cmd.WRITE_ZEROES, offset, length)


@WRITE_ZEROES.should(
    "an effect length larger than the maximum payload: the server SHOULD NOT disconnect, but MAY "
    "reply with NBD_EOVERFLOW or NBD_EINVAL",
    writes=True,
)
def longer_than_the_maximum_payload(target: Target) -> None:
    _need(target, Flag.SEND_WRITE_ZEROES, 0)
    length = _longer_than_payload(target)
    for mode in target.modes:
        transmission = target.enter(mode)
        reply = transmission.call(Cmd.WRITE_ZEROES, 0, length)
        if reply.error not in _CARRIED_OUT:
            raise Violation("success, NBD_EOVERFLOW or NBD_EINVAL", str(reply))
        transmission.check_in_step()


@WRITE_ZEROES.should("NBD_EINVAL for unknown flags, and for flags of other commands", writes=True)
def flags_of_others(target: Target) -> None:
    _need(target, Flag.SEND_WRITE_ZEROES, target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        for flag in (1 << 6, UNKNOWN_FLAG, CmdFlag.DF, CmdFlag.REQ_ONE):
            transmission.refuse((Errno.EINVAL,), Cmd.WRITE_ZEROES, 0, target.block, flags=flag)


# FAST_ZERO


@FAST_ZERO.must(
    "the server MUST fail quickly with NBD_ENOTSUP unless the request can be serviced in less time "
    "than a write: so it succeeds, or fails with that",
    writes=True,
)
def done_or_not_supported(target: Target) -> None:
    _need(target, Flag.SEND_FAST_ZERO, 4 * target.block)
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
    _need(target, Flag.SEND_FAST_ZERO, 4 * target.block)
    transmission = target.enter()
    data = b"q" * 4 * target.block
    for flags in (CmdFlag.FAST_ZERO, CmdFlag.FAST_ZERO | CmdFlag.NO_HOLE):
        transmission.succeed(Cmd.WRITE, 0, payload=data)
        reply = transmission.call(Cmd.WRITE_ZEROES, 0, len(data), flags=flags)
        if reply.error and transmission.succeed(Cmd.READ, 0, len(data)).data != data:
            raise Violation("the data from before", "other data")


@FAST_ZERO.must("without the flag, the server MUST NOT fail with NBD_ENOTSUP", writes=True)
def not_asked_for(target: Target) -> None:
    _need(target, Flag.SEND_FAST_ZERO, target.block)
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
    _need(target, Flag.SEND_WRITE_ZEROES, target.block)
    target.need(not target.facts.flags & Flag.SEND_FAST_ZERO, "it is advertised")
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.refuse(
            (Errno.EINVAL,), Cmd.WRITE_ZEROES, 0, target.block, flags=CmdFlag.FAST_ZERO
        )


# TRIM


@TRIM.rule("a hint that data is no longer needed: it succeeds, and keeps to its range", writes=True)
def range_is_kept(target: Target) -> None:
    _need(target, Flag.SEND_TRIM, 8 * target.block)
    block = target.block
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.succeed(Cmd.WRITE, 0, payload=b"t" * 8 * block)
        transmission.succeed(Cmd.TRIM, 2 * block, 4 * block)
        data = transmission.succeed(Cmd.READ, 0, 8 * block).data
        if data[: 2 * block] + data[6 * block :] != b"t" * 4 * block:
            raise Violation("what is around the range to stay", "other data")


@TRIM.should("length 0: unspecified, although the server SHOULD NOT disconnect", writes=True)
def trim_of_length_zero(target: Target) -> None:
    _need(target, Flag.SEND_TRIM, 0)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.call(Cmd.TRIM, 0, 0)
        transmission.check_in_step()


@TRIM.should("it SHOULD return NBD_EINVAL for a trim beyond the size of the device", writes=True)
def trim_beyond(target: Target) -> None:
    _need(target, Flag.SEND_TRIM, 0)
    for mode in target.modes:
        transmission = target.enter(mode)
        for offset, length in beyond_the_end(target) + overflowing(target):
            transmission.refuse((Errno.EINVAL,), Cmd.TRIM, offset, length)


@TRIM.should("an effect length larger than the maximum payload: SHOULD NOT disconnect", writes=True)
def trim_longer_than_the_maximum_payload(target: Target) -> None:
    _need(target, Flag.SEND_TRIM, 0)
    length = _longer_than_payload(target)
    for mode in target.modes:
        transmission = target.enter(mode)
        reply = transmission.call(Cmd.TRIM, 0, length)
        if reply.error not in _CARRIED_OUT:
            raise Violation("success, NBD_EOVERFLOW or NBD_EINVAL", str(reply))
        transmission.check_in_step()


@TRIM.should("NBD_EINVAL for unknown flags, and for flags of other commands", writes=True)
def trim_flags_of_others(target: Target) -> None:
    _need(target, Flag.SEND_TRIM, target.block)
    wrong = (1 << 6, UNKNOWN_FLAG, CmdFlag.NO_HOLE, CmdFlag.DF, CmdFlag.REQ_ONE, CmdFlag.FAST_ZERO)
    for mode in target.modes:
        transmission = target.enter(mode)
        for flag in wrong:
            transmission.refuse((Errno.EINVAL,), Cmd.TRIM, 0, target.block, flags=flag)


# CACHE


@CACHE.must("there MUST NOT be any difference in semantics compared to if CACHE had not been used")
def changes_nothing(target: Target) -> None:
    target.need_flag(Flag.SEND_CACHE)
    target.need_size(target.block)
    length = min(1 << 20, target.end)
    for mode in target.modes:
        transmission = target.enter(mode)
        before = transmission.succeed(Cmd.READ, 0, length).data
        transmission.call(Cmd.CACHE, 0, length)
        if transmission.succeed(Cmd.READ, 0, length).data != before:
            raise Violation("the same data as before", "other data")


@CACHE.must("if it advertised the command, the server MUST reject any flags it does not recognize")
def unknown_flags(target: Target) -> None:
    target.need_flag(Flag.SEND_CACHE)
    target.need_size(target.block)
    for mode in target.modes:
        for flag in (1 << 6, UNKNOWN_FLAG):
            transmission = target.enter(mode)
            try:
                reply = transmission.call(Cmd.CACHE, 0, target.block, flags=flag)
            except Closed:
                continue
            if not reply.error:
                raise Violation("an error", str(reply))


@CACHE.rule("clients exist that send it where it is not advertised: it is answered")
def not_advertised_cache(target: Target) -> None:
    target.need(not target.facts.flags & Flag.SEND_CACHE, "it is advertised")
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.call(Cmd.CACHE, 0, target.block)
        transmission.check_in_step()


@CACHE.should("the server SHOULD report NBD_EINVAL if the request would exceed the export size")
def cache_beyond(target: Target) -> None:
    target.need_flag(Flag.SEND_CACHE)
    for mode in target.modes:
        transmission = target.enter(mode)
        for offset, length in beyond_the_end(target) + overflowing(target):
            transmission.refuse((Errno.EINVAL,), Cmd.CACHE, offset, length)


@CACHE.should("an effect length larger than the maximum payload: SHOULD NOT disconnect")
def cache_longer_than_the_maximum_payload(target: Target) -> None:
    target.need_flag(Flag.SEND_CACHE)
    length = _longer_than_payload(target)
    for mode in target.modes:
        transmission = target.enter(mode)
        reply = transmission.call(Cmd.CACHE, 0, length)
        if reply.error not in _CARRIED_OUT:
            raise Violation("success, NBD_EOVERFLOW or NBD_EINVAL", str(reply))
        transmission.check_in_step()
