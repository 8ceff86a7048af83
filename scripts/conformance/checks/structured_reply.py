"""NBD_OPT_STRUCTURED_REPLY."""

from __future__ import annotations

from ..check import Section
from ..constants import Option, Rep
from ..target import Target
from ..transmission import Mode
from ..verdicts import Unavailable
from .asking import check_in_step, require_reply

STRUCTURED_REPLY = Section("NBD_OPT_STRUCTURED_REPLY")


@STRUCTURED_REPLY.should("the server SHOULD reject a request that includes data with ERR_INVALID")
def with_data(target: Target) -> None:
    target.need(target.facts.structured, "structured replies are not offered")
    handshake = target.haggle()
    answer = handshake.ask(Option.STRUCTURED_REPLY, b"data", "with 4 bytes")
    require_reply(answer, Rep.ERR_INVALID)
    check_in_step(handshake)


@STRUCTURED_REPLY.rule("refused, it has not been negotiated: READ gets a simple reply")
def refused_is_not_negotiated(target: Target) -> None:
    target.need(target.facts.structured, "structured replies are not offered")
    handshake = target.haggle()
    if handshake.ask(Option.STRUCTURED_REPLY, b"data", "with 4 bytes").accepted:
        raise Unavailable("the server accepts it with data")
    target.go(handshake, Mode.SIMPLE).check_in_step()


@STRUCTURED_REPLY.rule("a repeated message is acknowledged, or MAY fail with NBD_REP_ERR_INVALID")
def twice(target: Target) -> None:
    handshake = target.haggle()
    target.negotiate(handshake, Mode.STRUCTURED)
    require_reply(handshake.ask(Option.STRUCTURED_REPLY), Rep.ACK, Rep.ERR_INVALID)
    target.go(handshake, Mode.STRUCTURED).check_in_step()
