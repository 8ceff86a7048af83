"""The slow twin of the request loop: one request at a time, on a bytearray, nothing clever.

It shares with the server only what judges a request (requests.py), the sizes below which
and beyond which a READ is answered without holes, and nothing of how replies are made.
"""

import struct

from nbdserve.protocol.constants import ReplyStyle
from nbdserve.protocol.requests import (
    Refusal,
    Request,
    Terms,
    parse_status_payload,
    validate_request,
)
from nbdserve.server.meter import COMMAND_NAMES, OTHER
from nbdserve.server.operations import MAX_READ_RUNS, MIN_SPARSE_READ

BLOCK = 4096
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, PAYLOAD_LEN = 1, 2, 4, 8, 32
CONTEXT = 1

SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF
LONG_CHUNK = struct.Struct(">IHHQQQ")
LONG_CHUNK_MAGIC = 0x6E8A278C
DONE = 1
OFFSET_DATA, OFFSET_HOLE, STATUS, LONG_STATUS, ERROR = 1, 2, 5, 6, 0x8001


class Twin:
    """A volume or snapshot as one client sees it: its bytes, and which blocks hold data."""

    def __init__(self, size, style, *, read_only=False):
        self.content = bytearray(size)
        self.mapped = bytearray(size // BLOCK)
        self.unsure = []  # holes zeroed in part: their zeroes may have been written or not
        self.simple = style is ReplyStyle.SIMPLE
        self.extended = style is ReplyStyle.EXTENDED
        self.offset = 0  # of the request that is being answered
        self.style = style
        self.counted = {}  # by command's name: requests, bytes, errors by their number
        self.terms = Terms(size, read_only, style, frozenset(() if self.simple else (CONTEXT,)))

    def frozen(self):
        """What a snapshot taken now is."""
        copy = Twin(len(self.content), self.style, read_only=True)
        copy.content[:] = self.content
        copy.mapped[:] = self.mapped
        return copy

    def answer(self, flags, command, cookie, offset, length, payload):
        """Carry out one request; returns its reply."""
        self.offset = offset
        asked = length if command in (READ, WRITE, TRIM, WRITE_ZEROES, CACHE) else 0
        request = Request(flags, command, cookie, offset, length)
        refusal = validate_request(request, self.terms)
        if refusal is None and command == BLOCK_STATUS and flags & PAYLOAD_LEN:
            refusal = parsed = parse_status_payload(request, payload, self.terms.contexts)
            if not isinstance(parsed, Refusal):
                request, _ = parsed
                flags, length = request.flags, request.length
                refusal = validate_request(request, self.terms)
        self._count(command, 0 if refusal else asked, refusal and refusal.error)
        if refusal is not None:
            return self._refuse(cookie, refusal.error, refusal.message.encode())
        if command == READ:
            return self._read(flags, cookie, offset, length)
        if command == BLOCK_STATUS:
            return self._status(flags, cookie, offset, length)
        if length:
            if command == WRITE:
                self.content[offset : offset + length] = payload
                self._map(offset, length)
            elif command in (TRIM, WRITE_ZEROES):
                self._zero(offset, length, keep=command == WRITE_ZEROES and flags & NO_HOLE)
        if self.extended:
            return self._chunk(DONE, 0, cookie, b"")
        return SIMPLE_REPLY.pack(SIMPLE_MAGIC, 0, cookie)

    def _count(self, command, size, error):
        counted = self.counted.setdefault(COMMAND_NAMES.get(command, OTHER), [0, 0, {}])
        counted[0] += 1
        counted[1] += size
        if error is not None:
            counted[2][error.name] = counted[2].get(error.name, 0) + 1

    def runs(self, offset, length):
        """Pieces of a range in which all blocks hold data, or none does: [(length, data)]."""
        found = []
        end = offset + length
        while offset < end:
            stop = min(end, (offset // BLOCK + 1) * BLOCK)
            data = bool(self.mapped[offset // BLOCK])
            if found and found[-1][1] == data:
                found[-1] = (found[-1][0] + stop - offset, data)
            else:
                found.append((stop - offset, data))
            offset = stop
        return found

    def _map(self, offset, length):
        for block in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
            self.mapped[block] = 1

    def _zero(self, offset, length, keep):
        """Whole blocks become holes, or zeroes that are kept; a block in part is overwritten."""
        end = offset + length
        self.content[offset:end] = bytes(length)
        edges = [at // BLOCK for at in (offset, end) if at % BLOCK]
        self.unsure += [block for block in edges if not self.mapped[block]]
        for block in range(-(-offset // BLOCK), end // BLOCK):
            self.mapped[block] = 1 if keep else 0

    def _refuse(self, cookie, error, text):
        if self.simple:
            return SIMPLE_REPLY.pack(SIMPLE_MAGIC, error, cookie)
        return self._chunk(DONE, ERROR, cookie, struct.pack(">IH", error, len(text)) + text)

    def _read(self, flags, cookie, offset, length):
        data = self.content[offset : offset + length]
        if self.simple:
            return SIMPLE_REPLY.pack(SIMPLE_MAGIC, 0, cookie) + data
        if not length:
            return self._chunk(DONE, 0, cookie, b"")
        runs = [(length, True)]
        if length >= MIN_SPARSE_READ and not flags & DF:
            runs = self.runs(offset, length)
            if len(runs) > MAX_READ_RUNS:
                runs = [(length, True)]
        reply = b""
        at = offset
        for size, holds_data in runs:
            last = DONE if at + size == offset + length else 0
            place = struct.pack(">Q", at)
            if holds_data:
                piece = data[at - offset : at - offset + size]
                reply += self._chunk(last, OFFSET_DATA, cookie, place + piece)
            else:
                reply += self._chunk(last, OFFSET_HOLE, cookie, place + struct.pack(">I", size))
            at += size
        return reply

    def _status(self, flags, cookie, offset, length):
        runs = self.runs(offset, length)
        if flags & REQ_ONE:
            runs = runs[:1]
        statuses = [(size, 0 if data else 3) for size, data in runs]
        if self.extended:
            descriptors = b"".join(struct.pack(">QQ", *status) for status in statuses)
            payload = struct.pack(">II", CONTEXT, len(statuses)) + descriptors
            return self._chunk(DONE, LONG_STATUS, cookie, payload)
        descriptors = b"".join(struct.pack(">II", *status) for status in statuses)
        return self._chunk(DONE, STATUS, cookie, struct.pack(">I", CONTEXT) + descriptors)

    def _chunk(self, flags, kind, cookie, payload):
        size = len(payload)
        if self.extended:
            header = LONG_CHUNK.pack(LONG_CHUNK_MAGIC, flags, kind, cookie, self.offset, size)
        else:
            header = CHUNK.pack(CHUNK_MAGIC, flags, kind, cookie, size)
        return header + payload
