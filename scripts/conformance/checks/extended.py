"""NBD_OPT_EXTENDED_HEADERS, and what is different in the transmission phase after it."""

from __future__ import annotations

import struct

from ..check import Section
from ..constants import BASE_ALLOCATION, Cmd, CmdFlag, Errno, Flag, Info, Option, Rep
from ..handshake import encode_info
from ..target import Target
from ..transmission import Mode, Transmission
from ..verdicts import Closed, Unavailable, Violation
from .asking import check_in_step, require_reply
from .requests import UNKNOWN_COMMAND, commands, length_of

EXTENDED_HEADERS = Section("NBD_OPT_EXTENDED_HEADERS")
EXTENDED_CHUNK = Section("Extended reply chunk message")
PAYLOAD_LEN = Section("NBD_CMD_FLAG_PAYLOAD_LEN")
STATUS_PAYLOAD = Section("NBD_FLAG_BLOCK_STATUS_PAYLOAD")
STATUS_EXT = Section("NBD_REPLY_TYPE_BLOCK_STATUS_EXT")


def _need(target: Target) -> None:
    target.need(target.facts.extended, "extended headers are not offered")


# The option


@EXTENDED_HEADERS.should("the server SHOULD reject a request that includes data with ERR_INVALID")
def with_data(target: Target) -> None:
    _need(target)
    handshake = target.haggle()
    answer = handshake.ask(Option.EXTENDED_HEADERS, b"data", "with 4 bytes")
    require_reply(answer, Rep.ERR_INVALID)
    check_in_step(handshake)


@EXTENDED_HEADERS.should(
    "a server SHOULD support this option even if structured replies are not negotiated; and after"
)
def with_and_without_structured_replies(target: Target) -> None:
    _need(target)
    target.enter(Mode.EXTENDED).check_in_step()
    handshake = target.haggle()
    target.negotiate(handshake, Mode.STRUCTURED)
    target.negotiate(handshake, Mode.EXTENDED)
    target.go(handshake, Mode.EXTENDED).check_in_step()


@EXTENDED_HEADERS.rule(
    "STRUCTURED_REPLY after it: NBD_REP_ERR_EXT_HEADER_REQD, extended headers take precedence"
)
def then_structured_replies(target: Target) -> None:
    _need(target)
    handshake = target.haggle()
    target.negotiate(handshake, Mode.EXTENDED)
    require_reply(handshake.ask(Option.STRUCTURED_REPLY), Rep.ERR_EXT_HEADER_REQD)
    target.go(handshake, Mode.EXTENDED).check_in_step()


@EXTENDED_HEADERS.must("the server MUST NOT fail NBD_OPT_GO with NBD_REP_ERR_UNSUP after it")
def go(target: Target) -> None:
    _need(target)
    handshake = target.haggle()
    target.negotiate(handshake, Mode.EXTENDED)
    answer = handshake.ask(Option.GO, encode_info(target.name, (Info.BLOCK_SIZE,)))
    if answer.final == Rep.ERR_UNSUP:
        raise Violation("any other reply", str(answer))


@EXTENDED_HEADERS.rule(
    "a client MUST NOT use EXPORT_NAME after it: the server terminates the session, or serves it "
    "with extended replies"
)
def then_export_name(target: Target) -> None:
    _need(target)
    handshake = target.haggle()
    target.negotiate(handshake, Mode.EXTENDED)
    handshake.send_option(Option.EXPORT_NAME, target.name)
    try:
        export = handshake.read_export()
    except Closed:
        return
    target.transmit(handshake, Mode.EXTENDED, export, {}).check_in_step()


@EXTENDED_HEADERS.rule("a repeated message is acknowledged, or MAY fail with NBD_REP_ERR_INVALID")
def twice(target: Target) -> None:
    _need(target)
    handshake = target.haggle()
    target.negotiate(handshake, Mode.EXTENDED)
    require_reply(handshake.ask(Option.EXTENDED_HEADERS), Rep.ACK, Rep.ERR_INVALID)
    target.go(handshake, Mode.EXTENDED).check_in_step()


# Replies


@EXTENDED_CHUNK.must(
    "all server replies MUST use an extended reply; its offset MUST match that of the request"
)
def every_reply(target: Target) -> None:
    _need(target)
    target.need_size(2 * target.block)
    transmission = target.enter(Mode.EXTENDED)
    for command in commands(target):
        offset = 0 if command == Cmd.FLUSH else target.block
        transmission.call(command, offset, length_of(target, command))
    transmission.call(UNKNOWN_COMMAND, 0x0102030405060708)
    transmission.call(Cmd.READ, (1 << 64) - target.block, target.block)


