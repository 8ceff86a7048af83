"""Options in general, and NBD_OPT_EXPORT_NAME, ABORT, LIST and the withdrawn PEEK_EXPORT."""

from __future__ import annotations

from ..check import Section
from ..constants import MAX_STRING, Flag, Info, Option, Rep
from ..facts import TlsMode
from ..handshake import Handshake, encode_info, encode_option
from ..target import FIXED, NO_ZEROES, UNLIKELY_NAME, Target
from ..transmission import Mode, Transmission
from ..verdicts import Closed, Unavailable, Violation
from .asking import check_in_step, require_reply

BASELINE = Section("Baseline")
FIXED_NEWSTYLE = Section("Fixed newstyle negotiation")
CONVENTIONS = Section("Conventions")
EXPORT_NAME = Section("NBD_OPT_EXPORT_NAME")
ABORT = Section("NBD_OPT_ABORT")
LIST = Section("NBD_OPT_LIST")
PEEK_EXPORT = Section("NBD_OPT_PEEK_EXPORT")

_UNKNOWN_OPTION = 0x6E6F6E65


def _need_fixed(target: Target) -> None:
    target.need(bool(target.facts.handshake_flags & FIXED), "no fixed newstyle negotiation")


@BASELINE.must(
    "servers that receive messages which they do not implement MUST reply to them with "
    "NBD_REP_ERR_UNSUP"
)
def unknown_option(target: Target) -> None:
    _need_fixed(target)
    for option in (0, 12, _UNKNOWN_OPTION, 0xFFFFFFFF):
        require_reply(target.haggle().ask(option), Rep.ERR_UNSUP)


@BASELINE.must("servers MUST NOT fail to parse the next message received after an unknown option")
def after_unknown_option(target: Target) -> None:
    _need_fixed(target)
    handshake = target.haggle()
    for size in (0, 1, 10, 1000, 4096):
        require_reply(
            handshake.ask(_UNKNOWN_OPTION, b"\xa5" * size, f"with {size} bytes of data"),
            Rep.ERR_UNSUP,
        )
    check_in_step(handshake)


@BASELINE.must("the NBD_OPT_ABORT message, and its response, MUST be implemented")
def abort(target: Target) -> None:
    _need_fixed(target)
    require_reply(target.haggle().ask(Option.ABORT), Rep.ACK)


@BASELINE.must("the NBD_OPT_LIST message and its response MUST be implemented")
def list_exports(target: Target) -> None:
    _need_fixed(target)
    require_reply(target.haggle().ask(Option.LIST), Rep.ACK, Rep.ERR_POLICY)


@BASELINE.must(
    "the NBD_OPT_INFO and NBD_OPT_GO messages, with the NBD_INFO_EXPORT response, MUST be "
    "implemented"
)
def info_and_go(target: Target) -> None:
    _need_fixed(target)
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
    _need_fixed(target)
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
    _need_fixed(target)
    handshake = target.haggle()
    handshake.connection.send(
        encode_option(Option.INFO, b"", 0xFFFFFFFF), "NBD_OPT_INFO, 4 GiB announced, none sent"
    )
    check_in_step(target.haggle())


@FIXED_NEWSTYLE.rule(
    "the client MAY send other options as appropriate: several in a row, each with its own reply"
)
def many_options(target: Target) -> None:
    _need_fixed(target)
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
    _need_fixed(target)
    for name, description in target.haggle().ask(Option.LIST).exports:
        for text in (name, description):
            if len(text.encode()) > 256:
                raise Violation("strings of at most 256 bytes", f"{len(text.encode())} bytes")


# EXPORT_NAME


def _open_by_name(target: Target, name: bytes, client_flags: int | None = None) -> Handshake:
    target.need(not target.facts.refusal, target.facts.refusal)
    handshake = target.haggle(client_flags)
    handshake.send_option(Option.EXPORT_NAME, name)
    return handshake


def _transmit(target: Target, handshake: Handshake) -> Transmission:
    export = handshake.read_export()
    return target.transmit(handshake, Mode.SIMPLE, export, {})


@EXPORT_NAME.must(
    "if NBD_FLAG_C_NO_ZEROES is set, the server MUST NOT send the 124 bytes of zeroes"
)
def no_zeroes(target: Target) -> None:
    target.need(bool(target.facts.handshake_flags & NO_ZEROES), "NBD_FLAG_NO_ZEROES is not set")
    _transmit(target, _open_by_name(target, target.name, FIXED | NO_ZEROES)).check_in_step()


@EXPORT_NAME.rule("124 bytes, zeroes (reserved), unless NBD_FLAG_C_NO_ZEROES was negotiated")
def zeroes(target: Target) -> None:
    transmission = _transmit(target, _open_by_name(target, target.name, FIXED))
    reserved = transmission.connection.receive(124, "124 reserved bytes")
    if reserved.strip(b"\0"):
        raise Violation("124 zeroes", reserved.hex(" "))
    transmission.check_in_step()


