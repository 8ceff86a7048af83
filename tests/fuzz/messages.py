"""Random messages of a client: right, nearly right, and wrong.

``dice`` is a ``random.Random``; what is made depends on nothing else.
"""

import struct

from . import wire

NAMES = ("disk", "disk", "disk", "other", "", "disk@snapshot", "no-such", "ü" * 20, "x" * 4096)
QUERIES = (
    "base:allocation", "base:allocation", "base:", "qemu:", "qemu:dirty-bitmap:",
    "qemu:dirty-bitmap:snapshot-3", "qemu:allocation-depth", "x:y", "", "base", ":",
)  # fmt: skip
ODD_NUMBERS = (0, 1, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, wire.MAX_OPTION, wire.MAX_OPTION + 1)
LENGTHS = (
    0, 1, 511, 512, 4095, 4096, 4096, 4096, 4097, 8192, 16383, 16384, 20000, 65536,
    (128 << 10) - 1, 128 << 10, (128 << 10) + 1, 300_000, 1 << 20,
)  # fmt: skip
LONG = ((1 << 20) + 1, 3 << 20, wire.MAX_PAYLOAD, wire.MAX_PAYLOAD + 1)
MOST = (0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
COMMANDS = (
    *[wire.READ] * 6, *[wire.WRITE] * 6, wire.FLUSH, wire.TRIM, wire.TRIM, wire.CACHE,
    wire.WRITE_ZEROES, wire.WRITE_ZEROES, wire.BLOCK_STATUS, wire.BLOCK_STATUS,
)  # fmt: skip


def handshake(dice, name="disk"):
    """What a client sends from its flags on; most of them come to the transmission phase."""
    found = [struct.pack(">I", dice.choice((3, 3, 3, 3, 1, 2, 0, dice.getrandbits(32))))]
    if dice.random() < 0.5:  # what most others build on
        found.append(wire.option(dice.choice((wire.STRUCTURED, wire.EXTENDED))))
    if dice.random() < 0.3:
        found.append(wire.option(wire.SET_META, wire.queries(name, "base:allocation")))
    found += [option(dice) for _ in range(dice.choice((0, 0, 1, 2, 5, 12)))]
    if dice.random() < 0.6:
        kind, data = dice.choice(
            ((wire.GO, wire.info(name)), (wire.GO, wire.info(name, 1, 2, 3)), (1, name.encode()))
        )
        found.append(wire.option(kind, data))
    return b"".join(found)


def option(dice):
    """One option."""
    kind = dice.choice((*range(1, 12), 3, 6, 7, 8, 8, 9, 9, 10, 10, 11, 12, dice.getrandbits(32)))
    name = dice.choice(NAMES)
    if kind in (wire.INFO, wire.GO):
        data = wire.info(
            name, *(dice.choice((0, 1, 2, 3, 4, 999)) for _ in range(dice.choice(range(5))))
        )
    elif kind in (wire.LIST_META, wire.SET_META):
        data = wire.queries(
            name, *(dice.choice(QUERIES) for _ in range(dice.choice((0, 1, 1, 2, 20))))
        )
    elif kind == wire.EXPORT_NAME:
        data = name.encode()
    else:
        data = dice.choice((b"",) * 8 + (b"x", bytes(100)))
    length = None
    fault = dice.random()
    if fault < 0.05:
        data = spoiled(dice, data)
    elif fault < 0.08:
        length = dice.choice((len(data) + 1, max(0, len(data) - 1), *ODD_NUMBERS))
    elif fault < 0.10:
        data += bytes(dice.choice((1, 2, 100, wire.MAX_OPTION)))
    magic = wire.IHAVEOPT if dice.random() < 0.995 else dice.randbytes(8)
    return wire.option(kind, data, length, magic)


def spoiled(dice, data):
    """``data`` with something wrong in it."""
    data = bytearray(data or b"?")
    at = dice.randrange(len(data))
    how = dice.randrange(4)
    if how == 0:
        data[at] = dice.choice((0, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    elif how == 1:
        del data[at:]
    elif how == 2:
        data[at:at] = dice.randbytes(dice.choice((1, 2, 4, 8)))
    else:
        field = struct.pack(">I", dice.choice(ODD_NUMBERS))
        data[at : at + 4] = field
    return bytes(data)


def request(dice, framing, size, cookie, longest=1 << 20):
    """One request to an export of ``size`` bytes, as a ``wire.Request`` and its header."""
    command = dice.choice(COMMANDS)
    length = dice.choice([length for length in LENGTHS if length <= longest])
    flags = 0
    if dice.random() < 0.25:
        flags = dice.choice((1, 1, 2, 4, 4, 5, 8, 8, 16, 0x8000))
    if command == wire.FLUSH and dice.random() < 0.9:
        length = 0
    offset = place(dice, size, length)
    fault = dice.random()
    if fault < 0.02:
        command = dice.choice((8, 9, 255, 0xFFFF))
    elif fault < 0.05:
        offset = dice.choice((size - length + 1, size, size + 1, *MOST))
    elif fault < 0.08 and (command != wire.WRITE or longest > wire.MAX_PAYLOAD):
        length = dice.choice((*LONG, *MOST))
    if command == wire.FLUSH and dice.random() < 0.9:
        offset = 0
    if framing == wire.EXTENDED_HEADERS:
        if (command == wire.WRITE) != (dice.random() < 0.03):
            flags |= wire.PAYLOAD_LEN
    elif dice.random() < 0.01:
        flags |= wire.PAYLOAD_LEN
    announced = flags & wire.PAYLOAD_LEN or command == wire.WRITE
    if announced and framing == wire.EXTENDED_HEADERS:
        length = min(length, longest)
    header = wire.pack_request(framing, flags, command, cookie, offset, length)
    return wire.unpack_request(framing, header, 0)[1], header


def place(dice, size, length):
    """An offset of blocks, sectors or bytes at which ``length`` bytes fit, if they do."""
    align = dice.choice((4096, 4096, 512, 1))
    return dice.randrange(max(1, (size - length) // align + 1)) * align
