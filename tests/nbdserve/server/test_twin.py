"""The request loop and its slow twin agree on random requests, byte for byte.

The real ``Transmission`` over a real volume is one side, ``twin.Twin`` the other. Requests are
random, valid and not; they come in batches, cut anywhere, and snapshots are taken and deleted
meanwhile, so that reads cross layers. The server may carry out what it has in any order: within one
batch nothing overlaps what is written. Every reply is compared, in the end every byte, before and
after the volume is opened anew.

Deterministic but for the timing of threads: a failure names the seed and the request.
"""

import asyncio
import contextlib
import functools
import os
import random
import socket
import struct
import time

import pytest

from backends.local_layers import LocalLayerStore
from backends.memory_layers import MemoryDataFile, MemoryLayerStore
from nbdserve.server.meter import Meter
from nbdserve.server.transmission import Transmission
from snapshots.catalogue import Catalogue
from snapshots.limits import Limits

from .nbd_client import EXTENDED, SIMPLE, STRUCTURED
from .twin import (
    BLOCK,
    BLOCK_STATUS,
    CACHE,
    CHUNK,
    CHUNK_MAGIC,
    CONTEXT,
    DISC,
    FLUSH,
    LONG_CHUNK,
    LONG_CHUNK_MAGIC,
    NO_HOLE,
    OFFSET_DATA,
    PAYLOAD_LEN,
    READ,
    SIMPLE_MAGIC,
    SIMPLE_REPLY,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Twin,
)

REQUEST = struct.Struct(">IHHQQI")
MAGIC = 0x25609513
LONG_REQUEST = struct.Struct(">IHHQQQ")
LONG_MAGIC = 0x21E41C71
SIZE = 40 << 20
GRANULE = 512
MIB = 1 << 20
SNAPSHOT_EVERY = 3000  # requests
TIMES = int(os.environ.get("NBDSERVE_TWIN", "1"))  # by `make torture` as many requests
MOST_SNAPSHOTS = 6
PATIENCE = 60.0  # seconds without a byte from the server

PLAIN, FLAGGED, LARGE, HUGE, ZEROES, ODD_ZEROES, ASK, SYNC, WRONG, NOTHING = range(10)
# Of 1000 requests; the rest is plain.
SHARES = {
    FLAGGED: 40, LARGE: 12, ZEROES: 14, ODD_ZEROES: 3, ASK: 30, SYNC: 3, WRONG: 25, NOTHING: 12,
}  # fmt: skip
WINDOW = 32 << 10  # where all of a batch is, now and then: many requests meet in one block
LONG_SHARES = {FLAGGED: 40, LARGE: 850, ZEROES: 20, ODD_ZEROES: 3, ASK: 30, SYNC: 3}
LENGTHS = (512, 1024, 2048, 4096, 4096, 4096, 4096, 8192)


class ColdDataFile(MemoryDataFile):
    """Refuses most reads on the event loop, as a page cache that has little of the data."""

    chance = random.Random(5)

    def try_read(self, offset, buffer):
        if self.chance.random() < 0.6:
            buffer[:] = b"\xee" * len(buffer)
            return False
        return super().try_read(offset, buffer)


class ColdStore(MemoryLayerStore):
    async def open_data(self, layer, *, writable):
        found = await super().open_data(layer, writable=writable)
        return ColdDataFile(self, found._pages)


class Dice(random.Random):
    """Random choices in a third of the time that the standard ones take."""

    def pick(self, choices):
        return choices[int(self.random() * len(choices))]

    def below(self, bound):
        return int(self.random() * bound)


