"""What requests do: one coroutine for each that is not done in place, ending in its reply.

An operation never raises: whatever the export raises becomes an error reply. OSError is an
answer (no space, an I/O error); anything else is a fault of ours, is logged with its traceback and
becomes EIO.

FUA is the operation followed by a flush.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from nbdserve.protocol.constants import (
    BASE_ALLOCATION,
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
    STATE_HOLE,
    STATE_ZERO,
    ErrorCode,
    ReplyStyle,
)
from nbdserve.protocol.replies import (
    block_status_reply,
    data_chunk_header,
    data_header,
    empty_read_reply,
    error_code,
    error_reply,
    hole_chunk,
    success_reply,
)
from nbdserve.protocol.requests import (
    Refusal,
    Request,
    Terms,
    parse_status_payload,
    validate_request,
)
from nbdserve.server.exports import Export
from nbdserve.server.meter import Meter

MIN_SPARSE_READ: Final = 16 << 10
"""Shortest structured READ, in bytes, that looks for holes: below, sending zeroes is cheaper."""

MAX_READ_RUNS: Final = 8
"""Most runs that a READ is answered in; with more, the whole goes out as one chunk of data."""

MAX_STATUS_RUNS: Final = 4096
"""Most descriptors of one chunk of a BLOCK_STATUS reply; the client asks on behind the last."""

STATUS_SIZE: Final = MAX_STATUS_RUNS * 16
"""About as many bytes as a chunk of a BLOCK_STATUS reply may have."""

_HOLE: Final = STATE_HOLE | STATE_ZERO

log = logging.getLogger(__name__)


class Operations:
    """Carries out the requests of one connection; ``about`` is the ``extra`` of its log lines."""

    def __init__(
        self,
        export: Export,
        *,
        style: ReplyStyle,
        contexts: Sequence[tuple[int, str]],
        about: Mapping[str, object],
        meter: Meter,
    ) -> None:
        self._export = export
        self._about = about
        self._meter = meter
        self._style = style
        self._contexts = contexts
        self._numbers = frozenset(number for number, _ in contexts)
        self._logged: set[ErrorCode] = set()
        self._asking = asyncio.Lock()

    def validate(self, request: Request) -> Refusal | None:
        """Judge a request by the export and by what the handshake agreed on."""
        export = self._export
        return validate_request(
            request, Terms(export.size, export.read_only, self._style, self._numbers)
        )

    def refused(self, request: Request, refusal: Refusal) -> bytes:
        """Count and encode the reply to a request that is not carried out."""
        self._meter.failed(request.command, refusal.error)
        return error_reply(
            self._style, request.cookie, request.offset, refusal.error, refusal.message
        )

    def succeeded(self, request: Request) -> bytes:
        """Encode the reply to a request that is done, and whose reply has no data."""
        return success_reply(self._style, request.cookie, request.offset)

    def failed(self, command: int, cookie: int, offset: int, error: Exception) -> bytes:
        """Count and encode the reply to a request, of that cookie and offset, that failed."""
        if isinstance(error, OSError):
            code = error_code(error)
            message = error.strerror or str(error)
            if code not in self._logged:  # a full disk fails thousands of requests
                self._logged.add(code)
                log.warning("requests fail: %s", message, extra=self._about)
        else:
            code, message = ErrorCode.EIO, "internal error of the server"
            log.error("a request failed", exc_info=error, extra=self._about)
        self._meter.failed(command, code)
        return error_reply(self._style, cookie, offset, code, message)

    async def block_status(self, request: Request, payload: bytes) -> bytes:
        """Answer BLOCK_STATUS; a ``payload`` says for which contexts, without: all.

        One context may take milliseconds of the event loop: there is one in each of its turns.
        """
        wanted = self._numbers
        if payload:
            parsed = parse_status_payload(request, payload, self._numbers)
            if isinstance(parsed, Refusal):
                return self.refused(request, parsed)
            request, wanted = parsed
            refusal = self.validate(request)
            if refusal is not None:
                return self.refused(request, refusal)
        limit = 1 if request.flags & CMD_FLAG_REQ_ONE else MAX_STATUS_RUNS
        statuses = []
        try:
            async with self._asking:
                for number, name in self._contexts:
                    if number in wanted:
                        statuses.append((number, self._status(name, request, limit)))
                        await asyncio.sleep(0)
        except Exception as error:
            return self.failed(request.command, request.cookie, request.offset, error)
        return block_status_reply(self._style, request.cookie, request.offset, statuses)

    def _status(self, context: str, request: Request, limit: int) -> list[tuple[int, int]]:
        offset, length = request.offset, request.length
        if context != BASE_ALLOCATION:
            return self._export.status(context, offset, length, limit)
        runs = self._export.extents(offset, length, limit)
        return [(run, 0 if data else _HOLE) for run, data in runs]

    async def perform(
        self, request: Request, payload: bytes | bytearray | None = None
    ) -> bytes | bytearray:
        """Carry out a validated request and return its reply.

        ``payload`` is a WRITE's, or the end of it: what came before it is written already.
        """
        try:
            if request.command == CMD_READ:
                return await self._read(request)
            await self._change(request, payload)
            if request.flags & CMD_FLAG_FUA and request.command != CMD_FLUSH:
                await self._export.flush()
        except Exception as error:
            return self.failed(request.command, request.cookie, request.offset, error)
        return self.succeeded(request)

    async def flush(self, request: Request) -> bytes:
        """Finish a FUA write that is already done but for the flush."""
        try:
            await self._export.flush()
        except Exception as error:
            return self.failed(request.command, request.cookie, request.offset, error)
        return self.succeeded(request)

    async def _change(self, request: Request, payload: bytes | bytearray | None) -> None:
        export, offset, length = self._export, request.offset, request.length
        if request.command == CMD_FLUSH:
            await export.flush()
        elif not length:
            return
        elif request.command == CMD_WRITE:
            assert payload is not None
            await export.write(offset + length - len(payload), payload)
        elif request.command == CMD_TRIM:
            await export.trim(offset, length)
        elif request.command == CMD_WRITE_ZEROES:
            no_hole = bool(request.flags & CMD_FLAG_NO_HOLE)
            await export.write_zeroes(offset, length, no_hole=no_hole)
        else:
            assert request.command == CMD_CACHE
            await export.cache(offset, length)

    def cut_read(self, request: Request, size: int) -> list[tuple[bytes, int, int]]:
        """What a READ is answered with: (header, offset, length of the data that follows it).

        Chunks of at most ``size`` bytes of data, the last one flagged DONE; or one simple reply.
        Raises what ``extents`` raises.
        """
        style, cookie, begin, length = self._style, request.cookie, request.offset, request.length
        if style is ReplyStyle.SIMPLE:
            return [(data_header(style, cookie, begin, length), begin, length)]
        end = begin + length
        offset = begin
        chunks = []
        for run, data in self._read_runs(request.flags, begin, length):
            stop = offset + run
            while offset < stop:
                step = min(stop - offset, size) if data else run
                flags = REPLY_FLAG_DONE if offset + step == end else 0
                make = data_chunk_header if data else hole_chunk
                header = make(style, cookie, begin, offset, step, flags)
                chunks.append((header, offset, step if data else 0))
                offset += step
        return chunks

    def _read_runs(self, flags: int, offset: int, length: int) -> list[tuple[int, bool]]:
        """The runs of (length, holds data) that a READ in chunks is answered in."""
        if length >= MIN_SPARSE_READ and not flags & CMD_FLAG_DF:
            runs = self._export.extents(offset, length, MAX_READ_RUNS)
            if sum(run for run, _ in runs) == length:
                return runs
        return [(length, True)]

    async def _read(self, request: Request) -> bytes | bytearray:
        if not request.length:
            return empty_read_reply(self._style, request.cookie, request.offset)
        chunks = self.cut_read(request, request.length)
        reply = bytearray(reply_size(chunks))
        view = memoryview(reply)
        place = 0
        for header, offset, length in chunks:
            data = place + len(header)
            view[place:data] = header
            place = data + length
            if length:
                await self._export.read(offset, view[data:place])
        return reply


def reply_size(chunks: list[tuple[bytes, int, int]]) -> int:
    """Bytes of a reply as ``cut_read`` has it."""
    return sum(len(header) + length for header, _, length in chunks)
