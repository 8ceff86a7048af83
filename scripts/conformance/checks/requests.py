"""Requests in general: cookies, order, unknown commands and flags, error values, magic numbers."""

from __future__ import annotations

import contextlib
import random
import time

from ..check import Section
from ..constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Cmd,
    CmdFlag,
    Errno,
    Flag,
    name_of,
)
from ..target import Target
from ..transmission import Mode, Transmission
from ..verdicts import Closed, Silent, Unavailable, Violation

TRANSMISSION = Section("Transmission")
REQUEST_MESSAGE = Section("Request message")
STRUCTURED_CHUNK = Section("Structured reply chunk message")
COMMAND_FLAGS = Section("Command flags")
ERROR_VALUES = Section("Error values")
RESIZE = Section("NBD_CMD_RESIZE")
TERMINATING = Section("Terminating the transmission phase")

UNKNOWN_COMMAND = 0x6E6F
UNKNOWN_FLAG = 1 << 15


def commands(target: Target) -> list[int]:
    """Commands without payload that the export offers and that change nothing."""
    offered = [int(Cmd.READ)]
    offered += [Cmd.FLUSH] if target.facts.flags & Flag.SEND_FLUSH else []
    offered += [Cmd.CACHE] if target.facts.flags & Flag.SEND_CACHE else []
    return offered


def length_of(target: Target, command: int) -> int:
    """A length that a command may have."""
    return 0 if command == Cmd.FLUSH else target.block


