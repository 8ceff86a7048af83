"""What requests do: one coroutine for each that is not done in place, ending in its reply.

An operation never raises: whatever the export raises becomes an error reply. OSError is an
answer (no space, an I/O error); anything else is a fault of ours, is logged with its traceback and
becomes EIO.

FUA is the operation followed by a flush.
"""

import logging
import mmap
from typing import Final

from nbdserve.protocol.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLAG_DF,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    REPLY_FLAG_DONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ErrorCode,
)
from nbdserve.protocol.replies import (
    DATA_CHUNK,
    HOLE_CHUNK,
    SIMPLE_REPLY,
    block_status_reply,
    empty_read_reply,
    error_code,
    error_reply,
    success_reply,
)
from nbdserve.protocol.requests import Refusal, Request, Terms, validate_request
from nbdserve.server.exports import Export

MIN_SPARSE_READ: Final = 16 << 10
"""Shortest structured READ, in bytes, that looks for holes: below, sending zeroes is cheaper."""

MAX_READ_RUNS: Final = 8
"""Most runs that a READ is answered in; with more, the whole goes out as one chunk of data."""

MAX_STATUS_RUNS: Final = 4096
"""Most descriptors of one BLOCK_STATUS reply; the client asks on behind the last one."""

log = logging.getLogger(__name__)


class Operations:
    """Carries out the requests of one connection."""

    def __init__(self, export: Export, *, structured: bool, context: int | None) -> None:
        self._export = export
        self._structured = structured
        self._context = context
        self._logged: set[ErrorCode] = set()

    def validate(self, request: Request) -> Refusal | None:
        """Judge a request by the export and by what the handshake agreed on."""
        export = self._export
        return validate_request(
            request,
            Terms(export.size, export.read_only, self._structured, self._context is not None),
        )

    def refused(self, request: Request, refusal: Refusal) -> bytes:
        """Encode the reply to a request that is not carried out."""
        return error_reply(
            request.cookie, refusal.error, refusal.message, structured=self._structured
        )

    def failed(self, cookie: int, error: Exception) -> bytes:
        """Encode the reply to a request that failed."""
        if isinstance(error, OSError):
            code = error_code(error)
            message = error.strerror or str(error)
            if code not in self._logged:  # a full disk fails thousands of requests
                self._logged.add(code)
                log.warning("%s: requests fail: %s", self._export.name, message)
        else:
            code, message = ErrorCode.EIO, "internal error of the server"
            log.error("%s: a request failed", self._export.name, exc_info=error)
        return error_reply(cookie, code, message, structured=self._structured)

    def block_status(self, request: Request) -> bytes:
        """Answer BLOCK_STATUS, at once."""
        assert request.command == CMD_BLOCK_STATUS
        assert self._context is not None
        limit = 1 if request.flags & CMD_FLAG_REQ_ONE else MAX_STATUS_RUNS
        try:
            runs = self._export.extents(request.offset, request.length, limit)
        except Exception as error:
            return self.failed(request.cookie, error)
        return block_status_reply(request.cookie, self._context, runs)

    def read_runs(self, flags: int, offset: int, length: int) -> list[tuple[int, bool]] | None:
        """Return the runs of (length, holds data) that a READ is answered in.

        None stands for one run of data. Raises what ``extents`` raises.
        """
        if not self._structured or length < MIN_SPARSE_READ or flags & CMD_FLAG_DF:
            return None
        runs = self._export.extents(offset, length, MAX_READ_RUNS)
        if sum(run for run, _ in runs) != length or (len(runs) == 1 and runs[0][1]):
            return None
        return runs

    async def perform(
        self, request: Request, payload: bytes | bytearray | None = None
    ) -> bytes | bytearray:
        """Carry out a validated request and return its reply; ``payload`` belongs to WRITE."""
        try:
            if request.command == CMD_READ:
                return await self._read(request)
            await self._change(request, payload)
            if request.flags & CMD_FLAG_FUA and request.command != CMD_FLUSH:
                await self._export.flush()
        except Exception as error:
            return self.failed(request.cookie, error)
        return success_reply(request.cookie)

    async def flush(self, request: Request) -> bytes:
        """Finish a FUA write that is already done but for the flush."""
        try:
            await self._export.flush()
        except Exception as error:
            return self.failed(request.cookie, error)
        return success_reply(request.cookie)

    async def _change(self, request: Request, payload: bytes | bytearray | None) -> None:
        export, offset, length = self._export, request.offset, request.length
        if request.command == CMD_FLUSH:
            await export.flush()
        elif not length:
            return
        elif request.command == CMD_WRITE:
            assert payload is not None
            await export.write(offset, payload)
        elif request.command == CMD_TRIM:
            await export.trim(offset, length)
        elif request.command == CMD_WRITE_ZEROES:
            no_hole = bool(request.flags & CMD_FLAG_NO_HOLE)
            await export.write_zeroes(offset, length, no_hole=no_hole)
        else:
            assert request.command == CMD_CACHE
            await export.cache(offset, length)

    async def _read(self, request: Request) -> bytes | bytearray:
        offset, length, cookie = request.offset, request.length, request.cookie
        if not length:
            return empty_read_reply(cookie, structured=self._structured)
        if not self._structured:
            reply = bytearray(SIMPLE_REPLY.size + length)
            SIMPLE_REPLY.pack_into(reply, 0, SIMPLE_REPLY_MAGIC, 0, cookie)
            await self._export.read(offset, memoryview(reply)[SIMPLE_REPLY.size :])
            return reply
        runs = self.read_runs(request.flags, offset, length) or [(length, True)]
        reply = bytearray(read_reply_size(runs))
        view = memoryview(reply)
        for place, start, run in frame_runs(reply, 0, cookie, offset, runs):
            await self._export.read(start, view[place : place + run])
        return reply


def read_reply_size(runs: list[tuple[int, bool]]) -> int:
    """Return the bytes of a structured READ reply of ``runs``."""
    return sum(DATA_CHUNK.size + run if data else HOLE_CHUNK.size for run, data in runs)


def frame_runs(
    reply: bytearray | mmap.mmap, place: int, cookie: int, offset: int, runs: list[tuple[int, bool]]
) -> list[tuple[int, int, int]]:
    """Write the chunk headers of a structured READ reply into ``reply`` from ``place`` on.

    Returns what is to be filled with data: (place in ``reply``, offset in the export, length).
    """
    gaps = []
    last = len(runs) - 1
    for index, (run, data) in enumerate(runs):
        flags = REPLY_FLAG_DONE if index == last else 0
        if data:
            DATA_CHUNK.pack_into(
                reply,
                place,
                STRUCTURED_REPLY_MAGIC,
                flags,
                REPLY_TYPE_OFFSET_DATA,
                cookie,
                8 + run,
                offset,
            )
            place += DATA_CHUNK.size
            gaps.append((place, offset, run))
            place += run
        else:
            HOLE_CHUNK.pack_into(
                reply,
                place,
                STRUCTURED_REPLY_MAGIC,
                flags,
                REPLY_TYPE_OFFSET_HOLE,
                cookie,
                12,
                offset,
                run,
            )
            place += HOLE_CHUNK.size
        offset += run
    return gaps