@EXTENDED_CHUNK.rule("64 bits, payload/effect length: it is not cut to 32 bits")
def lengths_of_64_bits(target: Target) -> None:
    _need(target)
    target.need_size(target.block)
    transmission = target.enter(Mode.EXTENDED)
    target.need(target.facts.size < 1 << 32, "the export is larger than 4 GiB")
    for length in ((1 << 32) + target.block, 1 << 40, (1 << 64) - target.block, 1 << 63):
        transmission.refuse((Errno.EINVAL, Errno.EOVERFLOW), Cmd.READ, 0, length)
        if target.facts.flags & Flag.SEND_CACHE:
            transmission.refuse((Errno.EINVAL, Errno.EOVERFLOW), Cmd.CACHE, 0, length)


@EXTENDED_CHUNK.rule(
    "64 bits, payload/effect length: it is not cut to 32 bits in TRIM and WRITE_ZEROES", writes=True
)
def lengths_of_64_bits_in_writes(target: Target) -> None:
    _need(target)
    target.need_writable()
    target.need_size(target.block)
    target.need(target.facts.size < 1 << 32, "the export is larger than 4 GiB")
    transmission = target.enter(Mode.EXTENDED)
    for length in ((1 << 32) + target.block, 1 << 40, (1 << 64) - target.block):
        if target.facts.flags & Flag.SEND_WRITE_ZEROES:
            transmission.refuse((Errno.ENOSPC,), Cmd.WRITE_ZEROES, 0, length)
        if target.facts.flags & Flag.SEND_TRIM:
            transmission.refuse((Errno.EINVAL,), Cmd.TRIM, 0, length)


@EXTENDED_CHUNK.rule("one request may have an effect on more than 4 GiB", writes=True)
def one_request_of_more_than_4_gib(target: Target) -> None:
    _need(target)
    target.need_writable()
    target.need_flag(Flag.SEND_WRITE_ZEROES)
    target.need_size((1 << 32) + target.block)
    reply = target.enter(Mode.EXTENDED).call(Cmd.WRITE_ZEROES, 0, (1 << 32) + target.block)
    if reply.error not in (0, Errno.EINVAL, Errno.EOVERFLOW):
        raise Violation("success, NBD_EINVAL or NBD_EOVERFLOW", str(reply))


# PAYLOAD_LEN


@PAYLOAD_LEN.rule(
    "the flag MUST be set by the client for NBD_CMD_WRITE. qemu's client (10.0) sends its data "
    "without: that is written, refused, or reason to disconnect, never a cause to lose step",
    writes=True,
)
def missing_on_write(target: Target) -> None:
    """What a server does then is not said: what it must not do is say one thing and do another."""
    _need(target)
    target.need_writable()
    target.need_size(target.block)
    data = b"p" * target.block
    transmission = target.enter(Mode.EXTENDED)
    transmission.succeed(Cmd.WRITE, 0, payload=bytes(target.block))
    try:
        reply = transmission.call(Cmd.WRITE, 0, payload=data, exact_flags=True)
        transmission.check_in_step()
    except Closed:
        return
    found = target.enter(Mode.EXTENDED).succeed(Cmd.READ, 0, target.block).data
    if found != (bytes(target.block) if reply.error else data):
        raise Violation(f"what follows from the reply ({reply})", "other data")


@PAYLOAD_LEN.should(
    "for other commands the flag will trigger an NBD_EINVAL error; a server SHOULD gracefully "
    "consume the payload"
)
def on_other_commands(target: Target) -> None:
    _need(target)
    target.need_size(target.block)
    transmission = target.enter(Mode.EXTENDED)
    for command in (*commands(target), UNKNOWN_COMMAND):
        for length in (1, target.block, 64 << 10):
            transmission.refuse((Errno.EINVAL,), command, 0, payload=bytes(length))


@PAYLOAD_LEN.should(
    "a server SHOULD gracefully consume a payload that the command does not expect: TRIM and "
    "WRITE_ZEROES",
    writes=True,
)
def on_writing_commands(target: Target) -> None:
    _need(target)
    target.need_writable()
    target.need_size(target.block)
    transmission = target.enter(Mode.EXTENDED)
    for command in (Cmd.TRIM, Cmd.WRITE_ZEROES):
        transmission.refuse((Errno.EINVAL,), command, 0, payload=bytes(target.block))


@PAYLOAD_LEN.rule("a (nonzero) payload length: one of zero is refused, or done; no disconnect")
def of_zero_bytes(target: Target) -> None:
    _need(target)
    target.need_size(target.block)
    transmission = target.enter(Mode.EXTENDED)
    try:
        transmission.call(Cmd.READ, 0, 0, flags=CmdFlag.PAYLOAD_LEN)
        transmission.check_in_step()
    except Closed:
        raise Violation("a reply", "the end of the connection") from None


@PAYLOAD_LEN.should(
    "a server SHOULD initiate hard disconnect if the flag is used with a length larger than the "
    "maximum payload length"
)
def larger_than_the_maximum_payload(target: Target) -> None:
    _need(target)
    for length in (1 << 33, 1 << 63):
        if length > target.facts.max_payload:
            transmission = target.enter(Mode.EXTENDED)
            transmission.send(Cmd.READ, 0, length, flags=CmdFlag.PAYLOAD_LEN)
            transmission.connection.drain("the server to close the connection")


