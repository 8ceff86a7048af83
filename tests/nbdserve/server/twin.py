"""The slow twin of the request loop: one request at a time, on a bytearray, nothing clever.

It shares with the server only what judges a request (``validate_request``), the sizes below which
and beyond which a READ is answered without holes, and nothing of how replies are made.
"""

import struct

from nbdserve.protocol.requests import Request, Terms, validate_request
from nbdserve.server.operations import MAX_READ_RUNS, MIN_SPARSE_READ

BLOCK = 4096
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8
CONTEXT = 1

SIMPLE = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF
DONE = 1
OFFSET_DATA, OFFSET_HOLE, STATUS, ERROR = 1, 2, 5, 0x8001


class Twin:
    """A volume or snapshot as one client sees it: its bytes, and which blocks hold data."""

    def __init__(self, size, *, structured, read_only=False):
        self.content = bytearray(size)
        self.mapped = bytearray(size // BLOCK)
        self.unsure = []  # holes zeroed in part: their zeroes may have been written or not
        self.structured = structured
        self.terms = Terms(size, read_only, structured, structured)

    def frozen(self, *, structured):
        """What a snapshot taken now is."""
        copy = Twin(len(self.content), structured=structured, read_only=True)
        copy.content[:] = self.content
        copy.mapped[:] = self.mapped
        return copy

    def answer(self, flags, command, cookie, offset, length, payload):
        """Carry out one request; returns its reply."""
        refusal = validate_request(Request(flags, command, cookie, offset, length), self.terms)
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
        return SIMPLE.pack(SIMPLE_MAGIC, 0, cookie)

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
        if not self.structured:
            return SIMPLE.pack(SIMPLE_MAGIC, error, cookie)
        return self._chunk(DONE, ERROR, cookie, struct.pack(">IH", error, len(text)) + text)

    def _read(self, flags, cookie, offset, length):
        data = self.content[offset : offset + length]
        if not self.structured:
            return SIMPLE.pack(SIMPLE_MAGIC, 0, cookie) + data
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
        descriptors = [struct.pack(">II", size, 0 if data else 3) for size, data in runs]
        return self._chunk(DONE, STATUS, cookie, struct.pack(">I", CONTEXT) + b"".join(descriptors))

    @staticmethod
    def _chunk(flags, kind, cookie, payload):
        return CHUNK.pack(CHUNK_MAGIC, flags, kind, cookie, len(payload)) + payload
