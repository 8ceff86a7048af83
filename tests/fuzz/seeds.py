"""Random inputs of each target, and changes of an input that keep its shape."""

import struct
from itertools import pairwise

import msgpack

from . import channel, handshake, messages, transmission, wire


def random_handshake(dice):
    return dice.randbytes(handshake.TERMS) + messages.handshake(dice)


def change_handshake(dice, data):
    """Change, drop, double, move or add an option."""
    terms, sent = bytearray(data[: handshake.TERMS]), data[handshake.TERMS :]
    if not sent or dice.random() < 0.1:
        return random_handshake(dice)
    if terms and dice.random() < 0.2:
        terms[dice.randrange(len(terms))] = dice.randrange(256)
    borders = [4, *(end for _, end in handshake._options(sent))]
    parts = [sent[a:b] for a, b in pairwise(borders)]
    rest = sent[borders[-1] :]
    at = dice.randrange(len(parts) + 1)
    how = dice.randrange(5)
    if how == 0 or not parts:
        parts[at:at] = [messages.option(dice)]
    elif how == 1:
        del parts[at:]
    elif how == 2:
        parts[at:at] = [dice.choice(parts)]
    else:
        at = min(at, len(parts) - 1)
        kind, body = int.from_bytes(parts[at][8:12], "big"), parts[at][16:]
        parts[at] = wire.option(kind, messages.spoiled(dice, body))
    return bytes(terms) + sent[:4] + b"".join(parts) + rest


def random_transmission(dice):
    terms = bytearray(dice.randbytes(transmission.TERMS))
    terms[0] = dice.randrange(3) + 3 * dice.randrange(80)
    terms[1] = dice.choice((0, 0, 0xFF, terms[1]))
    terms[2] = dice.choice((0, 0, 0xFF, terms[2]))
    terms[3] = dice.choice((0, 1, 2, 2, 3, terms[3]))
    terms[4] = dice.choice((0, 0, 0, 1, terms[4]))
    return bytes(terms) + b"".join(_record(dice) for _ in range(dice.choice((1, 3, 10, 40, 120))))


def _record(dice):
    kind = dice.random()
    if kind < 0.70:
        return _request(dice, dice.randrange(8))
    if kind < 0.75:  # what was written is read, or asked for
        first = _request(dice, wire.WRITE)
        then = bytes((dice.choice((wire.READ, wire.READ, wire.BLOCK_STATUS)),))
        settle = bytes((transmission.SETTLE,))
        return first + settle + then + first[1:]
    if kind < 0.78:
        noise = dice.choice((dice.randbytes(dice.randrange(40)), _raw_request(dice)))
        return bytes((transmission.RAW, len(noise))) + noise
    if kind < 0.80:
        return bytes((transmission.REPEAT, dice.choice((1, 5, 100, 255))))
    tag = dice.choice((9, 9, 10, 11, 12, 13, 15))
    return bytes((dice.choice((0, 1, 15)) << 4 | tag,))


def _request(dice, command):
    """A record of one request. Most lengths are short, for speed; most twists none."""
    flags = dice.choice((0, 0, 0, 0, 0, 1, 1, 2, 4, 8, 5, 15))
    length = dice.choice((*range(14), *range(14), *range(14), *range(23), dice.randrange(256)))
    plain = (0, 0, 0x10, 0x20, 0x20, 0x30, 0x40, 0x80, 0xC0)
    if command == wire.BLOCK_STATUS:
        plain = (0, 2, 2, 0x22)
    elif command == wire.WRITE_ZEROES:
        plain = (0, 1, 0x21, 0x20)
    twists = dice.choice((*plain, dice.randrange(256)))
    place = dice.choice((0, 2, 8, 32, dice.getrandbits(16)))
    return bytes((flags << 4 | command, length, twists)) + place.to_bytes(2, "big")


def _raw_request(dice):
    return messages.request(dice, dice.choice(wire.FRAMINGS), 4 << 20, dice.getrandbits(64))[1]


def change_transmission(dice, data):
    """Change, drop, double, move or add a record; or one of the terms."""
    terms = bytearray(data[: transmission.TERMS].ljust(transmission.TERMS, b"\0"))
    if dice.random() < 0.2:
        terms[dice.randrange(len(terms))] = dice.randrange(256)
    records = list(transmission.split(data))
    at = dice.randrange(len(records) + 1)
    how = dice.randrange(5)
    if how == 0 or not records:
        records[at:at] = [_record(dice) for _ in range(dice.choice((1, 1, 5)))]
    elif how == 1:
        del records[at : at + dice.choice((1, 1, 3, 10))]
    elif how == 2:
        records.insert(at, dice.choice(records))
    elif how == 3:
        records.insert(at, records.pop(dice.randrange(len(records))))
    else:
        at = min(at, len(records) - 1)
        record = bytearray(records[at])
        record[dice.randrange(len(record))] = dice.randrange(256)
        records[at] = bytes(record)
    return bytes(terms) + b"".join(records)


def random_channel(dice):
    return dice.randbytes(channel.TERMS) + b"".join(
        _frame(dice) for _ in range(dice.choice((1, 2, 5)))
    )


def _frame(dice):
    message = dice.choice(
        (
            [0, dice.randrange(3), "method", [1, None]], [1, dice.randrange(5), [1, {"a": 2}]],
            [2, dice.randrange(5), ["NotFoundError", "x"]], [2, 1, ["OSError", "x", 5, None]],
            [3, "name", []], [4, "name", [b"x"]], [5], 7, {}, [[[]]], [0, [], {}, {}], [1, [], 1],
            [2, 1, 7], [2, 1, []], [2, 2, ["OSError", 1, 2]], [2, 3, [[], {}]],
        )
    )  # fmt: skip
    body = msgpack.packb(message)
    if dice.random() < 0.3:
        body = messages.spoiled(dice, body)
    length = len(body) if dice.random() < 0.9 else dice.choice((0, 1, 1 << 28, len(body) + 1))
    return struct.pack(">I", length) + body


def change_channel(dice, data):
    return data + _frame(dice) if dice.random() < 0.5 else random_channel(dice)


TARGETS = {
    "handshake": (handshake.run, random_handshake, change_handshake),
    "transmission": (transmission.run, random_transmission, change_transmission),
    "channel": (channel.run, random_channel, change_channel),
}
"""Name: what checks an input, makes a random one, changes one."""
