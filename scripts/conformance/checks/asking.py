"""What checks of the handshake have in common."""

from __future__ import annotations

from collections.abc import Iterable

from ..constants import Option, Rep
from ..handshake import Answer, Handshake, encode_option
from ..target import FIXED, Target
from ..verdicts import Closed, Violation


def need_fixed(target: Target) -> None:
    """Skip the check on a server that knows no option but EXPORT_NAME."""
    target.need(bool(target.facts.handshake_flags & FIXED), "no fixed newstyle negotiation")


def require_reply(answer: Answer, *wanted: Rep) -> None:
    """The final reply must be one of these."""
    if answer.final not in wanted:
        raise Violation(" or ".join(f"NBD_REP_{kind.name}" for kind in wanted), str(answer))


def require_error(answer: Answer) -> None:
    """The final reply must be an error, whichever."""
    if answer.accepted:
        raise Violation("an error reply", str(answer))


def check_in_step(handshake: Handshake) -> None:
    """The next option must be understood: one without data, whatever it is answered."""
    handshake.ask(Option.LIST)


def check_survives(target: Target, option: int, variants: Iterable[tuple[str, bytes]]) -> None:
    """Malformed options must be answered by an error, or by closing the connection.

    Closing is allowed where the client broke a MUST. Waiting for bytes that were not announced,
    taking them for the next option, or accepting the nonsense is not.
    """
    for what, data in variants:
        handshake = target.haggle()
        handshake.connection.send(
            encode_option(option, data), f"NBD_OPT_{Option(option).name} {what}"
        )
        try:
            answer = handshake.read_answer(option)
            if answer.accepted and option == Option.GO:
                continue  # in the transmission phase now: its own check says what it thinks
            check_in_step(handshake)
        except Closed:
            continue


def check_refused(
    target: Target, option: int, variants: Iterable[tuple[str, bytes]], *wanted: Rep
) -> None:
    """Malformed options must be answered by one of these errors, and the next be understood."""
    for what, data in variants:
        handshake = target.haggle()
        if option in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
            handshake.ask(Option.STRUCTURED_REPLY)
        answer = handshake.ask(option, data, what)
        require_reply(answer, *wanted)
        check_in_step(handshake)
