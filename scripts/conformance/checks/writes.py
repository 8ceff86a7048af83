"""NBD_CMD_WRITE and NBD_CMD_FLUSH, refused writes, read-only exports, several connections."""

from __future__ import annotations

from ..check import Section
from ..constants import DEFAULT_MAX_PAYLOAD, Cmd, CmdFlag, Errno, Flag, name_of
from ..target import Target
from ..transmission import Mode, Transmission
from ..verdicts import Closed, Violation
from .ranges import beyond_the_end, overflowing, unaligned
from .requests import UNKNOWN_FLAG

WRITE = Section("NBD_CMD_WRITE")
FLUSH = Section("NBD_CMD_FLUSH")
ERROR_VALUES = Section("Error values")
READ_ONLY = Section("NBD_FLAG_READ_ONLY")
MULTI_CONN = Section("NBD_FLAG_CAN_MULTI_CONN")

# What a payload that is not read past would be taken for: requests to disconnect.
_BAIT = bytes.fromhex("25609513 0000 0002") + bytes(20)


def payload(length: int) -> bytes:
    """A payload of which every part looks like a request to disconnect."""
    return (_BAIT * (length // len(_BAIT) + 1))[:length]


def _need(target: Target, size: int) -> None:
    target.need_writable()
    target.need_size(size)


def _require_data(transmission: Transmission, offset: int, data: bytes) -> None:
    if transmission.succeed(Cmd.READ, offset, len(data)).data != data:
        raise Violation(f"the {len(data)} bytes written at {offset}", "other data")


@WRITE.must("the server MUST write the data to disk, and then send the reply message", writes=True)
def reads_back(target: Target) -> None:
    _need(target, 2 * target.block)
    for number, mode in enumerate(target.modes):
        transmission = target.enter(mode)
        for offset in (0, target.end - 2 * target.block):
            data = bytes([65 + number]) * target.block + bytes([97 + number]) * target.block
            transmission.succeed(Cmd.WRITE, offset, payload=data)
            _require_data(transmission, offset, data)


@WRITE.rule("writes that overlap and are pipelined leave one of them, whole", writes=True)
def pipelined(target: Target) -> None:
    _need(target, 16 * target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        waiting = [
            transmission.send(
                Cmd.WRITE, number * target.block, payload=bytes([number + 1]) * target.block
            )
            for number in range(16)
        ]
        for cookie in waiting:
            reply = transmission.receive(cookie)
            if reply.error:
                raise Violation("NBD_CMD_WRITE to succeed", str(reply))
        data = b"".join(bytes([number + 1]) * target.block for number in range(16))
        _require_data(transmission, 0, data)


@WRITE.should(
    "length 0: the behavior is unspecified although the server SHOULD NOT disconnect", writes=True
)
def length_zero(target: Target) -> None:
    _need(target, 0)
    for mode in target.modes:
        if mode is Mode.EXTENDED:
            continue  # there a payload has to have a length
        transmission = target.enter(mode)
        transmission.call(Cmd.WRITE, 0, payload=b"")
        transmission.check_in_step()


@WRITE.should("without other constraints, a payload of 2^25 bytes SHOULD be supported", writes=True)
def payload_of_32_mib(target: Target) -> None:
    target.need(
        target.facts.max_payload >= DEFAULT_MAX_PAYLOAD, "the maximum payload is smaller than that"
    )
    _need(target, DEFAULT_MAX_PAYLOAD)
    data = bytes(range(256)) * (DEFAULT_MAX_PAYLOAD // 256)
    for mode in target.modes[-1:]:
        transmission = target.enter(mode)
        transmission.succeed(Cmd.WRITE, 0, payload=data)
        _require_data(transmission, 0, data)


@WRITE.rule(
    "a payload larger than the maximum is refused and read past, or is reason to disconnect: it "
    "never puts the server out of step",
    writes=True,
)
def more_than_the_maximum_payload(target: Target) -> None:
    length = target.facts.max_payload + target.block
    target.need(length < 1 << 27, "the maximum payload is too large to be exceeded")
    length -= length % target.block
    _need(target, length)
    for mode in target.modes:
        transmission = target.enter(mode)
        try:
            transmission.call(Cmd.WRITE, 0, payload=payload(length))
            transmission.check_in_step()
        except Closed:
            continue


# What is refused


@ERROR_VALUES.should(
    "NBD_ENOSPC if it receives a write request beyond the size of the device", writes=True
)
def write_beyond(target: Target) -> None:
    _need(target, 0)
    for mode in target.modes:
        transmission = target.enter(mode)
        for offset, length in beyond_the_end(target):
            transmission.refuse((Errno.ENOSPC,), Cmd.WRITE, offset, payload=payload(length))


@ERROR_VALUES.should(
    "NBD_ENOSPC if offset + length is beyond 2^64, which is beyond the size of the device, too",
    writes=True,
)
def write_overflow(target: Target) -> None:
    _need(target, 0)
    for mode in target.modes:
        transmission = target.enter(mode)
        for offset, length in overflowing(target):
            transmission.refuse((Errno.ENOSPC,), Cmd.WRITE, offset, payload=payload(length))


@ERROR_VALUES.should("NBD_EINVAL for unknown flags, and for flags of other commands", writes=True)
def flags_of_a_write(target: Target) -> None:
    _need(target, target.block)
    wrong = [1 << 6, UNKNOWN_FLAG, CmdFlag.NO_HOLE, CmdFlag.DF, CmdFlag.REQ_ONE, CmdFlag.FAST_ZERO]
    for mode in target.modes:
        transmission = target.enter(mode)
        for flag in wrong:
            transmission.refuse(
                (Errno.EINVAL,), Cmd.WRITE, 0, payload=payload(target.block), flags=flag
            )


@ERROR_VALUES.should(
    "NBD_EINVAL if a write request is not aligned to minimum block sizes", writes=True
)
def write_unaligned(target: Target) -> None:
    target.need_writable()
    for mode in target.modes:
        transmission = target.enter(mode)
        for offset, length in unaligned(target):
            transmission.refuse((Errno.EINVAL,), Cmd.WRITE, offset, payload=payload(length))


@WRITE.must(
    "the client MUST follow the request with its data: the data of a refused write is read past "
    "(or the server disconnects), it is never taken for requests",
    writes=True,
)
def payload_is_read_past(target: Target) -> None:
    """On read-only exports, too, where nearly all writes are refused."""
    target.need_size(target.block)
    wrong = [
        (target.end + target.block, 0, 64 << 10),
        ((1 << 64) - target.block, 0, target.block),
        (target.end + target.block, 0, 4 << 20),
        (0, UNKNOWN_FLAG, 64 << 10),
        (0, CmdFlag.DF, target.block),
    ]
    for mode in target.modes:
        for offset, flag, length in wrong:
            transmission = target.enter(mode)
            try:
                transmission.call(Cmd.WRITE, offset, payload=payload(length), flags=flag)
                transmission.check_in_step()
            except Closed:
                continue  # the client broke a MUST


# Read-only


def _writing(target: Target) -> list[tuple[int, dict[str, object]]]:
    block = target.block
    return [
        (Cmd.WRITE, {"payload": payload(block)}),
        (Cmd.TRIM, {"length": block}),
        (Cmd.WRITE_ZEROES, {"length": block}),
    ]


@READ_ONLY.must("the server MUST error subsequent write operations to the export", writes=True)
def writes_are_errors(target: Target) -> None:
    target.need_flag(Flag.READ_ONLY)
    target.need_size(target.block)
    for mode in target.modes:
        for command, more in _writing(target):
            transmission = target.enter(mode)
            before = transmission.succeed(Cmd.READ, 0, target.block).data
            try:
                reply = transmission.call(command, 0, **more)  # type: ignore[arg-type]
                if not reply.error:
                    raise Violation(f"{name_of(Cmd, command, 'NBD_CMD_')} to fail", str(reply))
            except Closed:
                pass
            if target.enter(mode).succeed(Cmd.READ, 0, target.block).data != before:
                raise Violation("the export to keep its content", "other content")


@READ_ONLY.should("NBD_EPERM for a write or trim request on a read-only export", writes=True)
def eperm(target: Target) -> None:
    target.need_flag(Flag.READ_ONLY)
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        for command, more in _writing(target):
            transmission.refuse((Errno.EPERM,), command, 0, **more)  # type: ignore[arg-type]


# FLUSH


@FLUSH.rule("a flush request succeeds where NBD_FLAG_SEND_FLUSH is advertised")
def flush(target: Target) -> None:
    target.need_flag(Flag.SEND_FLUSH)
    for mode in target.modes:
        target.enter(mode).succeed(Cmd.FLUSH)


@FLUSH.rule("length and offset are reserved, and MUST be set to all-zero: others are refused")
def reserved_fields(target: Target) -> None:
    target.need_flag(Flag.SEND_FLUSH)
    target.need_size(target.block)
    for mode in target.modes:
        for offset, length in ((target.block, 0), (0, target.block)):
            transmission = target.enter(mode)
            try:
                transmission.refuse((Errno.EINVAL,), Cmd.FLUSH, offset, length)
            except Closed:
                continue  # the client broke a MUST


# Several connections


@MULTI_CONN.must(
    "if this flag is present, the effects of NBD_CMD_FLUSH and NBD_CMD_FLAG_FUA MUST be visible "
    "across all connections when the server sends its reply",
    writes=True,
)
def visible_to_others(target: Target) -> None:
    target.need_flag(Flag.CAN_MULTI_CONN)
    _need(target, 2 * target.block)
    writer, reader = target.enter(), target.enter()
    for number in range(8):
        # Read before: what the reader may keep is old then.
        reader.succeed(Cmd.READ, 0, 2 * target.block)
        data = bytes([number + 1]) * target.block
        if target.facts.flags & Flag.SEND_FLUSH:
            writer.succeed(Cmd.WRITE, 0, payload=data)
            writer.succeed(Cmd.FLUSH)
            _require_data(reader, 0, data)
        if target.facts.flags & Flag.SEND_FUA:
            writer.succeed(Cmd.WRITE, target.block, payload=data, flags=CmdFlag.FUA)
            _require_data(reader, target.block, data)
