"""NBD_OPT_LIST."""

from __future__ import annotations

from ..check import Section
from ..constants import Option, Rep
from ..handshake import encode_info
from ..target import Target
from ..verdicts import Unavailable, Violation
from .asking import check_in_step, need_fixed, require_reply

LIST = Section("NBD_OPT_LIST")


@LIST.should("the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID")
def with_data(target: Target) -> None:
    need_fixed(target)
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