@TRANSMISSION.must(
    "the server MUST use the same value for cookie as was sent by the client, treating it as an "
    "opaque field"
)
def cookies(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        for cookie in (0, 1, 1 << 63, (1 << 64) - 1, 0x0102030405060708, 0x2560951367446698):
            transmission.succeed(Cmd.READ, 0, target.block, cookie=cookie)
        transmission.refuse((Errno.EINVAL,), UNKNOWN_COMMAND, cookie=(1 << 64) - 1)


@TRANSMISSION.must("every one of 200 pipelined requests gets a reply with its cookie")
def pipelined(target: Target) -> None:
    target.need_size(target.block)
    blocks = min(target.end // target.block, 64)
    for mode in target.modes:
        transmission = target.enter(mode)
        order = random.Random(1)
        waiting = [
            transmission.send(Cmd.READ, target.block * order.randrange(blocks), target.block)
            for _ in range(200)
        ]
        order.shuffle(waiting)
        for cookie in waiting:
            reply = transmission.receive(cookie)
            if reply.error:
                raise Violation("NBD_CMD_READ to succeed", str(reply))


@TRANSMISSION.rule("a request may come in pieces: a header of which the rest is a moment late")
def header_in_pieces(target: Target) -> None:
    target.need_size(target.block)
    transmission = target.enter()
    cookie = transmission.send(Cmd.READ, 0, target.block)
    transmission.receive(cookie)
    header = REQUEST_MAGIC.to_bytes(4, "big") + bytes(4) + (7).to_bytes(8, "big") + bytes(8)
    header += target.block.to_bytes(4, "big")
    for start in range(0, len(header), 5):
        transmission.connection.send(header[start : start + 5], "5 bytes of NBD_CMD_READ")
    expected = "the reply to a request that came in pieces"
    reply = transmission.connection.receive(16 + target.block, expected)
    if reply[8:16] != (7).to_bytes(8, "big"):
        raise Violation("a reply with the cookie 7", reply[:16].hex(" "))


@REQUEST_MESSAGE.rule(
    "32 bits, 0x25609513, magic: what begins otherwise is no request, and where the next one "
    "begins is not known. The server disconnects"
)
def wrong_magic(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.check_in_step()
        transmission.send(Cmd.READ, 0, target.block, magic=0x25609514)
        transmission.send(Cmd.READ, 0, target.block)
        transmission.connection.expect_close()


@REQUEST_MESSAGE.rule("the magic is that of the kind of headers that was negotiated, no other's")
def magic_of_other_headers(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        other = REQUEST_MAGIC if mode is Mode.EXTENDED else EXTENDED_REQUEST_MAGIC
        transmission = target.enter(mode)
        transmission.check_in_step()
        transmission.send(Cmd.READ, 0, target.block, magic=other)
        transmission.connection.expect_close()


@STRUCTURED_CHUNK.must(
    "the server MUST NOT use a simple reply for NBD_CMD_READ (even for an early NBD_EINVAL)"
)
def error_of_a_read(target: Target) -> None:
    transmission = target.enter(Mode.STRUCTURED)
    for offset, flags in ((0, UNKNOWN_FLAG), (target.facts.size, 0)):
        reply = transmission.call(Cmd.READ, offset, target.block, flags=flags)
        if not reply.error:
            raise Violation("an error", str(reply))
    transmission.check_in_step()


@STRUCTURED_CHUNK.should("the server SHOULD prefer sending errors via a structured reply")
def errors_are_structured(target: Target) -> None:
    transmission = target.enter(Mode.STRUCTURED)
    reply = transmission.call(UNKNOWN_COMMAND)
    if reply.simple:
        raise Violation("a structured reply", f"a simple one: {reply}")


@STRUCTURED_CHUNK.rule("so the error can be accompanied by a string payload to present to a user")
def errors_have_a_text(target: Target) -> None:
    transmission = target.enter(Mode.STRUCTURED)
    reply = transmission.call(Cmd.READ, target.facts.size, target.block)
    if not reply.error:
        raise Violation("an error", str(reply))
    if not reply.text:
        raise Violation("an error with a message", f"{reply} without one")


@COMMAND_FLAGS.must(
    "NBD_CMD_FLAG_FUA: if NBD_FLAG_SEND_FUA has been negotiated the server MUST accept all "
    "commands with this bit set"
)
def fua(target: Target) -> None:
    target.need_flag(Flag.SEND_FUA)
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        for command in commands(target):
            plain = transmission.call(command, 0, length_of(target, command))
            reply = transmission.call(command, 0, length_of(target, command), flags=CmdFlag.FUA)
            if reply.error and not plain.error:
                name = name_of(Cmd, command, "NBD_CMD_")
                raise Violation(f"{name} with NBD_CMD_FLAG_FUA to succeed", str(reply))


@COMMAND_FLAGS.must(
    "NBD_CMD_FLAG_FUA: the server MUST accept all commands with this bit set: NBD_CMD_WRITE, "
    "NBD_CMD_TRIM and NBD_CMD_WRITE_ZEROES",
    writes=True,
)
def fua_of_writes(target: Target) -> None:
    target.need_flag(Flag.SEND_FUA)
    target.need_writable()
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.succeed(Cmd.WRITE, payload=b"w" * target.block, flags=CmdFlag.FUA)
        if target.facts.flags & Flag.SEND_WRITE_ZEROES:
            transmission.succeed(Cmd.WRITE_ZEROES, 0, target.block, flags=CmdFlag.FUA)
        if target.facts.flags & Flag.SEND_TRIM:
            transmission.succeed(Cmd.TRIM, 0, target.block, flags=CmdFlag.FUA)


@ERROR_VALUES.should("the server SHOULD return NBD_EINVAL if it receives an unknown command")
def unknown_command(target: Target) -> None:
    for mode in target.modes:
        transmission = target.enter(mode)
        for command in (9, UNKNOWN_COMMAND, 0xFFFF):
            transmission.refuse((Errno.EINVAL,), command, 0, target.block)


@ERROR_VALUES.should("the server SHOULD return NBD_EINVAL if it receives an unknown command flag")
def unknown_flag(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        for command in commands(target):
            for flag in (1 << 6, 1 << 9, UNKNOWN_FLAG):
                transmission.refuse(
                    (Errno.EINVAL,), command, 0, length_of(target, command), flags=flag
                )


@ERROR_VALUES.should(
    "it SHOULD return NBD_EINVAL for a flag not documented as applicable to the given request"
)
def flag_of_another_command(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        for command in commands(target):
            for flag in (CmdFlag.NO_HOLE, CmdFlag.REQ_ONE, CmdFlag.FAST_ZERO):
                transmission.refuse(
                    (Errno.EINVAL,), command, 0, length_of(target, command), flags=flag
                )


@ERROR_VALUES.should(
    "it SHOULD return NBD_EINVAL for a flag not documented as applicable: NBD_CMD_FLAG_DF where "
    "NBD_FLAG_SEND_DF is not advertised"
)
def df_not_advertised(target: Target) -> None:
    target.need_size(target.block)
    transmission = target.enter()
    if transmission.export.flags & Flag.SEND_DF:
        raise Unavailable("it is advertised")
    transmission.refuse((Errno.EINVAL,), Cmd.READ, 0, target.block, flags=CmdFlag.DF)


@ERROR_VALUES.should(
    "it SHOULD return NBD_EINVAL for a flag not documented as applicable: NBD_CMD_FLAG_PAYLOAD_LEN "
    "without extended headers"
)
def payload_len_without_extended_headers(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        if mode is not Mode.EXTENDED:
            target.enter(mode).refuse(
                (Errno.EINVAL,), Cmd.READ, 0, target.block, flags=CmdFlag.PAYLOAD_LEN
            )


@RESIZE.should("RESIZE, which is experimental, is an unknown command where it is not advertised")
def not_advertised(target: Target) -> None:
    target.need(not target.facts.flags & Flag.SEND_RESIZE, "NBD_FLAG_SEND_RESIZE is advertised")
    for mode in target.modes:
        # To the size that it has, in case it is done all the same.
        target.enter(mode).refuse((Errno.EINVAL,), Cmd.RESIZE, target.facts.size, 0)


@TERMINATING.must(
    "the server MUST NOT initiate any form of disconnect other than for a violation: another "
    "client's that ends in the midst of a request is none"
)
def client_that_vanishes(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        other = target.enter(mode)
        for sent in (5, 27):
            vanishing = target.enter(mode)
            vanishing.connection.send(b"%\x60\x95\x13" + bytes(sent - 4), f"{sent} bytes")
            vanishing.connection.close()
        vanishing = target.enter(mode)
        for _ in range(20):
            vanishing.send(Cmd.READ, 0, min(1 << 20, target.end), reading=False)
        vanishing.connection.close()
        _watch(other)


@TERMINATING.must(
    "the server MUST NOT initiate any form of disconnect other than for a violation: a client that "
    "does not read its replies, and then goes, is none to others; nor do they wait for it"
)
def client_that_does_not_read(target: Target) -> None:
    target.need_size(target.block)
    other = target.enter()
    for _ in range(4):
        stuck = target.enter()
        with contextlib.suppress(Closed, Silent):
            for _ in range(64):
                stuck.send(Cmd.READ, 0, min(1 << 20, target.end), reading=False)
        other.check_in_step()
        late = target.enter()
        late.check_in_step()
        for going in (late, stuck):
            going.connection.close()
        _watch(other)


def _watch(other: Transmission) -> None:
    """It may take a server a while to stumble over a client that has gone."""
    for _ in range(20):
        other.check_in_step()
        time.sleep(0.01)