@EXPORT_NAME.rule("NBD_INFO_EXPORT describes the same information that is sent to EXPORT_NAME")
def same_as_info(target: Target) -> None:
    target.need(target.facts.info, "NBD_OPT_INFO is not offered")
    export = _open_by_name(target, target.name).read_export()
    if (export.size, export.flags) != (target.facts.size, target.facts.plain_flags):
        raise Violation(
            f"size {target.facts.size}, flags {int(target.facts.plain_flags):#x}",
            f"size {export.size}, flags {export.flags:#x}",
        )


@EXPORT_NAME.must("if the chosen export does not exist, the server MUST terminate the session")
def unknown_name(target: Target) -> None:
    target.need_refused_names()
    _open_by_name(target, UNLIKELY_NAME.encode()).connection.expect_close()


@EXPORT_NAME.must(
    "a server unwilling to allow the export MUST terminate the session: a name over 4096 bytes"
)
def name_too_long_for_export_name(target: Target) -> None:
    _open_by_name(target, b"n" * 5000).connection.expect_close()


@EXPORT_NAME.rule("an empty name is reserved for a default export: it is opened or refused")
def empty_name(target: Target) -> None:
    handshake = _open_by_name(target, b"")
    try:
        export = handshake.read_export()
    except Closed:
        return
    if not export.flags & Flag.HAS_FLAGS:
        raise Violation("transmission flags with NBD_FLAG_HAS_FLAGS", f"{export.flags:#x}")


@EXPORT_NAME.rule("this is the only valid option in nonfixed newstyle negotiation: it works")
def without_fixed_newstyle(target: Target) -> None:
    target.need(
        target.facts.tls is not TlsMode.FORCED,
        "the server insists on TLS, which wants fixed newstyle",
    )
    target.need(not target.facts.refusal, target.facts.refusal)
    handshake = target.greet(0)
    handshake.send_option(Option.EXPORT_NAME, target.name)
    transmission = _transmit(target, handshake)
    transmission.connection.receive(124, "124 reserved bytes")
    transmission.check_in_step()


@EXPORT_NAME.rule("EXPORT_NAME chooses the export and ends haggling, after structured replies too")
def with_structured_replies(target: Target) -> None:
    target.need(not target.facts.refusal, target.facts.refusal)
    handshake = target.haggle()
    target.negotiate(handshake, Mode.STRUCTURED)
    handshake.send_option(Option.EXPORT_NAME, target.name)
    export = handshake.read_export()
    if not handshake.flags & NO_ZEROES:
        handshake.connection.receive(124, "124 reserved bytes")
    target.transmit(handshake, Mode.STRUCTURED, export, {}).check_in_step()


# ABORT, LIST, PEEK_EXPORT


@ABORT.must("the server MUST reply with NBD_REP_ACK")
def acknowledged(target: Target) -> None:
    _need_fixed(target)
    handshake = target.haggle()
    handshake.ask(Option.LIST)
    require_reply(handshake.ask(Option.ABORT), Rep.ACK)


@ABORT.should("a server SHOULD ignore any data sent with it rather than rejecting the request")
def with_data(target: Target) -> None:
    _need_fixed(target)
    require_reply(target.haggle().ask(Option.ABORT, b"good bye", "with 8 bytes"), Rep.ACK)


@ABORT.should("the server SHOULD gracefully handle a client that closes without awaiting a reply")
def without_waiting(target: Target) -> None:
    _need_fixed(target)
    for _ in range(3):
        handshake = target.haggle()
        handshake.send_option(Option.ABORT)
        handshake.connection.close()
    check_in_step(target.haggle())


@LIST.should("the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID")
def list_with_data(target: Target) -> None:
    _need_fixed(target)
    handshake = target.haggle()
    require_reply(handshake.ask(Option.LIST, b"data", "with 4 bytes"), Rep.ERR_INVALID)
    check_in_step(handshake)


@LIST.rule("NBD_REP_SERVER holds the name of an export, as expected by EXPORT_NAME, INFO or GO")
def names_are_known(target: Target) -> None:
    target.need(target.facts.info, "NBD_OPT_INFO is not offered")
    handshake = target.haggle()
    listed = handshake.ask(Option.LIST)
    if not listed.exports:
        raise Unavailable(f"no export is listed: {listed}")
    for name, _ in listed.exports[:20]:
        answer = handshake.ask(Option.INFO, encode_info(name.encode()), repr(name))
        if answer.final in (Rep.ERR_UNKNOWN, Rep.ERR_INVALID):
            raise Violation(f"the listed export {name!r} to be known", str(answer))


@PEEK_EXPORT.must(
    "a withdrawn option is one that is not implemented: servers MUST reply with NBD_REP_ERR_UNSUP"
)
def withdrawn(target: Target) -> None:
    _need_fixed(target)
    handshake = target.haggle()
    require_reply(handshake.ask(Option.PEEK_EXPORT, target.name), Rep.ERR_UNSUP)
    check_in_step(handshake)
