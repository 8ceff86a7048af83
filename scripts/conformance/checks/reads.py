"""NBD_CMD_READ."""

from __future__ import annotations

from ..check import Section
from ..constants import DEFAULT_MAX_PAYLOAD, Cmd, CmdFlag, Errno, Flag
from ..target import Target
from ..transmission import Mode
from ..verdicts import Closed, Violation
from .ranges import beyond_the_end, overflowing, refuse_ranges, unaligned

READ = Section("NBD_CMD_READ")
SIMPLE_REPLY = Section("Simple reply message")
ERROR_VALUES = Section("Error values")


@SIMPLE_REPLY.must(
    "the simple reply message MUST be sent in response to all requests if neither structured "
    "replies nor extended headers have been negotiated"
)
def without_negotiation(target: Target) -> None:
    target.need_size(target.block)
    transmission = target.enter()
    transmission.succeed(Cmd.READ, 0, target.block)
    if target.facts.flags & Flag.SEND_FLUSH:
        transmission.succeed(Cmd.FLUSH)


@SIMPLE_REPLY.rule("length bytes of data if the request is of type NBD_CMD_READ and error is zero")
def lengths(target: Target) -> None:
    target.need_size(target.block)
    for mode in target.modes:
        transmission = target.enter(mode)
        largest = min(1 << 20, target.end, target.facts.max_payload)
        for length in (target.block, 3 * target.block, largest):
            if length <= largest:
                transmission.succeed(Cmd.READ, target.end - length, length)


@READ.must("the server MUST NOT send any payload for a request that failed")
def no_payload_with_an_error(target: Target) -> None:
    """Simple replies: payload would be taken for the next reply."""
    target.need_size(target.block)
    transmission = target.enter()
    reply = transmission.call(Cmd.READ, target.facts.size + target.block, target.block)
    if not reply.error:
        raise Violation("an error", str(reply))
    transmission.check_in_step()


@READ.rule("length and offset define the data to be read, whatever the kind of replies")
def same_data_by_all_replies(target: Target) -> None:
    target.need_size(target.block)
    length = min(4 << 20, target.end, target.facts.max_payload)
    length -= length % target.block
    found: dict[bytes, Mode] = {}
    for mode in target.modes:
        found.setdefault(target.enter(mode).succeed(Cmd.READ, 0, length).data, mode)
    if len(found) > 1:
        raise Violation(
            "the same data", f"different data: {[mode.value for mode in found.values()]}"
        )


@READ.must("the server MUST send enough data chunks to cover the entire region, none overlapping")
def chunks_cover_the_request(target: Target) -> None:
    target.need(len(target.modes) > 1, "structured replies are not offered")
    target.need_size(target.block)
    length = min(8 << 20, target.end, target.facts.max_payload)
    length -= length % target.block
    for mode in target.modes[1:]:
        transmission = target.enter(mode)
        transmission.succeed(Cmd.READ, 0, length)
        transmission.succeed(Cmd.READ, target.end - length, length)


@READ.should(
    "the server SHOULD use chunks with lengths and offsets as an integer multiple of 512 bytes"
)
def chunks_are_aligned(target: Target) -> None:
    target.need(len(target.modes) > 1, "structured replies are not offered")
    target.need_size(target.block)
    length = min(8 << 20, target.end, target.facts.max_payload)
    length -= length % target.block
    for mode in target.modes[1:]:
        for offset, size, _ in target.enter(mode).succeed(Cmd.READ, 0, length).pieces:
            if offset % 512 or size % 512:
                raise Violation("multiples of 512", f"{size} bytes at {offset}")


@READ.must("NBD_CMD_FLAG_DF: the server MUST send at most one content chunk")
def df(target: Target) -> None:
    target.need_flag(Flag.SEND_DF)
    target.need_size(target.block)
    for mode in target.modes[1:]:
        transmission = target.enter(mode)
        for length in (target.block, 1 << 16, 1 << 20, 1 << 25):
            if length <= min(target.end, target.facts.max_payload):
                reply = transmission.call(Cmd.READ, 0, length, flags=CmdFlag.DF)
                if reply.error not in (0, Errno.EOVERFLOW):
                    raise Violation("success or NBD_EOVERFLOW", str(reply))


@READ.must("the server MUST support unfragmented reads that do not exceed 65,536 bytes")
def df_of_64_kib(target: Target) -> None:
    target.need_flag(Flag.SEND_DF)
    target.need_size(1 << 16)
    for mode in target.modes[1:]:
        transmission = target.enter(mode)
        for offset in (0, target.end - (1 << 16)):
            transmission.succeed(Cmd.READ, offset, 1 << 16, flags=CmdFlag.DF)


