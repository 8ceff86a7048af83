"""NBD_OPT_EXPORT_NAME."""

from __future__ import annotations

from ..check import Section
from ..constants import Flag, Option
from ..facts import TlsMode
from ..handshake import Handshake
from ..target import FIXED, NO_ZEROES, UNLIKELY_NAME, Target
from ..transmission import Mode, Transmission
from ..verdicts import Closed, Violation

EXPORT_NAME = Section("NBD_OPT_EXPORT_NAME")


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
    transmission = _transmit(
        target, _open_by_name(target, target.name, FIXED & target.facts.handshake_flags)
    )
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
def name_too_long(target: Target) -> None:
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
    # The export may be there with TLS only, on a server that does not insist on it for others.
    target.need(not target.uri.tls, "TLS wants fixed newstyle")
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
    handshake.read_reserved()
    target.transmit(handshake, Mode.STRUCTURED, export, {}).check_in_step()
