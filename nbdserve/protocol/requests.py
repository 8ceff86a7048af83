"""Requests of the transmission phase: their layout, and the one place that judges them.

Rules (specification, "Request message", "Request types", "Error values"):

- A request is 28 bytes: magic, command flags, command, cookie, offset, length; behind a WRITE
  follow ``length`` bytes of payload, also when the WRITE is refused: they must be read past, or
  everything behind them is misread.
- A wrong magic cannot be answered: the stream is out of step, the connection ends.
- EINVAL: unknown commands; unknown flags, and flags that the command does not take (FUA is taken by
  all); READ, TRIM, CACHE and BLOCK_STATUS beyond the end; FLUSH with an offset or a length;
  BLOCK_STATUS without a context or a length; a WRITE, or a READ without structured replies,
  larger than the largest payload.
- EPERM: WRITE, TRIM and WRITE_ZEROES on a read-only export.
- ENOSPC: WRITE and WRITE_ZEROES beyond the end.
- EOVERFLOW: a READ with structured replies larger than the largest payload.
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
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    MAX_PAYLOAD,
    ErrorCode,
)

REQUEST: Final = Struct(">IHHQQI")
"""magic, command flags, command, cookie, offset, length"""

_COMMANDS: Final = {
    CMD_READ: ("READ", CMD_FLAG_FUA),
    CMD_WRITE: ("WRITE", CMD_FLAG_FUA),
    CMD_DISC: ("DISC", CMD_FLAG_FUA),
    CMD_FLUSH: ("FLUSH", CMD_FLAG_FUA),
    CMD_TRIM: ("TRIM", CMD_FLAG_FUA),
    CMD_CACHE: ("CACHE", CMD_FLAG_FUA),
    CMD_WRITE_ZEROES: ("WRITE_ZEROES", CMD_FLAG_FUA | CMD_FLAG_NO_HOLE),
    CMD_BLOCK_STATUS: ("BLOCK_STATUS", CMD_FLAG_FUA | CMD_FLAG_REQ_ONE),
}
"""Name and flags of every command; DF joins READ's where it was advertised."""

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
    structured_replies: bool
    block_status: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not carried out."""

    error: ErrorCode
    message: str


def validate_request(request: Request, terms: Terms) -> Refusal | None:
    """Return None when the request may be carried out."""
    flags, command = request.flags, request.command
    offset, length = request.offset, request.length
    if command not in _COMMANDS:
        return Refusal(ErrorCode.EINVAL, f"unknown command {command}")
    name, allowed = _COMMANDS[command]
    if command == CMD_DISC:
        return None
    if command == CMD_READ and terms.structured_replies:
        allowed |= CMD_FLAG_DF
    if flags & ~allowed:
        return Refusal(ErrorCode.EINVAL, f"{name} does not take the flags {flags & ~allowed:#x}")
    if command == CMD_FLUSH:
        if offset or length:
            return Refusal(ErrorCode.EINVAL, "FLUSH takes no offset and no length")
        return None
    if command in _WRITING and terms.read_only:
        return Refusal(ErrorCode.EPERM, f"{name} on a read-only export")
    if offset + length > terms.size:
        growing = command in (CMD_WRITE, CMD_WRITE_ZEROES)
        return Refusal(
            ErrorCode.ENOSPC if growing else ErrorCode.EINVAL,
            f"{name} of {length} bytes at {offset} goes beyond the end at {terms.size}",
        )
    if length > MAX_PAYLOAD and command in (CMD_READ, CMD_WRITE):
        overflow = command == CMD_READ and terms.structured_replies
        return Refusal(
            ErrorCode.EOVERFLOW if overflow else ErrorCode.EINVAL,
            f"{name} of {length} bytes, at most {MAX_PAYLOAD} are allowed",
        )
    if command == CMD_BLOCK_STATUS:
        if not terms.block_status:
            return Refusal(ErrorCode.EINVAL, "BLOCK_STATUS without a metadata context")
        if not length:
            return Refusal(ErrorCode.EINVAL, "BLOCK_STATUS of no bytes")
    return None
