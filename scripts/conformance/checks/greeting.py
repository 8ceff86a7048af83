"""Sections "Newstyle negotiation", "Handshake flags", "Client flags"."""

from __future__ import annotations

import struct

from ..check import Section
from ..constants import INIT_PASSWD, OLDSTYLE_MAGIC, OPTION_MAGIC, Option
from ..handshake import Handshake
from ..target import FIXED, NO_ZEROES, Target
from ..verdicts import Closed, Unavailable, Violation

NEWSTYLE = Section("Newstyle negotiation")
HANDSHAKE_FLAGS = Section("Handshake flags")
CLIENT_FLAGS = Section("Client flags")


def _server_flags(target: Target) -> int:
    flags: int = Handshake(target.connect()).flags
    return flags


@NEWSTYLE.must("Baseline: the fixed newstyle handshake MUST be implemented: NBDMAGIC, IHAVEOPT")
def greeting(target: Target) -> None:
    """Not through Handshake: it would take an oldstyle server for one that cannot be checked."""
    expected = "NBDMAGIC and IHAVEOPT"
    magic, style = struct.unpack(">QQ", target.connect().receive(16, expected))
    if (magic, style) == (INIT_PASSWD, OLDSTYLE_MAGIC):
        raise Violation(expected, "an oldstyle greeting")
    if (magic, style) != (INIT_PASSWD, OPTION_MAGIC):
        raise Violation(expected, struct.pack(">QQ", magic, style).hex(" "))


@NEWSTYLE.rule("the server sends handshake flags, then waits for the client's")
def nothing_before_the_clients_flags(target: Target) -> None:
    handshake = Handshake(target.connect())
    data = handshake.connection.received_anything(0.05)
    if data:
        raise Violation("nothing more before the client's flags", data.hex(" "))


@HANDSHAKE_FLAGS.must(
    "NBD_FLAG_FIXED_NEWSTYLE MUST be set by servers that support the fixed newstyle protocol"
)
def fixed_newstyle(target: Target) -> None:
    flags = _server_flags(target)
    if not flags & FIXED:
        raise Violation("handshake flags with bit 0", f"{flags:#x}")


@HANDSHAKE_FLAGS.must("the server MUST NOT set any other flags")
def no_others(target: Target) -> None:
    flags = _server_flags(target)
    if flags & ~(FIXED | NO_ZEROES):
        raise Violation("no flags but bits 0 and 1", f"{flags:#x}")


@CLIENT_FLAGS.must("the server MUST drop the TCP connection if the client sets an unknown flag")
def unknown(target: Target) -> None:
    for bit in (2, 7, 16, 31):
        handshake = target.greet(FIXED | 1 << bit)
        _expect_dropped(handshake)


@CLIENT_FLAGS.must(
    "the server MUST drop the TCP connection if the client sets a flag that does not match "
    "something advertised by the server"
)
def not_advertised(target: Target) -> None:
    flags = target.facts.handshake_flags
    absent = (FIXED | NO_ZEROES) & ~flags
    if not absent:
        raise Unavailable("the server advertises both flags")
    _expect_dropped(target.greet(absent))


def _expect_dropped(handshake: Handshake) -> None:
    handshake.send_option(Option.LIST)
    try:
        answer = handshake.read_answer(Option.LIST)
    except Closed:
        return
    raise Violation("the server to close the connection", f"an answer to NBD_OPT_LIST: {answer}")
