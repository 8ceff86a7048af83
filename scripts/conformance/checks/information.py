"""NBD_OPT_INFO and NBD_OPT_GO, NBD_REP_INFO, size constraints, transmission flags."""

from __future__ import annotations

import struct

from ..check import Section
from ..constants import Flag, Info, Option, Rep, name_flags
from ..handshake import Answer, Handshake, encode_info
from ..target import FIXED, UNLIKELY_NAME, Target
from ..transmission import Mode
from ..verdicts import Closed, Unavailable, Violation
from .asking import check_in_step, check_refused, check_survives, require_error, require_reply

INFO_AND_GO = Section("NBD_OPT_INFO and NBD_OPT_GO")
REP_INFO = Section("NBD_REP_INFO")
SIZE_CONSTRAINTS = Section("Size constraints")
TRANSMISSION_FLAGS = Section("Transmission flags")

_ALL = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


def _need_info(target: Target) -> None:
    target.need(target.facts.info, target.facts.refusal or "NBD_OPT_INFO is not offered")


def _info(target: Target, option: int = Option.INFO, information: tuple[int, ...] = _ALL) -> Answer:
    _need_info(target)
    answer = target.haggle().ask(option, encode_info(target.name, information))
    require_reply(answer, Rep.ACK)
    return answer


def _malformed(target: Target) -> list[tuple[str, bytes]]:
    _need_info(target)
    name = target.name or b"name"
    return [
        ("without data", b""),
        ("of 3 bytes", b"\0\0\0"),
        ("of 5 bytes", b"\0\0\0\0\0"),
        ("without a number of requests", struct.pack(">I", len(name)) + name),
        ("with a name one byte beyond the data", encode_info(name, name_length=len(name) + 3)),
        ("with a name of 4 GiB", encode_info(name, name_length=0xFFFFFFFF)),
        ("with 2 requests announced, 1 sent", encode_info(name, (3,), count=2)),
        ("with 65535 requests announced, none sent", encode_info(name, count=0xFFFF)),
    ]


@INFO_AND_GO.must(
    "length of name MUST be no larger than the option data length - 6: a server is neither hung "
    "nor put out of step by data that is not so"
)
def malformed_info(target: Target) -> None:
    check_survives(target, Option.INFO, _malformed(target))


@INFO_AND_GO.must(
    "length of name MUST be no larger than the option data length - 6, in NBD_OPT_GO: a server is "
    "neither hung nor put out of step by data that is not so"
)
def malformed_go(target: Target) -> None:
    check_survives(target, Option.GO, _malformed(target))


@INFO_AND_GO.rule("NBD_REP_ERR_INVALID: the option was determined to be syntactically invalid")
def malformed_info_is_invalid(target: Target) -> None:
    wanted = (Rep.ERR_INVALID, Rep.ERR_TOO_BIG)
    check_refused(target, Option.INFO, _malformed(target), *wanted)


@INFO_AND_GO.rule("NBD_REP_ERR_INVALID: the option was determined to be syntactically invalid")
def malformed_go_is_invalid(target: Target) -> None:
    wanted = (Rep.ERR_INVALID, Rep.ERR_TOO_BIG)
    check_refused(target, Option.GO, _malformed(target), *wanted)


@INFO_AND_GO.rule("the data ends with the list of information requests: more is invalid")
def trailing_data(target: Target) -> None:
    _need_info(target)
    data = encode_info(target.name, (Info.NAME,)) + b"more"
    check_refused(target, Option.INFO, [("with 4 bytes behind its fields", data)], Rep.ERR_INVALID)


@INFO_AND_GO.rule("NBD_REP_ERR_UNKNOWN: the chosen export does not exist on this server")
def unknown_export(target: Target) -> None:
    target.need_refused_names()
    _need_info(target)
    for option in (Option.INFO, Option.GO):
        handshake = target.haggle()
        answer = handshake.ask(option, encode_info(UNLIKELY_NAME.encode()))
        require_reply(answer, Rep.ERR_UNKNOWN, Rep.ERR_TLS_REQD)


@INFO_AND_GO.must("the server MUST simply error inbound options: haggling goes on after a refusal")
def refused_then_granted(target: Target) -> None:
    target.need_refused_names()
    _need_info(target)
    handshake = target.haggle()
    for option in (Option.INFO, Option.GO):
        require_error(handshake.ask(option, encode_info(UNLIKELY_NAME.encode())))
    target.go(handshake, Mode.SIMPLE).check_in_step()


@INFO_AND_GO.should("on NBD_REP_ERR_UNKNOWN the server SHOULD NOT send NBD_REP_INFO replies")
def unknown_export_has_no_info(target: Target) -> None:
    target.need_refused_names()
    _need_info(target)
    answer = target.haggle().ask(Option.INFO, encode_info(UNLIKELY_NAME.encode(), _ALL))
    if answer.infos:
        raise Violation("no NBD_REP_INFO", str(answer))


