"""Section "TLS support": the three modes of a server, and what becomes of a connection in TLS."""

from __future__ import annotations

import ssl

from ..check import Section
from ..constants import Cmd, Flag, Info, Option, Rep
from ..facts import TlsMode
from ..handshake import Handshake, encode_info, encode_option, encode_queries
from ..target import Target
from ..transmission import Mode
from ..verdicts import Closed, Silent, Unavailable, Violation
from .asking import check_in_step, need_fixed, require_error, require_reply

NOTLS = Section("NOTLS mode")
FORCEDTLS = Section("FORCEDTLS mode")
SELECTIVETLS = Section("SELECTIVETLS mode")
STARTTLS = Section("NBD_OPT_STARTTLS")
TLS_VERSIONS = Section("TLS versions")

_UNKNOWN_OPTION = 0x6E6F6E65


def _need_mode(target: Target, *modes: TlsMode) -> None:
    need_fixed(target)
    names = " or ".join(mode.value for mode in modes)
    target.need(
        target.facts.tls in modes, f"the server is in {target.facts.tls.value}, not {names}"
    )


def _need_tls(target: Target) -> None:
    target.need(target.facts.tls is not TlsMode.NOTLS, "the server does not offer TLS")
    target.need(target.uri.tls, "TLS is tried with an nbds:// URI only")


def _options(target: Target) -> list[tuple[int, bytes]]:
    """Every option that may be answered without TLS."""
    return [
        (Option.LIST, b""),
        (Option.INFO, encode_info(target.name, (Info.BLOCK_SIZE,))),
        (Option.STRUCTURED_REPLY, b""),
        (Option.LIST_META_CONTEXT, encode_queries(target.name)),
        (Option.SET_META_CONTEXT, encode_queries(target.name)),
        (Option.EXTENDED_HEADERS, b""),
        (Option.PEEK_EXPORT, b""),
        (_UNKNOWN_OPTION, b"data"),
    ]


# Without TLS


@NOTLS.must(
    "the server MUST respond to STARTTLS with NBD_REP_ERR_POLICY, NBD_REP_ERR_UNSUP or another "
    "error explicitly permitted"
)
def starttls_refused(target: Target) -> None:
    _need_mode(target, TlsMode.NOTLS)
    handshake = target.haggle()
    answer = handshake.ask(Option.STARTTLS)
    require_reply(answer, Rep.ERR_POLICY, Rep.ERR_UNSUP, Rep.ERR_PLATFORM, Rep.ERR_SHUTDOWN)
    check_in_step(handshake)


@NOTLS.must("the server MUST NOT respond to any option request with NBD_REP_ERR_TLS_REQD")
def tls_is_never_required(target: Target) -> None:
    _need_mode(target, TlsMode.NOTLS)
    _forbid_tls_required(target, target.haggle(), _options(target))


def _forbid_tls_required(
    target: Target, handshake: Handshake, options: list[tuple[int, bytes]]
) -> None:
    for option, data in options:
        answer = handshake.ask(option, data)
        if answer.final == Rep.ERR_TLS_REQD:
            raise Violation("any reply but NBD_REP_ERR_TLS_REQD", str(answer))


# FORCEDTLS, before TLS


@FORCEDTLS.must(
    "if the server receives any other option, including unsupported ones, it MUST reply with "
    "NBD_REP_ERR_TLS_REQD if TLS has not been initiated"
)
def every_option(target: Target) -> None:
    _need_mode(target, TlsMode.FORCED)
    handshake = target.greet()
    for option, data in _options(target):
        require_reply(handshake.ask(option, data), Rep.ERR_TLS_REQD)


@FORCEDTLS.must(
    "NBD_OPT_GO before TLS: it MUST error with NBD_REP_ERR_TLS_REQD, without NBD_REP_INFO"
)
def go(target: Target) -> None:
    _need_mode(target, TlsMode.FORCED)
    handshake = target.greet()
    for name in (target.name, b"", b"nobody"):
        answer = handshake.ask(Option.GO, encode_info(name))
        require_reply(answer, Rep.ERR_TLS_REQD)
        if answer.infos:
            raise Violation("no NBD_REP_INFO", str(answer))


@FORCEDTLS.must(
    "NBD_OPT_EXPORT_NAME before TLS: as this cannot error, it MUST terminate the session"
)
def export_name(target: Target) -> None:
    _need_mode(target, TlsMode.FORCED)
    handshake = target.greet()
    handshake.send_option(Option.EXPORT_NAME, target.name)
    handshake.connection.expect_close()


@FORCEDTLS.must("options other than STARTTLS or ABORT are errors: ABORT is acknowledged before TLS")
def abort(target: Target) -> None:
    _need_mode(target, TlsMode.FORCED)
    require_reply(target.greet().ask(Option.ABORT), Rep.ACK)


@SELECTIVETLS.must(
    "the server MUST NOT send NBD_REP_ERR_TLS_REQD in response to any option other than INFO, GO "
    "and EXPORT_NAME"
)
def only_for_exports(target: Target) -> None:
    _need_mode(target, TlsMode.SELECTIVE)
    options = [item for item in _options(target) if item[0] != Option.INFO]
    _forbid_tls_required(target, target.greet(), options)


# STARTTLS itself


@STARTTLS.must("the server MUST either reply with NBD_REP_ACK or an error: to one with data, too")
def with_data(target: Target) -> None:
    need_fixed(target)
    handshake = target.greet()
    try:
        answer = handshake.ask(Option.STARTTLS, b"data", "with 4 bytes")
        require_error(answer)
        check_in_step(handshake)
    except Closed:
        return  # the client MUST NOT send data