# BLOCK_STATUS


@STATUS_EXT.must("for all contexts in the base: namespace, the upper 32 bits MUST be all zeroes")
def upper_bits(target: Target) -> None:
    _need(target)
    target.need_context()
    target.need(BASE_ALLOCATION in target.facts.contexts, "base:allocation is not offered")
    target.need_size(target.block)
    transmission = target.enter(Mode.EXTENDED, (BASE_ALLOCATION,))
    for runs in transmission.succeed(Cmd.BLOCK_STATUS, 0, target.end).statuses.values():
        for _, status in runs:
            if status >> 32:
                raise Violation("a status below 2^32", f"{status:#x}")


@STATUS_EXT.rule("the whole export in one request, whatever its size")
def whole_export(target: Target) -> None:
    _need(target)
    target.need_context()
    target.need_size(target.block)
    transmission = target.enter(Mode.EXTENDED, target.facts.contexts)
    transmission.succeed(Cmd.BLOCK_STATUS, 0, target.end)


def _with_payload(target: Target) -> Transmission:
    _need(target)
    target.need_context()
    target.need_size(target.block)
    target.need_flag(Flag.BLOCK_STATUS_PAYLOAD)
    return target.enter(Mode.EXTENDED, target.facts.contexts)


def _select(length: int, *numbers: int) -> bytes:
    return struct.pack(f">Q{len(numbers)}I", length, *numbers)


def _refuse(transmission: Transmission, payload: bytes) -> None:
    transmission.refuse(
        (Errno.EINVAL,),
        Cmd.BLOCK_STATUS,
        0,
        payload=payload,
        asked=(),
    )


@STATUS_PAYLOAD.must("the reply is limited to the metacontext ids in the client's request payload")
def selected_contexts(target: Target) -> None:
    transmission = _with_payload(target)
    numbers = tuple(transmission.contexts)
    for asked in [*((number,) for number in numbers), numbers, numbers[::-1]]:
        payload = _select(target.block, *asked)
        transmission.succeed(Cmd.BLOCK_STATUS, 0, payload=payload, asked=asked)


@STATUS_PAYLOAD.rule("64 bits, effect length: it is the payload's, not the header's, that counts")
def effect_length(target: Target) -> None:
    transmission = _with_payload(target)
    number = next(iter(transmission.contexts))
    reply = transmission.succeed(
        Cmd.BLOCK_STATUS,
        0,
        payload=_select(target.block, number),
        asked=(number,),
        flags=CmdFlag.REQ_ONE,
    )
    (runs,) = reply.statuses.values()
    if len(runs) != 1 or runs[0][0] > target.block:
        raise Violation(f"one descriptor of at most {target.block} bytes", str(runs[:4]))
    _refuse(transmission, _select(target.facts.size + target.block, number))


@STATUS_PAYLOAD.must("duplicate metacontext ids: the server MUST consume the payload, then EINVAL")
def duplicate_ids(target: Target) -> None:
    transmission = _with_payload(target)
    number = next(iter(transmission.contexts))
    _refuse(transmission, _select(target.block, number, number))


@STATUS_PAYLOAD.must("unknown metacontext ids: the server MUST consume the payload, then EINVAL")
def unknown_ids(target: Target) -> None:
    transmission = _with_payload(target)
    unknown = next(
        number for number in range(0x7000, 0x7100) if number not in transmission.contexts
    )
    _refuse(transmission, _select(target.block, unknown))
    _refuse(transmission, _select(target.block, next(iter(transmission.contexts)), unknown))


@STATUS_PAYLOAD.must("the payload form MUST occupy 8 + n*4 bytes: others are refused, and consumed")
def odd_lengths(target: Target) -> None:
    transmission = _with_payload(target)
    good = _select(target.block, next(iter(transmission.contexts)))
    for payload in (good[:1], good[:7], good[:11], good + b"\0"):
        _refuse(transmission, payload)


@STATUS_PAYLOAD.must(
    "if the server does not support the payload form, it MUST gracefully consume the payload "
    "before failing with NBD_EINVAL"
)
def not_supported(target: Target) -> None:
    _need(target)
    target.need_size(target.block)
    transmission = target.enter(Mode.EXTENDED)
    if transmission.export.flags & Flag.BLOCK_STATUS_PAYLOAD and target.facts.contexts:
        raise Unavailable("it is supported")
    _refuse(transmission, _select(target.block, 1))


@STATUS_PAYLOAD.should("servers SHOULD NOT advertise this bit if the client negotiates no contexts")
def advertised_without_contexts(target: Target) -> None:
    _need(target)
    transmission = target.enter(Mode.EXTENDED)
    if transmission.export.flags & Flag.BLOCK_STATUS_PAYLOAD:
        raise Violation("no NBD_FLAG_BLOCK_STATUS_PAYLOAD", "it")
