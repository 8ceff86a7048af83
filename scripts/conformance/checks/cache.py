"""NBD_CMD_CACHE."""

from __future__ import annotations

from ..check import Section
from ..constants import Cmd, Errno, Flag
from ..target import Target
from ..verdicts import Closed, Violation
from .ranges import CARRIED_OUT, beyond_the_end, longer_than_payload, overflowing, refuse_ranges
from .requests import UNKNOWN_FLAG

CACHE = Section("NBD_CMD_CACHE")


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
def not_advertised(target: Target) -> None:
    target.need(not target.facts.flags & Flag.SEND_CACHE, "it is advertised")
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.call(Cmd.CACHE, 0, target.block)
        transmission.check_in_step()


@CACHE.should("the server SHOULD report NBD_EINVAL if the request would exceed the export size")
def beyond(target: Target) -> None:
    target.need_flag(Flag.SEND_CACHE)
    refuse_ranges(target, (Errno.EINVAL,), Cmd.CACHE, beyond_the_end(target) + overflowing(target))


@CACHE.should("an effect length larger than the maximum payload: SHOULD NOT disconnect")
def longer_than_the_maximum_payload(target: Target) -> None:
    target.need_flag(Flag.SEND_CACHE)
    length = longer_than_payload(target)
    for mode in target.modes:
        transmission = target.enter(mode)
        reply = transmission.call(Cmd.CACHE, 0, length)
        if reply.error not in CARRIED_OUT:
            raise Violation("success, NBD_EOVERFLOW or NBD_EINVAL", str(reply))
        transmission.check_in_step()
