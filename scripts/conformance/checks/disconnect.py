"""NBD_CMD_DISC and the end of the transmission phase."""

from __future__ import annotations

from ..check import Section
from ..constants import Cmd, CmdFlag, Flag
from ..target import Target
from ..transmission import Mode, Transmission
from ..verdicts import Closed, Violation

DISC = Section("NBD_CMD_DISC")
SOFT_DISCONNECT = Section("Terminating the transmission phase")


def _disconnect(transmission: Transmission) -> None:
    transmission.send(Cmd.DISC)


@DISC.must("the server MUST close the TCP session. There is no reply to an NBD_CMD_DISC")
def closes(target: Target) -> None:
    for mode in target.modes:
        transmission = target.enter(mode)
        _disconnect(transmission)
        transmission.connection.expect_close()


@DISC.must("the server MUST close the TCP session, after requests that have been answered, too")
def closes_after_requests(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.check_in_step()
        _disconnect(transmission)
        transmission.connection.expect_close()


@DISC.must("NBD_CMD_FLAG_FUA: the server MUST accept all commands with this bit set")
def with_fua(target: Target) -> None:
    target.need_flag(Flag.SEND_FUA)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.send(Cmd.DISC, flags=CmdFlag.FUA)
        transmission.connection.expect_close()


@DISC.must("the server MUST handle all outstanding requests: reads are answered before it closes")
def outstanding_reads(target: Target) -> None:
    target.need_size(target.block)
    length = min(64 << 10, target.end)
    for mode in target.modes:
        transmission = target.enter(mode)
        waiting = [transmission.send(Cmd.READ, 0, length) for _ in range(32)]
        _disconnect(transmission)
        _collect(transmission, waiting)
        transmission.connection.expect_close()


_WRITES = 64
_ROUNDS = 32
"""What happens to the last ones is a race in some servers: one round may miss it."""


def _pipeline(target: Target, mode: Mode, fill: int) -> tuple[Transmission, list[int], int]:
    """Writes that are not waited for, and a disconnect behind them."""
    target.need_writable()
    length = max(4 << 10, target.block)
    target.need_size(_WRITES * length)
    transmission = target.enter(mode)
    waiting = [
        transmission.send(Cmd.WRITE, number * length, payload=bytes([fill + number]) * length)
        for number in range(_WRITES)
    ]
    _disconnect(transmission)
    return transmission, waiting, length


def _collect(transmission: Transmission, waiting: list[int]) -> None:
    for number, cookie in enumerate(waiting):
        try:
            reply = transmission.receive(cookie)
        except Closed as closed:
            raise Violation(
                f"{len(waiting)} replies, then the end of the connection",
                f"{closed.came} after {number} replies",
            ) from None
        if reply.error:
            raise Violation("the request to succeed", str(reply))


@DISC.must(
    "the server MUST handle all outstanding requests: writes are done, and visible to the next "
    "client",
    writes=True,
)
def outstanding_writes_are_done(target: Target) -> None:
    for turn, mode in enumerate(target.modes):
        transmission, _, length = _pipeline(target, mode, 1 + 64 * turn)
        transmission.connection.drain("the server to close the connection")
        reader = target.enter()
        for number in range(_WRITES):
            data = reader.succeed(Cmd.READ, number * length, length).data
            if data != bytes([1 + 64 * turn + number]) * length:
                raise Violation(f"all {_WRITES} writes to be done", f"write {number} is not")


@DISC.must("the server MUST handle all outstanding requests: writes are answered", writes=True)
def outstanding_writes_are_answered(target: Target) -> None:
    for mode in target.modes:
        for _ in range(_ROUNDS):
            transmission, waiting, _ = _pipeline(target, mode, 7)
            _collect(transmission, waiting)
            transmission.connection.expect_close()


@DISC.must(
    "the server MUST handle all outstanding requests, also when the client closes its sending side "
    "behind NBD_CMD_DISC",
    writes=True,
)
def half_closed(target: Target) -> None:
    target.need(not target.uri.tls, "TLS has no half-closed connections")
    transmission, waiting, _ = _pipeline(target, Mode.SIMPLE, 9)
    transmission.connection.shut_down_sending()
    _collect(transmission, waiting)
    transmission.connection.expect_close()


@SOFT_DISCONNECT.must(
    "the server MUST close down the TLS session and then close the TCP connection"
)
def tls_is_shut_down(target: Target) -> None:
    target.need(target.uri.tls, "TLS is tried with an nbds:// URI only")
    transmission = target.enter()
    transmission.check_in_step()
    _disconnect(transmission)
    transmission.connection.expect_close()
    if transmission.connection.cut_short:
        raise Violation("close_notify, then the end", "the end of the connection without it")