@STARTTLS.must("a server MUST operate in NOTLS mode unless the client replied with FIXED_NEWSTYLE")
def without_fixed_newstyle(target: Target) -> None:
    _need_mode(target, TlsMode.SELECTIVE, TlsMode.FORCED)
    handshake = target.greet(0)
    try:
        require_error(handshake.ask(Option.STARTTLS))
    except Closed:
        return


@STARTTLS.must("if the TLS handshake is unsuccessful the server MUST terminate the session")
def failed_handshake(target: Target) -> None:
    _need_mode(target, TlsMode.SELECTIVE, TlsMode.FORCED)
    handshake = target.greet()
    require_reply(handshake.ask(Option.STARTTLS), Rep.ACK)
    handshake.connection.send(b"this is no TLS handshake " * 20, "500 bytes that are not TLS")
    rest = handshake.connection.drain("the server to close the connection")
    if rest[:1] not in (b"", b"\x15"):  # nothing, or a TLS alert
        raise Violation("a TLS alert, or the end of the connection", rest[:40].hex(" "))


@STARTTLS.must(
    "after NBD_REP_ACK all further data MUST be sent and received over TLS: what came in plain "
    "text behind STARTTLS is not taken for an option"
)
def plain_text_behind(target: Target) -> None:
    _need_tls(target)
    handshake = target.greet()
    both = encode_option(Option.STARTTLS, b"") + encode_option(Option.STRUCTURED_REPLY, b"")
    handshake.connection.send(both, "NBD_OPT_STARTTLS and NBD_OPT_STRUCTURED_REPLY at once")
    try:
        answer = handshake.read_answer(Option.STARTTLS)
        if not answer.accepted:
            return
        target.start_tls(handshake)
        handshake.send_option(Option.LIST)
        handshake.read_answer(Option.LIST)
        target.go(handshake, Mode.SIMPLE).check_in_step()
    except (Closed, Silent):
        return
    except Violation as violation:
        if violation.expected == "a TLS handshake":
            return
        raise


@STARTTLS.must("after TLS has been negotiated, the server MUST reply to STARTTLS with ERR_INVALID")
def second(target: Target) -> None:
    _need_tls(target)
    handshake = target.haggle()
    require_reply(handshake.ask(Option.STARTTLS), Rep.ERR_INVALID)
    check_in_step(handshake)


@STARTTLS.must("the server MUST NOT send NBD_REP_ERR_TLS_REQD if TLS has already been initiated")
def tls_is_not_required_again(target: Target) -> None:
    _need_tls(target)
    _forbid_tls_required(target, target.haggle(), _options(target))


_FORGOTTEN = "when STARTTLS succeeds, the server MUST NOT preserve any negotiation state: "


def _need_state_before_tls(target: Target) -> None:
    _need_tls(target)
    target.need(
        target.facts.tls is TlsMode.SELECTIVE, "nothing can be negotiated before TLS in FORCEDTLS"
    )


@STARTTLS.must(_FORGOTTEN + "NBD_OPT_STRUCTURED_REPLY")
def structured_replies_forgotten(target: Target) -> None:
    _need_state_before_tls(target)
    handshake = target.greet()
    target.negotiate(handshake, Mode.STRUCTURED)
    target.upgrade(handshake)
    transmission = target.go(handshake, Mode.SIMPLE)
    if transmission.export.flags & Flag.SEND_DF:
        raise Violation("no NBD_FLAG_SEND_DF", "it")
    transmission.check_in_step()


@STARTTLS.must(_FORGOTTEN + "NBD_OPT_EXTENDED_HEADERS")
def extended_headers_forgotten(target: Target) -> None:
    _need_state_before_tls(target)
    handshake = target.greet()
    target.negotiate(handshake, Mode.EXTENDED)
    target.upgrade(handshake)
    target.go(handshake, Mode.SIMPLE).check_in_step()


@STARTTLS.must(_FORGOTTEN + "metadata contexts")
def contexts_forgotten(target: Target) -> None:
    _need_state_before_tls(target)
    name = target.need_context()
    target.need_size(512)
    mode = target.modes[-1]
    handshake = target.greet()
    target.negotiate(handshake, mode)
    try:
        target.choose_contexts(handshake, (name,))
    except Violation as violation:
        raise Unavailable(f"contexts cannot be chosen without TLS: {violation}") from None
    target.upgrade(handshake)
    target.negotiate(handshake, mode)
    transmission = target.go(handshake, mode)
    if not transmission.call(Cmd.BLOCK_STATUS, 0, target.block).error:
        raise Violation("an error: no context has been chosen in TLS", "success")


@TLS_VERSIONS.must("NBD implementations supporting TLS MUST support TLS version 1.2")
def tls_1_2(target: Target) -> None:
    _try_version(target, ssl.TLSVersion.TLSv1_2, "TLSv1.2")


@TLS_VERSIONS.should("and SHOULD support any later versions")
def tls_1_3(target: Target) -> None:
    _need_tls(target)
    target.need(ssl.HAS_TLSv1_3, "this Python has no TLS 1.3")
    _try_version(target, None, "TLSv1.3")


def _try_version(target: Target, highest: ssl.TLSVersion | None, wanted: str) -> None:
    _need_tls(target)
    handshake = target.greet()
    target.upgrade(handshake, highest)
    check_in_step(handshake)
    if handshake.connection.tls_version != wanted:
        raise Violation(wanted, handshake.connection.tls_version)
