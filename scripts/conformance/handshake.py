"""The client's side of the handshake: options, and the format of every reply to them.

Section "Newstyle negotiation": the server greets with NBDMAGIC, IHAVEOPT and its flags; the client
answers with its own. "Fixed newstyle negotiation": every option save EXPORT_NAME is answered by
replies that name it, the last one ACK or an error. Whatever is wrong with the format of one is a
Violation here, in whatever check it happens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .connection import Connection
from .constants import (
    ERROR_BIT,
    INIT_PASSWD,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    Rep,
    name_of,
)
from .strings import decode, shown
from .verdicts import Level, Unavailable, Violation

_FORMAT = "Fixed newstyle negotiation: the format of option replies"
_MAX_REPLY = 1 << 20
_MAX_ANSWER = 8 << 20


@dataclass(frozen=True)
class Export:
    """What NBD_INFO_EXPORT or EXPORT_NAME says: size in bytes, transmission flags."""

    size: int
    flags: int


@dataclass
class Answer:
    """All replies to one option; ``final`` is the type of the last one, ACK or an error."""

    option: int
    final: int = 0
    text: str = ""
    exports: list[tuple[str, str]] = field(default_factory=list)
    """Name and description of every NBD_REP_SERVER."""
    infos: list[tuple[int, bytes]] = field(default_factory=list)
    """Type and payload of every NBD_REP_INFO."""
    contexts: list[tuple[int, str]] = field(default_factory=list)
    """ID and name of every NBD_REP_META_CONTEXT."""

    @property
    def accepted(self) -> bool:
        """Whether it ended with ACK."""
        return self.final == Rep.ACK

    def __str__(self) -> str:
        more = [
            f"{len(items)} {what}"
            for items, what in (
                (self.exports, "NBD_REP_SERVER"),
                (self.infos, "NBD_REP_INFO"),
                (self.contexts, "NBD_REP_META_CONTEXT"),
            )
            if items
        ]
        said = f' "{self.text}"' if self.text else ""
        return ", ".join([*more, name_of(Rep, self.final, "NBD_REP_") + said])

    def info(self, kind: Info) -> bytes | None:
        """Payload of one type of information, None when it was not sent."""
        return next((payload for number, payload in self.infos if number == kind), None)

    def export(self) -> Export:
        """NBD_INFO_EXPORT, which must be there."""
        payload = self.info(Info.EXPORT)
        if payload is None:
            raise Violation(
                "an NBD_INFO_EXPORT before NBD_REP_ACK",
                str(self),
                Level.MUST,
                "NBD_REP_INFO: the server MUST send an NBD_INFO_EXPORT before NBD_REP_ACK",
            )
        return Export(*struct.unpack(">QH", payload))

    def block_size(self) -> tuple[int, int, int] | None:
        """Minimum, preferred, maximum payload of NBD_INFO_BLOCK_SIZE, None without."""
        payload = self.info(Info.BLOCK_SIZE)
        if payload is None:
            return None
        minimum, preferred, maximum = struct.unpack(">III", payload)
        return minimum, preferred, maximum


class Handshake:
    """A connection on which the server's greeting has been read."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        magic, style = struct.unpack(">QQ", connection.receive(16, "the server's greeting"))
        if magic != INIT_PASSWD:
            raise Violation("the greeting NBDMAGIC", shown(struct.pack(">Q", magic)))
        if style == OLDSTYLE_MAGIC:
            raise Unavailable("an oldstyle server: there is no handshake")
        if style != OPTION_MAGIC:
            raise Violation("IHAVEOPT behind NBDMAGIC", shown(struct.pack(">Q", style)))
        (self.flags,) = struct.unpack(">H", connection.receive(2, "handshake flags"))
        self.client_flags = 0

    def send_client_flags(self, flags: int) -> None:
        """Answer the greeting."""
        self.client_flags = flags
        self.connection.send(struct.pack(">I", flags), f"client flags {flags:#x}")

    def send_option(self, option: int, data: bytes = b"", what: str = "") -> None:
        """Send an option and do not wait for its answer."""
        words = name_of(Option, option, "NBD_OPT_") + (f" {what}" if what else "")
        self.connection.send(encode_option(option, data), words)

    def ask(self, option: int, data: bytes = b"", what: str = "") -> Answer:
        """Send an option and read all replies to it."""
        self.send_option(option, data, what)
        return self.read_answer(option)

    def read_answer(self, option: int) -> Answer:
        """Read replies to an option up to the final one."""
        name = name_of(Option, option, "NBD_OPT_")
        answer = Answer(option)
        size = 0
        while size < _MAX_ANSWER:
            header = self.connection.receive(20, f"a reply to {name}")
            magic, to, kind, length = struct.unpack(">QIII", header)
            if magic != OPTION_REPLY_MAGIC:
                raise Violation(
                    f"a reply to {name}, magic {OPTION_REPLY_MAGIC:#x}",
                    shown(header),
                    Level.MUST,
                    _FORMAT,
                )
            if to != option:
                raise Violation(
                    f"a reply to {name}",
                    f"a reply to {name_of(Option, to, 'NBD_OPT_')}",
                    Level.MUST,
                    _FORMAT,
                )
            if length > _MAX_REPLY:
                raise Violation(
                    f"a reply to {name} that ends", f"one of {length} bytes", Level.MUST, _FORMAT
                )
            data = self.connection.receive(length, f"{length} bytes of a reply to {name}")
            size += 20 + length
            if self._take(answer, kind, data):
                return answer
        raise Violation(f"a final reply to {name}", f"{size} bytes of others")

    def _take(self, answer: Answer, kind: int, data: bytes) -> bool:
        """Put one reply into the answer; True when it was the final one."""
        if kind & ERROR_BIT:
            answer.final = kind
            answer.text = decode(data, "error message")
            return True
        if kind == Rep.ACK:
            _require(not data, "NBD_REP_ACK without data", f"{len(data)} bytes of data")
            answer.final = kind
            return True
        if kind == Rep.SERVER:
            answer.exports.append(_parse_server(data))
        elif kind == Rep.INFO:
            answer.infos.append(_parse_info(data))
        elif kind == Rep.META_CONTEXT:
            _require(len(data) >= 5, "an ID and a name in NBD_REP_META_CONTEXT", shown(data))
            (number,) = struct.unpack_from(">I", data)
            answer.contexts.append((number, decode(data[4:], "name of a metadata context")))
        else:
            raise Violation(
                "a reply type of the specification", f"type {kind:#x}", Level.RULE, _FORMAT
            )
        return False

    def read_reserved(self) -> bytes:
        """Read the zeroes behind that, unless NO_ZEROES was negotiated."""
        return b"" if self.client_flags & 2 else self.connection.receive(124, "124 reserved bytes")

    def read_export(self) -> Export:
        """Read what follows an EXPORT_NAME that is granted, without the zeroes."""
        layout = struct.Struct(">QH")
        return Export(*layout.unpack(self.connection.receive(layout.size, "the export's size")))