@INFO_AND_GO.rule("a zero length name specifies the default export (if any)")
def empty_name(target: Target) -> None:
    _need_info(target)
    handshake = target.haggle()
    answer = handshake.ask(Option.INFO, encode_info(b""), "''")
    if answer.accepted:
        answer.export()
    check_in_step(handshake)


@INFO_AND_GO.must("the server MUST ignore any information requests it does not understand")
def unknown_requests(target: Target) -> None:
    known = _info(target, Option.INFO, _ALL)
    for unknown in ((4,), (100, 65535), tuple(range(1000, 2500))):
        answer = _info(target, Option.INFO, (*_ALL, *unknown))
        if sorted(answer.infos) != sorted(known.infos):
            raise Violation(f"the same as without unknown requests: {known}", str(answer))


@INFO_AND_GO.rule("a client that repeats an information request gets an answer all the same")
def repeated_requests(target: Target) -> None:
    _need_info(target)
    handshake = target.haggle()
    try:
        handshake.ask(Option.INFO, encode_info(target.name, _ALL * 3), "each request three times")
        check_in_step(handshake)
    except Closed:
        return  # the client MUST NOT


@INFO_AND_GO.must(
    "NBD_OPT_GO with the parameters of a successful NBD_OPT_INFO just before it: the server MUST "
    "reply with the same set of information"
)
def info_then_go(target: Target) -> None:
    _need_info(target)
    for information in ((), (Info.BLOCK_SIZE,), _ALL):
        for mode in target.modes:
            handshake = target.haggle()
            target.negotiate(handshake, mode)
            data = encode_info(target.name, information)
            first = handshake.ask(Option.INFO, data)
            second = handshake.ask(Option.GO, data)
            if first.accepted and (
                not second.accepted or sorted(first.infos) != sorted(second.infos)
            ):
                raise Violation(f"what NBD_OPT_INFO said: {first.infos}", str(second.infos))


@INFO_AND_GO.must("the server MUST NOT send any zero padding bytes after the NBD_REP_ACK of GO")
def no_padding(target: Target) -> None:
    _need_info(target)
    flags = FIXED & target.facts.handshake_flags
    target.go(target.haggle(flags), Mode.SIMPLE).check_in_step()


@INFO_AND_GO.must(
    "the server MUST NOT send NBD_REP_ERR_BLOCK_SIZE_REQD if NBD_INFO_BLOCK_SIZE was requested"
)
def block_size_requested(target: Target) -> None:
    _need_info(target)
    for option in (Option.INFO, Option.GO):
        answer = target.haggle().ask(option, encode_info(target.name, (Info.BLOCK_SIZE,)))
        if answer.final == Rep.ERR_BLOCK_SIZE_REQD:
            raise Violation("any other reply", str(answer))


@INFO_AND_GO.should(
    "the server SHOULD NOT send NBD_REP_ERR_BLOCK_SIZE_REQD if it is using default size "
    "constraints: clients that do not ask for them, like Linux's, are let in"
)
def without_requests(target: Target) -> None:
    _need_info(target)
    target.need(target.facts.minimum_block <= 512, "the smallest block is larger than 512 bytes")
    target.enter(information=()).check_in_step()


# NBD_REP_INFO


@REP_INFO.must("the server MUST send an NBD_INFO_EXPORT before NBD_REP_ACK")
def export(target: Target) -> None:
    for information in ((), _ALL):
        for option in (Option.INFO, Option.GO):
            _info(target, option, information).export()


@REP_INFO.should("a particular information type SHOULD only appear once")
def once(target: Target) -> None:
    for information in (_ALL, (Info.EXPORT, *_ALL)):
        kinds = [kind for kind, _ in _info(target, Option.INFO, information).infos]
        if len(kinds) != len(set(kinds)):
            raise Violation("each type of information once", str(kinds))


@REP_INFO.rule("NBD_INFO_NAME is the name that would appear in the reply to NBD_OPT_LIST")
def name(target: Target) -> None:
    _need_info(target)
    target.need_refused_names()
    handshake = target.haggle()
    listed = [name for name, _ in handshake.ask(Option.LIST).exports]
    target.need(bool(listed), "no export is listed")
    for wanted in listed[:20]:
        data = encode_info(wanted.encode(), (Info.NAME,))
        payload = handshake.ask(Option.INFO, data, repr(wanted)).info(Info.NAME)
        if payload is not None and payload.decode() not in listed:
            raise Violation(f"one of the listed names {listed}", payload.decode())


@REP_INFO.rule("NBD_INFO_DESCRIPTION: a description of the export, suitable for direct display")
def description(target: Target) -> None:
    payload = _info(target).info(Info.DESCRIPTION)
    if payload is None:
        raise Unavailable("NBD_INFO_DESCRIPTION is not sent")
    text = payload.decode()
    if not text.isprintable():
        raise Violation("text that can be displayed", repr(text))


