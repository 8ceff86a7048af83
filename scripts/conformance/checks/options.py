"""Options in general: section "Baseline", "Conventions", and the withdrawn PEEK_EXPORT."""

from __future__ import annotations

from ..check import Section
from ..constants import MAX_STRING, Info, Option, Rep
from ..handshake import encode_info, encode_option
from ..target import Target
from ..verdicts import Closed, Violation
from .asking import check_in_step, need_fixed, require_reply

BASELINE = Section("Baseline")
FIXED_NEWSTYLE = Section("Fixed newstyle negotiation")
CONVENTIONS = Section("Conventions")
PEEK_EXPORT = Section("NBD_OPT_PEEK_EXPORT")

_UNKNOWN_OPTION = 0x6E6F6E65


@BASELINE.must(
    "servers that receive messages which they do not implement MUST reply to them with "
    "NBD_REP_ERR_UNSUP"
)
def unknown_option(target: Target) -> None:
    need_fixed(target)
    for option in (0, 12, _UNKNOWN_OPTION, 0xFFFFFFFF):
        require_reply(target.haggle().ask(option), Rep.ERR_UNSUP)


@BASELINE.must("servers MUST NOT fail to parse the next message received after an unknown option")
def after_unknown_option(target: Target) -> None:
    need_fixed(target)
    handshake = target.haggle()
    for size in (0, 1, 10, 1000, 4096):
        require_reply(
            handshake.ask(_UNKNOWN_OPTION, b"\xa5" * size, f"with {size} bytes of data"),
            Rep.ERR_UNSUP,
        )
    check_in_step(handshake)


@BASELINE.must("the NBD_OPT_LIST message and its response MUST be implemented")
def list_exports(target: Target) -> None:
    need_fixed(target)
    require_reply(target.haggle().ask(Option.LIST), Rep.ACK, Rep.ERR_POLICY)


@BASELINE.must(
    "the NBD_OPT_INFO and NBD_OPT_GO messages, with the NBD_INFO_EXPORT response, MUST be "
    "implemented"
)
def info_and_go(target: Target) -> None:
    need_fixed(target)
    target.need(not target.facts.refusal, target.facts.refusal)
    for option in (Option.INFO, Option.GO):
        answer = target.haggle().ask(option, encode_info(target.name, (Info.BLOCK_SIZE,)))
        require_reply(answer, Rep.ACK)
        answer.export()


@FIXED_NEWSTYLE.rule(
    "the option length allows the server to skip options: one of 1 MiB is read past and refused, "
    "unless the server takes it for a denial of service and disconnects"
)
def huge_option(target: Target) -> None:
    need_fixed(target)
    for option in (_UNKNOWN_OPTION, Option.INFO, Option.LIST):
        handshake = target.haggle()
        try:
            answer = handshake.ask(option, bytes(1 << 20), "with 1 MiB of data")
            if answer.accepted:
                raise Violation("an error, or the end of the connection", str(answer))
            check_in_step(handshake)
        except Closed:
            continue


@FIXED_NEWSTYLE.rule(
    "32 bits, length of option data: a server that is told of 4 GiB does not keep others waiting"
)
def endless_option(target: Target) -> None:
    need_fixed(target)
    handshake = target.haggle()
    handshake.connection.send(
        encode_option(Option.INFO, b"", 0xFFFFFFFF), "NBD_OPT_INFO, 4 GiB announced, none sent"
    )
    check_in_step(target.haggle())


@FIXED_NEWSTYLE.rule(
    "the client MAY send other options as appropriate: several in a row, each with its own reply"
)
def many_options(target: Target) -> None:
    need_fixed(target)
    handshake = target.haggle()
    for _ in range(50):
        handshake.ask(Option.LIST)


@CONVENTIONS.must("a string MUST be no longer than 4096 bytes: a longer export name is an error")
def name_too_long(target: Target) -> None:
    _refuse_name(target, b"n" * (MAX_STRING + 1))


@CONVENTIONS.must("a string MUST NOT contain NUL characters: an export name with one is an error")
def name_with_nul(target: Target) -> None:
    target.need_refused_names()
    _refuse_name(target, b"no\0export")
    if target.name:
        _refuse_name(target, target.name + b"\0")


@CONVENTIONS.rule("a string is a sequence of UTF-8 code points: an export name that is not: error")
def name_not_utf8(target: Target) -> None:
    target.need_refused_names()
    _refuse_name(target, b"\xff\xfe\xc0\x80")


def _refuse_name(target: Target, name: bytes) -> None:
    """The client broke a MUST itself: so the server may also close the connection."""
    target.need(target.facts.info, "NBD_OPT_INFO is not offered")
    handshake = target.haggle()
    shown = f"name of {len(name)} bytes" if len(name) > 60 else repr(name)
    try:
        answer = handshake.ask(Option.INFO, encode_info(name), shown)
        if answer.accepted:
            raise Violation("an error reply", str(answer))
        check_in_step(handshake)
    except Closed:
        return


@CONVENTIONS.should("a string SHOULD be no longer than 256 bytes: the names of exports")
def listed_names(target: Target) -> None:
    need_fixed(target)
    for name, description in target.haggle().ask(Option.LIST).exports:
        for text in (name, description):
            if len(text.encode()) > 256:
                raise Violation("strings of at most 256 bytes", f"{len(text.encode())} bytes")


@PEEK_EXPORT.must(
    "a withdrawn option is one that is not implemented: servers MUST reply with NBD_REP_ERR_UNSUP"
)
def withdrawn(target: Target) -> None:
    need_fixed(target)
    handshake = target.haggle()
    require_reply(handshake.ask(Option.PEEK_EXPORT, target.name), Rep.ERR_UNSUP)
    check_in_step(handshake)
