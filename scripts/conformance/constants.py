"""Numbers of the NBD protocol, under the specification's names without the ``NBD_`` prefix."""

from __future__ import annotations

from enum import IntEnum, IntFlag

INIT_PASSWD = 0x4E42444D41474943
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

MAX_STRING = 4096
"""Longest string of the protocol in bytes."""

DEFAULT_MAX_PAYLOAD = 1 << 25
"""Payload in bytes that every server should take when it does not say otherwise."""

BASE_ALLOCATION = "base:allocation"
STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1

ERROR_BIT = 1 << 31
"""Set in the types of option replies that are errors."""


class Option(IntEnum):
    """Options of the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    """Types of option replies."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = ERROR_BIT + 1
    ERR_POLICY = ERROR_BIT + 2
    ERR_INVALID = ERROR_BIT + 3
    ERR_PLATFORM = ERROR_BIT + 4
    ERR_TLS_REQD = ERROR_BIT + 5
    ERR_UNKNOWN = ERROR_BIT + 6
    ERR_SHUTDOWN = ERROR_BIT + 7
    ERR_BLOCK_SIZE_REQD = ERROR_BIT + 8
    ERR_TOO_BIG = ERROR_BIT + 9
    ERR_EXT_HEADER_REQD = ERROR_BIT + 10


class Info(IntEnum):
    """Types of information in NBD_REP_INFO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """Transmission flags."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Cmd(IntEnum):
    """Commands of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CmdFlag(IntFlag):
    """Command flags."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Chunk(IntEnum):
    """Types of structured and extended reply chunks."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


REPLY_FLAG_DONE = 1 << 0
CHUNK_ERROR_BIT = 1 << 15


class Errno(IntEnum):
    """Error values of replies: all that the specification allows."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


def name_of(kind: type[IntEnum], value: int, prefix: str) -> str:
    """The specification's name of a value, or the number when it has none."""
    try:
        return prefix + kind(value).name
    except ValueError:
        return f"{prefix}{value:#x}" if value > 0xFF else f"{prefix}{value}"


def name_flags(kind: type[IntFlag], value: int) -> str:
    """Names of the flags set, joined with ``|``; numbers for those without a name."""
    names = [str(flag.name) for flag in kind if value & flag]
    rest = value & ~sum(int(flag) for flag in kind)
    if rest:
        names.append(f"{rest:#x}")
    return "|".join(names) or "0"


def name_errors(errors: tuple[Errno, ...]) -> str:
    """``EINVAL or ENOSPC``."""
    return " or ".join(f"NBD_{error.name}" for error in errors)
