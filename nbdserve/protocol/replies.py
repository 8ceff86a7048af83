"""Replies of the transmission phase as bytes.

Rules (specification, "Simple reply message", "Structured reply types", and "Extended reply chunk
message" of the extension EXTENDED_HEADERS):

- Without structured replies everything is a simple reply: magic, error, cookie, and the data of a
  successful READ.
- With them a READ is always answered by chunks, the last one flagged DONE; errors are chunks too,
  for they carry a text; everything else without data may stay a simple reply.
- With extended headers everything is a chunk under a header of 32 bytes, which repeats the
  request's offset.
- A content chunk may be flagged DONE only when no error can follow: so a read is complete before
  its chunk is sent.
- OFFSET_DATA holds one byte or more: an empty READ is answered by NONE.
- BLOCK_STATUS holds one descriptor or more of (length, status), none of length 0; one chunk for
  each metadata context. With extended headers it is BLOCK_STATUS_EXT, which has 64 bits for both.
"""

import errno
from collections.abc import Sequence
from struct import Struct
from typing import Final

from nbdserve.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ErrorCode,
    ReplyStyle,
)
from nbdserve.protocol.options import encode_text

SIMPLE_REPLY: Final = Struct(">IIQ")
"""magic, error, cookie"""

CHUNK: Final = Struct(">IHHQI")
"""magic, flags, type, cookie, length of the payload"""

EXTENDED_CHUNK: Final = Struct(">IHHQQQ")
"""magic, flags, type, cookie, offset of the request, length of the payload"""

_OFFSET: Final = Struct(">Q")
_HOLE: Final = Struct(">QI")
_ERROR: Final = Struct(">IH")
_CONTEXT: Final = Struct(">I")
_DESCRIPTOR: Final = Struct(">II")
_EXTENDED_CONTEXT: Final = Struct(">II")
_EXTENDED_DESCRIPTOR: Final = Struct(">QQ")

DATA_HEADER: Final = {
    ReplyStyle.SIMPLE: SIMPLE_REPLY.size,
    ReplyStyle.STRUCTURED: CHUNK.size + _OFFSET.size,
    ReplyStyle.EXTENDED: EXTENDED_CHUNK.size + _OFFSET.size,
}
"""Bytes in front of the data of a READ (of each run of data, where they are chunks)."""

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


def success_reply(style: ReplyStyle, cookie: int, offset: int) -> bytes:
    """Answer a request without data in its reply; ``offset`` is the request's."""
    if style is ReplyStyle.EXTENDED:
        return _chunk(style, REPLY_TYPE_NONE, cookie, offset, b"")
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)


def empty_read_reply(style: ReplyStyle, cookie: int, offset: int) -> bytes:
    """Answer a READ of no bytes."""
    if style is ReplyStyle.SIMPLE:
        return success_reply(style, cookie, offset)
    return _chunk(style, REPLY_TYPE_NONE, cookie, offset, b"")


def data_header(style: ReplyStyle, cookie: int, offset: int, length: int) -> bytes:
    """What precedes the data of a READ that is answered as a whole."""
    if style is ReplyStyle.SIMPLE:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
    return data_chunk_header(style, cookie, offset, offset, length, REPLY_FLAG_DONE)


def data_chunk_header(
    style: ReplyStyle, cookie: int, offset: int, place: int, length: int, flags: int
) -> bytes:
    """What precedes a run of data: ``length`` bytes at ``place`` of a READ at ``offset``."""
    size = _OFFSET.size + length
    header = _chunk_header(style, REPLY_TYPE_OFFSET_DATA, cookie, offset, size, flags)
    return header + _OFFSET.pack(place)


def hole_chunk(
    style: ReplyStyle, cookie: int, offset: int, place: int, length: int, flags: int
) -> bytes:
    """A run of zeroes: ``length`` bytes at ``place`` of a READ at ``offset``."""
    hole = _HOLE.pack(place, length)
    return _chunk(style, REPLY_TYPE_OFFSET_HOLE, cookie, offset, hole, flags)


def error_reply(
    style: ReplyStyle, cookie: int, offset: int, error: ErrorCode, message: str
) -> bytes:
    """Answer a request that failed; the message is lost on clients without structured replies."""
    if style is ReplyStyle.SIMPLE:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
    text = encode_text(message)
    return _chunk(style, REPLY_TYPE_ERROR, cookie, offset, _ERROR.pack(error, len(text)) + text)


def block_status_reply(
    style: ReplyStyle,
    cookie: int,
    offset: int,
    statuses: Sequence[tuple[int, Sequence[tuple[int, int]]]],
) -> bytes:
    """Answer BLOCK_STATUS with (ID, runs of (length in bytes, status)) of each metadata context."""
    chunks = []
    for index, (context, runs) in enumerate(statuses):
        flags = REPLY_FLAG_DONE if index == len(statuses) - 1 else 0
        if style is ReplyStyle.EXTENDED:
            kind = REPLY_TYPE_BLOCK_STATUS_EXT
            payload = _EXTENDED_CONTEXT.pack(context, len(runs))
            payload += b"".join(_EXTENDED_DESCRIPTOR.pack(*run) for run in runs)
        else:
            kind = REPLY_TYPE_BLOCK_STATUS
            payload = _CONTEXT.pack(context) + b"".join(_DESCRIPTOR.pack(*run) for run in runs)
        chunks.append(_chunk(style, kind, cookie, offset, payload, flags))
    return b"".join(chunks)


def _chunk(
    style: ReplyStyle,
    kind: int,
    cookie: int,
    offset: int,
    payload: bytes,
    flags: int = REPLY_FLAG_DONE,
) -> bytes:
    return _chunk_header(style, kind, cookie, offset, len(payload), flags) + payload


def _chunk_header(
    style: ReplyStyle, kind: int, cookie: int, offset: int, size: int, flags: int
) -> bytes:
    if style is ReplyStyle.EXTENDED:
        return EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, size)
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, size)