def encode_option(option: int, data: bytes, length: int | None = None) -> bytes:
    """An option; ``length`` is what its header says when that is not true."""
    return struct.pack(">QII", OPTION_MAGIC, option, len(data) if length is None else length) + data


def encode_info(
    name: bytes,
    information: Sequence[int] = (),
    *,
    name_length: int | None = None,
    count: int | None = None,
) -> bytes:
    """Data of INFO and GO; the lengths are what is said when that is not true."""
    length = len(name) if name_length is None else name_length
    number = len(information) if count is None else count
    return b"".join(
        (
            struct.pack(">I", length),
            name,
            struct.pack(">H", number),
            *(struct.pack(">H", kind) for kind in information),
        )
    )


def encode_queries(
    name: bytes,
    queries: Iterable[bytes] = (),
    *,
    name_length: int | None = None,
    count: int | None = None,
) -> bytes:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    wanted = list(queries)
    return b"".join(
        (
            struct.pack(">I", len(name) if name_length is None else name_length),
            name,
            struct.pack(">I", len(wanted) if count is None else count),
            *(struct.pack(">I", len(query)) + query for query in wanted),
        )
    )


def _parse_server(data: bytes) -> tuple[str, str]:
    _require(len(data) >= 4, "the length of a name in NBD_REP_SERVER", shown(data))
    (length,) = struct.unpack_from(">I", data)
    _require(
        length <= len(data) - 4,
        "a name no longer than the reply's length - 4 (MUST)",
        f"{length} in a reply of {len(data)} bytes",
    )
    name = decode(data[4 : 4 + length], "name of an export")
    return name, decode(data[4 + length :], "description of an export")


def _parse_info(data: bytes) -> tuple[int, bytes]:
    _require(len(data) >= 2, "a type in NBD_REP_INFO", shown(data))
    (kind,) = struct.unpack_from(">H", data)
    wanted = {Info.EXPORT: 12, Info.BLOCK_SIZE: 14}.get(kind)
    if wanted is not None:
        _require(
            len(data) == wanted,
            f"{name_of(Info, kind, 'NBD_INFO_')} of {wanted} bytes (MUST)",
            f"{len(data)} bytes",
        )
    elif kind in (Info.NAME, Info.DESCRIPTION):
        decode(data[2:], name_of(Info, kind, "NBD_INFO_"))
    return kind, data[2:]


def _require(true: bool, expected: str, came: str) -> None:
    if not true:
        raise Violation(expected, came, Level.MUST, _FORMAT)
