"""Replies of the transmission phase as bytes.

Rules (specification, "Simple reply message", "Structured reply types"):

- Without structured replies everything is a simple reply: magic, error, cookie, and the data of a
  successful READ.
- With them a READ is always answered by chunks, the last one flagged DONE; errors are chunks too,
  for they carry a text; everything else without data may stay a simple reply.
- A content chunk may be flagged DONE only when no error can follow: so a read is complete before
  its chunk is sent.
- OFFSET_DATA holds one byte or more: an empty READ is answered by NONE.
- BLOCK_STATUS holds one descriptor or more of (length, flags), none of length 0.
"""

import errno
from collections.abc import Iterable
from struct import Struct
from typing import Final

from nbdserve.protocol.constants import (
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_NONE,
    SIMPLE_REPLY_MAGIC,
    STATE_HOLE,
    STATE_ZERO,
    STRUCTURED_REPLY_MAGIC,
    ErrorCode,
)
from nbdserve.protocol.options import encode_text

SIMPLE_REPLY: Final = Struct(">IIQ")
"""magic, error, cookie"""

CHUNK: Final = Struct(">IHHQI")
"""magic, flags, type, cookie, length of the payload"""

DATA_CHUNK: Final = Struct(">IHHQIQ")
"""CHUNK and the offset; the data follows"""

HOLE_CHUNK: Final = Struct(">IHHQIQI")
"""CHUNK, the offset and the size of the hole"""

_ERROR: Final = Struct(">IH")
_CONTEXT: Final = Struct(">I")
_DESCRIPTOR: Final = Struct(">II")

_CODES: Final = {
    errno.EPERM: ErrorCode.EPERM,
    errno.EACCES: ErrorCode.EPERM,
    errno.EROFS: ErrorCode.EPERM,
    errno.EIO: ErrorCode.EIO,
    errno.ENOMEM: ErrorCode.ENOMEM,
    errno.EINVAL: ErrorCode.EINVAL,
    errno.ENOSPC: ErrorCode.ENOSPC,
    errno.EDQUOT: ErrorCode.ENOSPC,
    errno.EFBIG: ErrorCode.ENOSPC,
    errno.ESHUTDOWN: ErrorCode.ESHUTDOWN,
}


def error_code(error: OSError) -> ErrorCode:
    """Map the errno of a failed operation; what the protocol has no number for becomes EIO."""
    return _CODES.get(error.errno or 0, ErrorCode.EIO)


def success_reply(cookie: int) -> bytes:
    """Answer a request without data in its reply."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)


def empty_read_reply(cookie: int, *, structured: bool) -> bytes:
    """Answer a READ of no bytes."""
    if not structured:
        return success_reply(cookie)
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0)


def error_reply(cookie: int, error: ErrorCode, message: str, *, structured: bool) -> bytes:
    """Answer a request that failed; the message is lost on clients without structured replies."""
    if not structured:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
    text = encode_text(message)
    payload = _ERROR.pack(error, len(text)) + text
    return _chunk(REPLY_TYPE_ERROR, cookie, payload)


def block_status_reply(cookie: int, context: int, extents: Iterable[tuple[int, bool]]) -> bytes:
    """Answer BLOCK_STATUS for base:allocation with runs of (length in bytes, holds data)."""
    descriptors = (
        _DESCRIPTOR.pack(length, 0 if data else STATE_HOLE | STATE_ZERO) for length, data in extents
    )
    return _chunk(REPLY_TYPE_BLOCK_STATUS, cookie, _CONTEXT.pack(context) + b"".join(descriptors))


def _chunk(kind: int, cookie: int, payload: bytes) -> bytes:
    header = CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, kind, cookie, len(payload))
    return header + payload
