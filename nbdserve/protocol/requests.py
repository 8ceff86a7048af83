"""Requests of the transmission phase: their layout, and the one place that judges them.

Rules (specification, "Request message", "Request types", "Error values"):

- A compact request is 28 bytes: magic, command flags, command, cookie, offset, length. Behind a
  WRITE follow ``length`` bytes of payload.
- An extended request is 32 bytes, its length has 64 bits. A payload follows where PAYLOAD_LEN is
  set, and ``length`` is then the payload's: behind a WRITE, and behind a BLOCK_STATUS that asks for
  some contexts only. Otherwise ``length`` says how much of the export is meant. A WRITE must have
  PAYLOAD_LEN set, but qemu's client (10.0) sends it without: its payload follows all the same.
- A refused request's payload must be read past, or everything behind it is misread.
- A wrong magic cannot be answered: the stream is out of step, the connection ends. So it does when
  an extended request announces a payload larger than the largest.
- EINVAL: unknown commands; unknown flags, and flags that the command does not take (FUA is taken by
  all); READ, TRIM, CACHE and BLOCK_STATUS beyond the end;
  FLUSH with an offset or a length; BLOCK_STATUS without a context or a length, or for contexts that
  were not chosen; a WRITE, or a READ without structured replies, larger than the largest payload.
- EPERM: WRITE, TRIM and WRITE_ZEROES on a read-only export.
- ENOSPC: WRITE and WRITE_ZEROES beyond the end.
- EOVERFLOW: a READ with structured replies larger than the largest payload.
- ENOTSUP: WRITE_ZEROES with FAST_ZERO and NO_HOLE, for space is not allocated faster than written.
- A length of 0 is allowed and does nothing, save in BLOCK_STATUS, which must report something.
- DISC is never refused.
"""

from dataclasses import dataclass
from struct import Struct
from typing import Final

from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    MAX_PAYLOAD,
    ErrorCode,
    ReplyStyle,
)

REQUEST: Final = Struct(">IHHQQI")
"""magic, command flags, command, cookie, offset, length"""

EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
"""The same with extended headers."""

_EFFECT: Final = Struct(">Q")
_CONTEXT: Final = Struct(">I")

_COMMANDS: Final = {
    CMD_READ: ("READ", CMD_FLAG_FUA),
    CMD_WRITE: ("WRITE", CMD_FLAG_FUA),
    CMD_DISC: ("DISC", CMD_FLAG_FUA),
    CMD_FLUSH: ("FLUSH", CMD_FLAG_FUA),
    CMD_TRIM: ("TRIM", CMD_FLAG_FUA),
    CMD_CACHE: ("CACHE", CMD_FLAG_FUA),
    CMD_WRITE_ZEROES: ("WRITE_ZEROES", CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO),
    CMD_BLOCK_STATUS: ("BLOCK_STATUS", CMD_FLAG_FUA | CMD_FLAG_REQ_ONE),
}
"""Name and flags of every command; others join where the handshake agreed on them."""

_WRITING: Final = frozenset((CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES))


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``offset`` and ``length`` in bytes, ``cookie`` opaque."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What requests are judged by: the export, and what the handshake agreed on."""

    size: int
    read_only: bool
    style: ReplyStyle
    contexts: frozenset[int]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not carried out."""

    error: ErrorCode
    message: str


def payload_length(request: Request, style: ReplyStyle) -> int:
    """Bytes of payload that follow a request."""
    announced = style is ReplyStyle.EXTENDED and request.flags & CMD_FLAG_PAYLOAD_LEN
    return request.length if announced or request.command == CMD_WRITE else 0


def validate_request(request: Request, terms: Terms) -> Refusal | None:
    """Return None when the request may be carried out.

    Of a BLOCK_STATUS with a payload it judges the payload's length; its content, once it is there,
    is for ``parse_status_payload``, and what comes of that is judged again.
    """
    flags, command = request.flags, request.command
    offset, length = request.offset, request.length
    if command not in _COMMANDS:
        return Refusal(ErrorCode.EINVAL, f"unknown command {command}")
    name, allowed = _COMMANDS[command]
    if command == CMD_DISC:
        return None
    if command == CMD_READ and terms.style is not ReplyStyle.SIMPLE:
        allowed |= CMD_FLAG_DF
    if terms.style is ReplyStyle.EXTENDED and (
        command == CMD_WRITE or (command == CMD_BLOCK_STATUS and terms.contexts)
    ):
        allowed |= CMD_FLAG_PAYLOAD_LEN
    if flags & ~allowed:
        return Refusal(ErrorCode.EINVAL, f"{name} does not take the flags {flags & ~allowed:#x}")
    if command == CMD_FLUSH:
        if offset or length:
            return Refusal(ErrorCode.EINVAL, "FLUSH takes no offset and no length")
        return None
    if command in _WRITING and terms.read_only:
        return Refusal(ErrorCode.EPERM, f"{name} on a read-only export")
    if command == CMD_BLOCK_STATUS and flags & CMD_FLAG_PAYLOAD_LEN:
        return _validate_status_payload(length, len(terms.contexts))
    if offset + length > terms.size:
        growing = command in (CMD_WRITE, CMD_WRITE_ZEROES)
        return Refusal(
            ErrorCode.ENOSPC if growing else ErrorCode.EINVAL,
            f"{name} of {length} bytes at {offset} goes beyond the end at {terms.size}",
        )
    if length > MAX_PAYLOAD and command in (CMD_READ, CMD_WRITE):
        overflow = command == CMD_READ and terms.style is not ReplyStyle.SIMPLE
        return Refusal(
            ErrorCode.EOVERFLOW if overflow else ErrorCode.EINVAL,
            f"{name} of {length} bytes, at most {MAX_PAYLOAD} are allowed",
        )
    if command == CMD_BLOCK_STATUS:
        if not terms.contexts:
            return Refusal(ErrorCode.EINVAL, "BLOCK_STATUS without a metadata context")
        if not length:
            return Refusal(ErrorCode.EINVAL, "BLOCK_STATUS of no bytes")
    if flags & CMD_FLAG_FAST_ZERO and flags & CMD_FLAG_NO_HOLE:
        return Refusal(ErrorCode.ENOTSUP, "allocated zeroes are no faster than WRITE")
    return None


def _validate_status_payload(length: int, contexts: int) -> Refusal | None:
    most = _EFFECT.size + contexts * _CONTEXT.size
    if not _EFFECT.size < length <= most or length % _CONTEXT.size:
        return Refusal(
            ErrorCode.EINVAL,
            f"BLOCK_STATUS with a payload of {length} bytes: {_EFFECT.size} for the length and"
            f" {_CONTEXT.size} for each of 1 to {contexts} metadata contexts are needed",
        )
    return None


def parse_status_payload(
    request: Request, payload: bytes, contexts: frozenset[int]
) -> tuple[Request, frozenset[int]] | Refusal:
    """The plain request that a BLOCK_STATUS with a payload stands for, and its contexts."""
    (effect,) = _EFFECT.unpack_from(payload)
    wanted = [number for (number,) in _CONTEXT.iter_unpack(payload[_EFFECT.size :])]
    if len(set(wanted)) < len(wanted) or not contexts.issuperset(wanted):
        return Refusal(
            ErrorCode.EINVAL, "BLOCK_STATUS for a metadata context unknown or named twice"
        )
    flags = request.flags & ~CMD_FLAG_PAYLOAD_LEN
    plain = Request(flags, request.command, request.cookie, request.offset, effect)
    return plain, frozenset(wanted)
