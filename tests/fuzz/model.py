"""What the transmission phase must answer: a judge of requests, and a plain store of blocks.

The judge is written from the specification. Where it leaves a choice (two faults in one request,
a hint that may be refused) it names all errors that are allowed.
"""

import errno

from . import wire

BLOCK = 4096
EOVERFLOW, ENOTSUP = 75, 95
_TAKEN = {
    wire.READ: wire.DF, wire.WRITE: 0, wire.FLUSH: 0, wire.TRIM: 0, wire.CACHE: 0,
    wire.WRITE_ZEROES: wire.NO_HOLE | wire.FAST_ZERO, wire.BLOCK_STATUS: wire.REQ_ONE,
}  # fmt: skip
_CHANGING = (wire.WRITE, wire.TRIM, wire.WRITE_ZEROES)


def faults(framing, request, payload, size, read_only, contexts):
    """The errors that a request deserves; none when it is to be carried out.

    ``payload`` is what came with it; ``contexts`` are the numbers that were agreed on. Returns the
    errors and, of a BLOCK_STATUS with a payload, its length and contexts.
    """
    command, flags, length = request.command, request.flags, request.length
    if command not in _TAKEN:
        return {errno.EINVAL}, length, contexts
    found = set()
    extended = framing == wire.EXTENDED_HEADERS
    allowed = _TAKEN[command] | wire.FUA
    if framing == wire.SIMPLE_REPLIES:
        allowed &= ~wire.DF
    if extended and (command == wire.WRITE or (command == wire.BLOCK_STATUS and contexts)):
        allowed |= wire.PAYLOAD_LEN
    if flags & ~allowed:
        found.add(errno.EINVAL)
    if command == wire.FLUSH:
        return found | ({errno.EINVAL} if request.offset or length else set()), length, contexts
    if command in _CHANGING and read_only:
        found.add(errno.EPERM)
    if command == wire.BLOCK_STATUS:
        if extended and flags & wire.PAYLOAD_LEN:
            numbers = [
                int.from_bytes(payload[at : at + 4], "big") for at in range(8, len(payload), 4)
            ]
            length = int.from_bytes(payload[:8], "big")
            wrong = len(payload) < 12 or len(payload) % 4 or len(set(numbers)) < len(numbers)
            if wrong or not set(contexts) >= set(numbers):
                return found | {errno.EINVAL}, length, contexts
            contexts = tuple(numbers)
        if not contexts or not length:
            found.add(errno.EINVAL)
    if request.offset + length > size:
        growing = command in (wire.WRITE, wire.WRITE_ZEROES)
        found.add(errno.ENOSPC if growing else errno.EINVAL)
    if length > wire.MAX_PAYLOAD and command == wire.WRITE:
        found.add(errno.EINVAL)
    if length > wire.MAX_PAYLOAD and command == wire.READ:
        found.add(errno.EINVAL if framing == wire.SIMPLE_REPLIES else EOVERFLOW)
    return found, length, contexts


class Model:
    """Bytes and holes of an export, changed by whole requests.

    What a failed change may have left in a range is not known: ``unsure`` has the range until all
    of it is written again.
    """

    def __init__(self, size):
        self.size = size
        self.blocks = {}  # what holds data, by number
        self.unsure = []  # (start, end)

    def is_sure(self, start, end):
        return not any(first < end and start < last for first, last in self.unsure)

    def doubt(self, start, end):
        """The range may hold anything; block by block, for what is a hole is not known either."""
        if start < end:
            self.unsure.append((start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK))

    def read(self, offset, length):
        found = bytearray(length)
        for block in self.held(offset, length):
            data = self.blocks[block]
            start = block * BLOCK - offset
            piece = data[max(0, -start) : length - start]
            found[max(0, start) : max(0, start) + len(piece)] = piece
        return found

    def write(self, offset, data):
        place = 0
        while place < len(data):
            block, start = divmod(offset + place, BLOCK)
            piece = data[place : place + BLOCK - start]
            self.blocks.setdefault(block, bytearray(BLOCK))[start : start + len(piece)] = piece
            place += len(piece)
        self._settle(offset, offset + len(data))

    def discard(self, offset, length, *, edges):
        """Whole blocks become holes; of the ``edges`` what is meant becomes zero."""
        end = offset + length
        first, last = -(-offset // BLOCK), end // BLOCK
        if edges:
            for start, stop in (
                (offset, min(end, first * BLOCK)),
                (max(offset, last * BLOCK), end),
            ):
                if start < stop:
                    self.write(start, bytes(stop - start))
        for block in self.held(first * BLOCK, max(0, last - first) * BLOCK):
            del self.blocks[block]
        self._settle(offset, end)

    def runs(self, offset, length):
        """[(length, holds data)], neighbours differ."""
        found = []
        end = offset + length
        at = offset
        for block in sorted(self.held(offset, length)):
            start, stop = max(offset, block * BLOCK), min(end, (block + 1) * BLOCK)
            if start > at:
                found.append((start - at, False))
            if start == at and found and found[-1][1]:
                found[-1] = (found[-1][0] + stop - start, True)
            else:
                found.append((stop - start, True))
            at = stop
        if at < end:
            found.append((end - at, False))
        return found

    def held(self, offset, length):
        """The blocks of a range that hold data."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        if not length:
            return []
        if last - first < len(self.blocks):
            return [block for block in range(first, last) if block in self.blocks]
        return [block for block in self.blocks if first <= block < last]

    def _settle(self, start, end):
        self.unsure = [
            (first, last) for first, last in self.unsure if not (start <= first and last <= end)
        ]