@READ.must(
    "NBD_CMD_FLAG_DF: if the area contains both data and a hole, the server MUST use OFFSET_DATA "
    "with the zeroes present",
    writes=True,
)
def df_of_data_and_hole(target: Target) -> None:
    target.need_flag(Flag.SEND_DF)
    target.need_writable()
    target.need_size(1 << 18)
    half = 1 << 15
    writer = target.enter()
    writer.succeed(Cmd.WRITE, 0, payload=b"d" * 2 * half)
    if target.facts.flags & Flag.SEND_WRITE_ZEROES:
        writer.succeed(Cmd.WRITE_ZEROES, half, half)
    for mode in target.modes[1:]:
        reply = target.enter(mode).succeed(Cmd.READ, 0, 2 * half, flags=CmdFlag.DF)
        if any(data is None for _, _, data in reply.pieces):
            raise Violation("NBD_REPLY_TYPE_OFFSET_DATA", "NBD_REPLY_TYPE_OFFSET_HOLE")


@READ.rule("data and holes, read in structured replies: what was written", writes=True)
def data_and_holes(target: Target) -> None:
    target.need(len(target.modes) > 1, "structured replies are not offered")
    target.need_writable()
    target.need_size(1 << 20)
    writer = target.enter()
    expected = bytearray()
    piece = max(1 << 16, target.block)
    for number in range((1 << 20) // piece):
        expected += bytes([number + 1]) * piece
    writer.succeed(Cmd.WRITE, 0, payload=bytes(expected))
    if target.facts.flags & Flag.SEND_WRITE_ZEROES:
        for offset in range(0, len(expected), 2 * piece):
            writer.succeed(Cmd.WRITE_ZEROES, offset, piece)
            expected[offset : offset + piece] = bytes(piece)
    for mode in target.modes[1:]:
        if target.enter(mode).succeed(Cmd.READ, 0, len(expected)).data != expected:
            raise Violation("the data that was written", "other data")


@READ.should("length 0: the behavior is unspecified although the server SHOULD NOT disconnect")
def length_zero(target: Target) -> None:
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.call(Cmd.READ, 0, 0)
        transmission.check_in_step()


@READ.should("without other constraints, a payload of 2^25 bytes SHOULD be supported")
def payload_of_32_mib(target: Target) -> None:
    target.need(
        target.facts.max_payload >= DEFAULT_MAX_PAYLOAD, "the maximum payload is smaller than that"
    )
    target.need_size(DEFAULT_MAX_PAYLOAD)
    for mode in target.modes:
        target.enter(mode).succeed(Cmd.READ, 0, DEFAULT_MAX_PAYLOAD)


@READ.rule(
    "a READ larger than the maximum payload fails, or is split where replies have chunks; it is no "
    "reason to disconnect"
)
def more_than_the_maximum_payload(target: Target) -> None:
    length = target.facts.max_payload + target.block
    target.need(length < 1 << 27, "the maximum payload is too large to be exceeded")
    length -= length % target.block
    target.need_size(length)
    for mode in target.modes:
        transmission = target.enter(mode)
        try:
            reply = transmission.call(Cmd.READ, 0, length)
            if reply.error not in (0, Errno.EINVAL, Errno.EOVERFLOW):
                raise Violation("success, NBD_EINVAL or NBD_EOVERFLOW", str(reply))
            transmission.check_in_step()
        except Closed as closed:
            raise Violation("a reply", f"{closed.came} for a READ of {length} bytes") from None


@READ.rule("a READ of 4 GiB, beyond the end, is refused; it is no reason to disconnect")
def length_of_4_gib(target: Target) -> None:
    length = (1 << 32) - target.block
    for mode in target.modes:
        transmission = target.enter(mode)
        transmission.refuse((Errno.EINVAL, Errno.EOVERFLOW), Cmd.READ, target.end, length)


@ERROR_VALUES.should(
    "it SHOULD return NBD_EINVAL if it receives a read beyond the size of the device"
)
def read_beyond(target: Target) -> None:
    refuse_ranges(target, (Errno.EINVAL,), Cmd.READ, beyond_the_end(target))


@ERROR_VALUES.should(
    "NBD_EINVAL if offset + length is beyond 2^64, which is beyond the size of the device, too"
)
def read_overflow(target: Target) -> None:
    refuse_ranges(target, (Errno.EINVAL,), Cmd.READ, overflowing(target))


@ERROR_VALUES.should(
    "NBD_EINVAL if a read request is not aligned to advertised minimum block sizes"
)
def read_unaligned(target: Target) -> None:
    refuse_ranges(target, (Errno.EINVAL,), Cmd.READ, unaligned(target))