# Size constraints


def _block_size(target: Target) -> tuple[int, int, int]:
    blocks = _info(target).block_size()
    if blocks is None:
        raise Unavailable("NBD_INFO_BLOCK_SIZE is not sent")
    return blocks


@SIZE_CONSTRAINTS.must("the minimum block size MUST be a power of 2, and no larger than 2^16")
def minimum_block(target: Target) -> None:
    minimum, _, _ = _block_size(target)
    if not 0 < minimum <= 1 << 16 or minimum & (minimum - 1):
        raise Violation("a power of 2 from 1 to 65536", str(minimum))


@SIZE_CONSTRAINTS.must(
    "the preferred block size MUST be a power of 2 at least as large as the maximum of the "
    "minimum block size and 2^9"
)
def preferred_block(target: Target) -> None:
    minimum, preferred, _ = _block_size(target)
    if preferred < max(minimum, 512) or preferred & (preferred - 1):
        raise Violation(f"a power of 2, {max(minimum, 512)} or more", str(preferred))


@SIZE_CONSTRAINTS.must(
    "the maximum payload size MUST be at least as large as the preferred block size"
)
def maximum_payload(target: Target) -> None:
    _, preferred, maximum = _block_size(target)
    if maximum < preferred:
        raise Violation(f"{preferred} or more", str(maximum))


@SIZE_CONSTRAINTS.should(
    "the maximum payload size SHOULD be at least 2^20 if the export is that large"
)
def payload_of_a_megabyte(target: Target) -> None:
    _, _, maximum = _block_size(target)
    if maximum < min(1 << 20, target.facts.size):
        raise Violation("1048576 or more", str(maximum))


@SIZE_CONSTRAINTS.should(
    "the advertised export size SHOULD be an integer multiple of the minimum block size"
)
def size_in_blocks(target: Target) -> None:
    minimum, _, _ = _block_size(target)
    if minimum and target.facts.size % minimum:
        raise Violation(f"a multiple of {minimum}", str(target.facts.size))


# Transmission flags


def _flags(target: Target, mode: Mode) -> Flag:
    """What the server says after ``mode`` has been negotiated."""
    _need_info(target)
    handshake: Handshake = target.haggle()
    target.negotiate(handshake, mode)
    answer = handshake.ask(Option.INFO, encode_info(target.name))
    require_reply(answer, Rep.ACK)
    return Flag(answer.export().flags)


@TRANSMISSION_FLAGS.must("bit 0, NBD_FLAG_HAS_FLAGS: MUST always be 1")
def has_flags(target: Target) -> None:
    for mode in target.modes:
        flags = _flags(target, mode)
        if not flags & Flag.HAS_FLAGS:
            raise Violation("NBD_FLAG_HAS_FLAGS", name_flags(Flag, flags))


@TRANSMISSION_FLAGS.must(
    "NBD_FLAG_SEND_DF: the server MUST leave this flag clear if neither structured replies nor "
    "extended headers have been negotiated"
)
def df_without_structured_replies(target: Target) -> None:
    flags = _flags(target, Mode.SIMPLE)
    if flags & Flag.SEND_DF:
        raise Violation("NBD_FLAG_SEND_DF clear", name_flags(Flag, flags))


@TRANSMISSION_FLAGS.must(
    "NBD_FLAG_SEND_FAST_ZERO: the server MUST set it to 0 if NBD_FLAG_SEND_WRITE_ZEROES is not set"
)
def fast_zero_without_write_zeroes(target: Target) -> None:
    for mode in target.modes:
        flags = _flags(target, mode)
        if flags & Flag.SEND_FAST_ZERO and not flags & Flag.SEND_WRITE_ZEROES:
            raise Violation("no NBD_FLAG_SEND_FAST_ZERO", name_flags(Flag, flags))


@TRANSMISSION_FLAGS.must(
    "NBD_FLAG_BLOCK_STATUS_PAYLOAD: servers MUST NOT advertise it unless the client negotiates "
    "extended headers"
)
def payload_without_extended_headers(target: Target) -> None:
    for mode in target.modes:
        flags = _flags(target, mode)
        if mode is not Mode.EXTENDED and flags & Flag.BLOCK_STATUS_PAYLOAD:
            raise Violation("no NBD_FLAG_BLOCK_STATUS_PAYLOAD", name_flags(Flag, flags))


@TRANSMISSION_FLAGS.rule("16 bits of transmission flags, of which 13 to 15 are not defined")
def undefined_bits(target: Target) -> None:
    for mode in target.modes:
        flags = int(_flags(target, mode))
        if flags >> 13:
            raise Violation("bits 13 to 15 clear", f"{flags:#x}")