class Generator:
    """Random requests in batches; remembers which granules a batch reads and writes."""

    def __init__(self, seed, *, long=False, extended=False):
        self.dice = Dice(seed)
        self.extended = extended
        self.pool = self.dice.randbytes(4 * MIB)
        self.long = long
        shares = LONG_SHARES if long else SHARES
        self.kinds = [kind for kind, share in shares.items() for _ in range(share)]
        self.kinds += [PLAIN] * (1000 - len(self.kinds))
        self.touched = bytearray(SIZE // GRANULE + 1)
        self.window = (0, SIZE)
        self.cookie = 0

    def batch(self, most):
        """[(flags, command, cookie, offset, length, payload)], at most that many."""
        pick, below = self.dice.pick, self.dice.below
        self.touched = bytearray(SIZE // GRANULE + 1)
        wanted = min(most, pick((1, 5, 20, 40) if self.long else (1, 2, 10, 100, 300, 300, 600)))
        found = []
        self.window = (0, SIZE)
        if not below(4):
            self.window = (below(SIZE // WINDOW) * WINDOW, WINDOW)
        elif not below(2 if self.long else 8):  # first, while there is room for it
            request = self._make(HUGE)
            self._claim(*request[:4])
            found.append(self._number(request))
        for _ in range(wanted - len(found)):
            kind = pick(self.kinds)
            if kind == ODD_ZEROES:
                # Whether its edges come to hold data depends on what else is going on: not in
                # one batch with requests that could tell.
                if found:
                    continue
                return [self._number(self._odd_zeroes())]
            request = self._make(kind)
            if self._claim(*request[:4]):
                found.append(self._number(request))
        return found

    def _number(self, request):
        """The cookie is random above, a counter below, so that none comes twice."""
        self.cookie += 1
        flags, command, offset, length, payload = request
        if self.extended:
            flags, length, payload = self._extend(flags, command, length, payload)
        cookie = self.dice.getrandbits(32) << 32 | self.cookie
        return flags, command, cookie, offset, length, payload

    def _extend(self, flags, command, length, payload):
        """A payload is announced; seldom where none belongs, or one comes without."""
        seldom = not self.dice.below(200)
        if command == WRITE:
            return flags if seldom else flags | PAYLOAD_LEN, length, payload
        if command == BLOCK_STATUS and length and not self.dice.below(3):
            wanted = self.dice.pick(([CONTEXT], [CONTEXT], [CONTEXT], [2], [CONTEXT] * 2, []))
            payload = struct.pack(f">Q{len(wanted)}I", length, *wanted)
        elif seldom:
            payload = self._payload(self.dice.pick((0, 1, 100, 10_000)))
        else:
            return flags, length, payload
        return flags | PAYLOAD_LEN, len(payload), payload

    def _claim(self, flags, command, offset, length):
        """Whether the request may be under way with the others of its batch."""
        if offset + length > SIZE or not length:
            return True
        first, last = offset // GRANULE, (offset + length - 1) // GRANULE + 1
        if command in (WRITE, TRIM, WRITE_ZEROES) or length >= 16384 or command == BLOCK_STATUS:
            if length >= 16384 or command not in (READ, WRITE):
                # These look at whole blocks.
                first &= -8
                last = (last + 7) & -8
            if command in (READ, BLOCK_STATUS):
                return self._claim_read(first, last)
            if self.touched.find(1, first, last) >= 0 or self.touched.find(2, first, last) >= 0:
                return False
            self.touched[first:last] = b"\2" * (last - first)
            return True
        return command == CACHE or self._claim_read(first, last)

    def _claim_read(self, first, last):
        if self.touched.find(2, first, last) >= 0:
            return False
        self.touched[first:last] = b"\1" * (last - first)
        return True

    def _place(self, length):
        """An offset: of blocks, sectors or bytes."""
        align = self.dice.pick((BLOCK, BLOCK, 512, 1))
        start, size = self.window if length <= WINDOW else (0, SIZE)
        return start + self.dice.below((size - length) // align + 1) * align

    def _payload(self, length):
        start = self.dice.below(len(self.pool) - length + 1)
        return memoryview(self.pool)[start : start + length]

    def _data(self, flags, command, length):
        payload = self._payload(length) if command == WRITE else b""
        return flags, command, self._place(length), length, payload

    def _make(self, kind):
        pick, below = self.dice.pick, self.dice.below
        if kind == PLAIN:
            length = pick(LENGTHS) if self.dice.random() < 0.8 else 1 + below(8192)
            return self._data(0, pick((READ, WRITE)), length)
        if kind == FLAGGED:
            # FUA, DF (no flag of a simple READ), some that are none.
            flags = pick((1, 1, 4, 4, 5, 2, 8, 16, 0x8000))
            command = pick((READ, READ, READ, READ, READ, READ, READ, WRITE))
            return self._data(flags, command, pick((*LENGTHS, 16384, 70000)))
        if kind == LARGE:
            length = pick((16383, 16384, 32768, 65536, 100_000, 262144, 262144))
            return self._data(0, pick((READ, READ, WRITE)), length)
        if kind == HUGE:
            length = pick((MIB - 28, MIB, MIB + 1, 5 * MIB // 4, 9 * MIB // 4))
            return self._data(pick((0, 0, 4)), pick((READ, WRITE)), length)
        if kind == ZEROES:
            blocks = pick((1, 2, 5, 16, 100))
            command, flags = pick(
                ((TRIM, 0), (TRIM, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, NO_HOLE))
            )
            offset = below(SIZE // BLOCK - blocks + 1) * BLOCK
            return flags, command, offset, blocks * BLOCK, b""
        if kind == ASK:
            command = pick((BLOCK_STATUS, BLOCK_STATUS, CACHE))
            flags = pick((0, 0, 8)) if command == BLOCK_STATUS else 0
            length = pick((1, 512, BLOCK, 65536, MIB, 4 * MIB))
            return flags, command, self._place(length), length, b""
        if kind == SYNC:
            return pick((0, 0, 1)), FLUSH, 0, 0, b""
        if kind == NOTHING:
            command = pick((READ, WRITE, TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS))
            return pick((0, 0, 1)), command, self._place(0), 0, b""
        return self._wrong()

    def _odd_zeroes(self):
        command = self.dice.pick((TRIM, WRITE_ZEROES))
        flags = NO_HOLE if command == WRITE_ZEROES and self.dice.random() < 0.3 else 0
        length = self.dice.pick((1, 100, 5000, 20000, 300_000))
        return flags, command, self._place(length), length, b""

    def _wrong(self):
        """Out of range, too large, unknown, flags that the command does not take."""
        pick, below = self.dice.pick, self.dice.below
        command = pick((READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS))
        which = below(5)
        length = pick((1, 512, 4096, 50_000))
        if which == 0:
            offset = SIZE - length + 1 + below(2 * length)
        elif which == 1:
            offset = pick((1 << 63, (1 << 64) - length, (1 << 64) - 1))
        elif which == 2:
            command, offset, length = READ, 0, pick((33 * MIB, (1 << 32) - 1))
        elif which == 3:
            command, offset = pick((8, 9, 255, 0xFFFF)), self._place(0)
            length = self.dice.getrandbits(32)
        else:
            return pick((0, 1, 2)), FLUSH, pick((0, 1)), 1, b""
        payload = self._payload(length) if command == WRITE else b""
        return pick((0, 0, 0, 1)), command, offset, length, payload


class Wire:
    """The client's end: sends batches in pieces, takes the replies apart."""

    def __init__(self, sock, dice):
        self.sock = sock
        self.dice = dice

    async def exchange(self, message, size, whole=lambda received: True):
        """Send ``message``, receive ``size`` bytes, and more until ``whole`` is content.

        Returns what came, which may be less.
        """
        rest = memoryview(message)
        # Most in one piece; some byte by byte around the borders of requests.
        cuts = self.dice.pick((1 << 30, 1 << 30, 1 << 16, 5000, 100))
        cuts = max(cuts, len(message) // 50)
        received = bytearray()
        deadline = time.monotonic() + PATIENCE
        while rest or len(received) < size or not whole(received):
            moved = 0
            if rest:
                try:
                    moved = self.sock.send(rest[: 1 + self.dice.below(cuts)])
                    rest = rest[moved:]
                except BlockingIOError:
                    pass
            try:
                piece = self.sock.recv(1 << 20)
                if not piece:
                    break
                received += piece
                moved += len(piece)
            except BlockingIOError:
                pass
            if moved:
                deadline = time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                break
            await asyncio.sleep(0)
        return received


def take_apart(stream, lengths):
    """{cookie: whole reply}; ``lengths`` are those of the data of simple replies, by cookie.

    A reply in chunks comes as one list of (type, payload), data that was cut joined again.
    """
    found = {}
    at = 0
    while at < len(stream):
        start = at
        (magic,) = struct.unpack_from(">I", stream, at)
        if magic == SIMPLE_MAGIC:
            _, error, cookie = SIMPLE_REPLY.unpack_from(stream, at)
            at += SIMPLE_REPLY.size + (0 if error else lengths.get(cookie, 0))
            assert cookie not in found, f"two replies to {cookie:#x}"
            found[cookie] = bytes(stream[start:at])
            continue
        layout = LONG_CHUNK if magic == LONG_CHUNK_MAGIC else CHUNK
        magic, flags, kind, cookie, *_, size = layout.unpack_from(stream, at)
        known = magic in (CHUNK_MAGIC, LONG_CHUNK_MAGIC)
        assert known, f"no reply begins at byte {at} of the batch"
        at += layout.size
        if at + size > len(stream):
            raise struct.error("a chunk's payload is cut off")
        payload = stream[at : at + size]
        at += size
        chunks = found.setdefault(cookie, [])
        assert not chunks or chunks[-1] is not None, f"two replies to {cookie:#x}"
        if chunks and kind == chunks[-1][0] == OFFSET_DATA and follows(chunks[-1][1], payload):
            chunks[-1][1].extend(payload[8:])
        else:
            chunks.append((kind, bytearray(payload)))
        if flags & 1:
            chunks.append(None)
    return found


def all_answered(amount, stream):
    """Whether a stream of replies, some of them in chunks, is complete."""
    try:
        found = take_apart(stream, {})
    except struct.error:
        return False
    ended = [isinstance(reply, bytes) or reply[-1] is None for reply in found.values()]
    return len(ended) == amount and all(ended)


def follows(data, more):
    """Whether a chunk's data begins where another's ends."""
    (offset,), (place,) = struct.unpack_from(">Q", data), struct.unpack_from(">Q", more)
    return offset + len(data) - 8 == place


def explain(seed, number, batch, expected, stream, lengths):
    """Which request of a batch was answered otherwise."""
    lines = [f"seed {seed}, batch {number} of {len(batch)} requests:"]
    try:
        found = take_apart(stream, lengths)
    except (AssertionError, struct.error) as error:
        found = {}
        lines.append(f"the replies make no sense: {error}")
    wanted = take_apart(b"".join(expected), lengths)
    for flags, command, cookie, offset, length, _ in batch:
        if found.get(cookie) != wanted[cookie]:
            lines.append(
                f"command {command} flags {flags:#x} offset {offset} length {length}:"
                f" expected {show(wanted[cookie])}, got {show(found.get(cookie))}"
            )
    return "\n".join(lines[:20])


def show(reply):
    """The beginning of a reply, or of each of its chunks."""
    if isinstance(reply, list):
        return [chunk and (chunk[0], len(chunk[1]), chunk[1][:40].hex()) for chunk in reply]
    return "nothing" if reply is None else (len(reply), reply[:40].hex())


async def compare(export, twin, generator, seed, amount, between=None, meter=None):
    """Drive a Transmission over ``export`` and the twin with ``amount`` requests."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    meter = meter or Meter()
    twin.counted.clear()
    transmission = Transmission(
        theirs,
        export,
        style=twin.style,
        contexts=() if twin.simple else ((CONTEXT, "base:allocation"),),
        peer="twin",
        meter=meter,
    )
    layout, magic = (LONG_REQUEST, LONG_MAGIC) if twin.extended else (REQUEST, MAGIC)
    transmission.start(b"")
    wire = Wire(ours, generator.dice)
    done = number = 0
    while done < amount:
        batch = generator.batch(amount - done)
        expected = [twin.answer(*request) for request in batch]
        message = b"".join(
            [
                part
                for flags, command, cookie, offset, length, payload in batch
                for part in (layout.pack(magic, flags, command, cookie, offset, length), payload)
            ]
        )
        lengths = {}
        if twin.simple:
            sizes = map(len, expected)
            lengths = {
                request[2]: size - SIMPLE_REPLY.size
                for request, size in zip(batch, sizes, strict=True)
            }
        size = sum(map(len, expected))
        cut = any(command == READ and length > MIB for _, command, _, _, length, _ in batch)
        if cut and not twin.simple:
            whole = functools.partial(all_answered, len(batch))
            stream = await wire.exchange(message, size, whole)
        else:
            stream = await wire.exchange(message, size)
        agreed = stream == b"".join(expected)
        if not agreed:  # another order, as tasks have it
            wanted = take_apart(b"".join(expected), lengths)
            with contextlib.suppress(AssertionError, struct.error):
                agreed = take_apart(stream, lengths) == wanted
        if not agreed:
            pytest.fail(explain(seed, number, batch, expected, stream, lengths))
        for block in twin.unsure:
            ((_, twin.mapped[block]),) = export.extents(block * BLOCK, BLOCK, 1)
        twin.unsure.clear()
        number += 1
        done += len(batch)
        if between is not None:
            await between(done)
    ours.send(layout.pack(magic, 0, DISC, 0, 0, 0))
    assert await asyncio.wait_for(transmission.closed, 20) is False
    numbers = meter.read()
    assert (numbers.connections, numbers.in_flight) == (0, 0)
    assert {
        name: [found.count, found.bytes, dict(found.errors)]
        for name, found in numbers.commands.items()
    } == twin.counted
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    ours.close()
    theirs.close()


class Snapshots:
    """Takes one now and then while requests run, and deletes old ones."""

    def __init__(self, catalogue):
        self.catalogue = catalogue
        self.next = SNAPSHOT_EVERY
        self.names = []
        self.task = None

    async def __call__(self, done):
        if done >= self.next:
            self.next = done + SNAPSHOT_EVERY
            await self.settle()
            self.task = asyncio.create_task(self._turn(f"s{done}"))

    async def settle(self):
        if self.task is not None:
            await self.task
            self.task = None

    async def _turn(self, name):
        await self.catalogue.create_snapshots([("disk", name)])
        self.names.append(name)
        if len(self.names) > MOST_SNAPSHOTS:
            await self.catalogue.delete_snapshot("disk", self.names.pop(0))


async def check_all(export, twin, seed):
    """Every byte, and which blocks hold data."""
    content = bytearray(SIZE)
    for offset in range(0, SIZE, MIB):
        await export.read(offset, memoryview(content)[offset : offset + MIB])
    if content != twin.content:
        where = next(i for i in range(SIZE) if content[i] != twin.content[i])
        pytest.fail(f"seed {seed}: byte {where} of the volume differs in the end")
    assert export.extents(0, SIZE, 1 << 20) == twin.runs(0, SIZE), f"seed {seed}"


async def run(store, seed, amount, style, *, long=False):
    catalogue = await Catalogue.open(store)
    await catalogue.create_volume("disk", SIZE)
    twin = Twin(SIZE, style)
    generator = Generator(seed, long=long, extended=twin.extended)
    export = await catalogue.open_volume("disk", lambda: None)
    snapshots = Snapshots(catalogue)
    await compare(export, twin, generator, seed, amount * 9 // 10, snapshots)
    await snapshots.settle()
    # A snapshot, read while the volume goes on.
    await catalogue.create_snapshots([("disk", "read")])
    snapshot = await catalogue.open_snapshot("disk", "read", lambda: None)
    frozen = twin.frozen()
    await compare(export, twin, generator, seed, amount // 20)
    await compare(snapshot, frozen, generator, seed, amount - amount * 9 // 10 - amount // 20)
    await check_all(export, twin, seed)
    await check_all(snapshot, frozen, seed)
    for lease in (export, snapshot):
        await catalogue.close_export(lease)
    export = await catalogue.open_volume("disk", lambda: None)
    await check_all(export, twin, seed)
    await catalogue.close_export(export)
    await catalogue.close()


@pytest.mark.parametrize(
    ("style", "seed"), [(SIMPLE, 21), (STRUCTURED, 22), (EXTENDED, 23)], ids=str
)
def test_twin_under_limits_that_change(style, seed):
    """Limits take time, and nothing else."""

    async def main():
        catalogue = await Catalogue.open(MemoryLayerStore())
        await catalogue.create_volume("disk", SIZE)
        twin = Twin(SIZE, style)
        generator = Generator(seed, long=False, extended=twin.extended)
        export = await catalogue.open_volume("disk", lambda: None)
        meter = Meter()
        dice = random.Random(seed)
        loop = asyncio.get_running_loop()

        def change():
            iops = dice.choice([None, 2000, 20_000, 10**6])
            bandwidth = dice.choice([None, 100 * MIB, 1000 * MIB])
            meter.limit(
                Limits(
                    iops,
                    iops and dice.choice([None, 1, 50]),
                    bandwidth,
                    bandwidth and dice.choice([None, 1, MIB]),
                )
            )
            nonlocal timer
            timer = loop.call_later(dice.random() * 0.02, change)

        timer = None
        change()
        try:
            await compare(export, twin, generator, seed, 4000 * TIMES, meter=meter)
        finally:
            timer.cancel()
        await check_all(export, twin, seed)
        assert meter.read().throttled > 0
        await catalogue.close_export(export)
        await catalogue.close()

    asyncio.run(main())


@pytest.mark.timeout(300 * TIMES)
@pytest.mark.parametrize(
    ("store", "style", "amount", "seed"),
    [
        (MemoryLayerStore, STRUCTURED, 60_000, 1),
        (MemoryLayerStore, SIMPLE, 55_000, 2),
        (MemoryLayerStore, EXTENDED, 50_000, 9),
        (ColdStore, STRUCTURED, 16_000, 3),
        (ColdStore, SIMPLE, 16_000, 4),
        (ColdStore, EXTENDED, 12_000, 10),
        (LocalLayerStore, STRUCTURED, 10_000, 5),
        (LocalLayerStore, SIMPLE, 8_000, 6),
        (LocalLayerStore, EXTENDED, 8_000, 11),
    ],
)
def test_twin(store, style, amount, seed, tmp_path):
    made = store(tmp_path / "data") if store is LocalLayerStore else store()
    asyncio.run(run(made, seed, TIMES * amount, style))


@pytest.mark.parametrize(("style", "seed"), [(STRUCTURED, 7), (SIMPLE, 8), (EXTENDED, 12)])
def test_long_requests(style, seed, tmp_path):
    """Ten thousand, most of them long: streamed writes, replies lent by the page cache."""
    store = LocalLayerStore(tmp_path / "data")
    asyncio.run(run(store, seed, 3500, style, long=True))
