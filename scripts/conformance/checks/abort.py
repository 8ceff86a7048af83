"""NBD_OPT_ABORT."""

from __future__ import annotations

from ..check import Section
from ..constants import Option, Rep
from ..target import Target
from .asking import check_in_step, need_fixed, require_reply

ABORT = Section("NBD_OPT_ABORT")


@ABORT.must("the server MUST reply with NBD_REP_ACK")
def acknowledged(target: Target) -> None:
    need_fixed(target)
    handshake = target.haggle()
    handshake.ask(Option.LIST)
    require_reply(handshake.ask(Option.ABORT), Rep.ACK)


@ABORT.should("a server SHOULD ignore any data sent with it rather than rejecting the request")
def with_data(target: Target) -> None:
    need_fixed(target)
    require_reply(target.haggle().ask(Option.ABORT, b"good bye", "with 8 bytes"), Rep.ACK)


@ABORT.should("the server SHOULD gracefully handle a client that closes without awaiting a reply")
def without_waiting(target: Target) -> None:
    need_fixed(target)
    for _ in range(3):
        handshake = target.haggle()
        handshake.send_option(Option.ABORT)
        handshake.connection.close()
    check_in_step(target.haggle())
